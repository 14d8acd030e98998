"""What the documentation says, works: snippets run in order, tables are fresh, links lead somewhere, names are there.

A newcomer's path: all commands and Python of README.md and the quick start, then those of "write a policy", each in an
empty folder, in a Python that can import nothing but simrl and what it requires without extras, as after `make run`
(which `make test` itself goes through on a clean clone: `make run` installs the core in the same way). Not run are the
blocks that are indented instead of fenced: they need files of the reader, or `make`.
"""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import simrl
from simrl.cli import app
from simrl.experiments.accuracy_page import page as accuracy_page
from simrl.experiments.timeline import COLUMNS

ROOT = Path(__file__).parents[1]
PATHS = {"newcomer": ["README.md", "docs/quickstart.md"], "policy": ["docs/write_a_policy.md"]}
REDUCED = {  # 15 runs of 45 steps take half a minute
    "simrl compare --policies verl,rlhfuse,rlhfless --nodes 2 --seeds 5": ["--steps", "2"],
}
CORE_ONLY = """
import sys

class CoreOnly:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {barred!r}:
            raise ModuleNotFoundError(f"{{name}} is not of the core", name=name)

sys.meta_path.insert(0, CoreOnly())
"""


class Snippet(NamedTuple):
    """A fenced block; `file` is the one that it is to be saved as."""

    page: str
    language: str
    text: str
    file: str | None


def snippets(page: str) -> Iterator[Snippet]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.finditer(r"(?:in `(\w+\.py)`:\n\n)?```(sh|python|text)\n(.*?)```", text, re.DOTALL | re.IGNORECASE):
        yield Snippet(page, block[2], block[3], block[1])


def core_modules() -> set[str]:
    """Distributions that simrl requires without extras, itself and the installer included."""
    found: set[str] = set()
    waiting = ["simrl", "pip", "setuptools"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            needed = map(Requirement, metadata.requires(name) or ())
            waiting += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    core = core_modules()
    owners = {
        module: {canonicalize_name(o) for o in found} for module, found in metadata.packages_distributions().items()
    }
    barred = {module for module, found in owners.items() if not found & core} - sys.stdlib_module_names
    folder = tmp_path_factory.mktemp("core_only")
    (folder / "sitecustomize.py").write_text(CORE_ONLY.format(barred=barred))
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "100", "NO_COLOR": "1"}
    for extra in ("pytest", "sphinx"):
        done = subprocess.run([sys.executable, "-c", f"import {extra}"], env=environment, stderr=subprocess.DEVNULL)
        assert done.returncode != 0, "the core only"
    return environment


@pytest.mark.parametrize("path", PATHS)
def test_all_that_a_reader_is_told_to_type_works_in_order(
    path: str, environment: dict[str, str], tmp_path: Path
) -> None:
    def python(*arguments: str) -> str:
        program = [sys.executable, *arguments]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    printed = ""
    commands = []
    for snippet in (snippet for page in PATHS[path] for snippet in snippets(page)):
        if snippet.language == "text":
            assert snippet.text == printed, f"{snippet.page} should show:\n{printed}"
        elif snippet.file:
            (tmp_path / snippet.file).write_text(snippet.text, encoding="utf-8")
        elif snippet.language == "python":
            printed = python("-c", snippet.text)
        else:
            for command in snippet.text.replace("\\\n", "").splitlines():
                assert command.startswith("simrl ")
                commands.append(command)
                printed = python("-m", *shlex.split(command), *REDUCED.get(command, []))
                assert printed
    assert len(commands) > 2
    if path == "newcomer":
        assert set(REDUCED) <= set(commands)
    else:
        check_that_the_last_policy_is_cheaper(tmp_path / "better")


def check_that_the_last_policy_is_cheaper(comparison: Path) -> None:
    row = json.loads((comparison / "comparison.json").read_text())["rows"][-1]
    assert row["policy"] == "prepare_early:PrepareEarly"
    assert row["gpu_s_reduction_ci95"][0] > 0.01
    cost_usd = pd.read_csv(comparison / "runs.csv").pivot(index="seed", columns="policy", values="cost_usd")
    assert len(cost_usd) == 5
    assert (cost_usd["prepare_early:PrepareEarly"] < 0.99 * cost_usd["verl"]).all()


def test_the_last_policy_is_of_about_twenty_lines() -> None:
    (policy,) = [snippet for snippet in snippets("docs/write_a_policy.md") if snippet.language == "python"]
    assert len([line for line in policy.text.splitlines() if line.strip()]) <= 22


def test_every_page_with_snippets_is_run() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    fenced = {str(page.relative_to(ROOT)) for page in documents if re.search(r"```(sh|python)\n", page.read_text())}
    assert fenced == {page for pages in PATHS.values() for page in pages}


def test_links_in_documents_lead_somewhere() -> None:
    """Anchors too, and links in pages of the site, are checked by Sphinx: `make docs`."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    links = [(page, link) for page in documents for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) > 5
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_the_accuracy_page_is_fresh() -> None:
    assert (ROOT / "docs/accuracy.md").read_text() == accuracy_page(), "python -m simrl.experiments.accuracy_page"


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs/api.md").read_text()
    documented = re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted({*simrl.__all__} - {"__version__"})


def test_the_api_page_has_every_column_of_the_frames() -> None:
    text = (ROOT / "docs/api.md").read_text().partition("## Frames")[2].partition("## Contract")[0]
    _, *parts = re.split(r"^\*\*(\w+)\*\*: a row", text, flags=re.MULTILINE)
    cells = {
        name: re.findall(r"^\| (`.*?`) \|", part, re.MULTILINE)
        for name, part in zip(parts[::2], parts[1::2], strict=True)
    }
    documented = {name: tuple(re.findall(r"`(\w+)`", ", ".join(found))) for name, found in cells.items()}
    assert documented == COLUMNS


@pytest.mark.parametrize("name", [name for name in simrl.__all__ if inspect.isfunction(getattr(simrl, name))])
def test_public_functions_describe_their_arguments(name: str) -> None:
    function = getattr(simrl, name)
    described = re.findall(r"^ +(\w+): ", inspect.getdoc(function).partition("Args:")[2], re.MULTILINE)
    assert set(inspect.signature(function).parameters) <= set(described)


# --- the command line's help ---


def commands(command: object, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if inner := getattr(command, "commands", None):
        for name, each in inner.items():
            yield from commands(each, (*words, name))
    else:
        yield words, command


ALL_COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_the_help_of_every_command_ends_with_an_example_that_can_be_parsed(words: tuple[str, ...]) -> None:
    command = ALL_COMMANDS[words]
    example = re.fullmatch(r"Example: simrl (.*)", command.epilog or "")
    assert example
    typed = shlex.split(example[1])
    assert tuple(typed[: len(words)]) == words
    command.make_context("simrl", typed[len(words) :])


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_o_is_short_for_every_output(words: tuple[str, ...]) -> None:
    outputs = [parameter.opts for parameter in ALL_COMMANDS[words].params if "--output" in parameter.opts]
    assert all("-o" in options for options in outputs)


def test_help_and_tables_are_as_narrow_as_the_terminal_and_without_colour() -> None:
    environment = {**os.environ, "COLUMNS": "60", "NO_COLOR": "1", "FORCE_COLOR": "1"}
    for arguments in (["compare", "--help"], ["policies"]):
        program = [sys.executable, "-m", "simrl", *arguments]
        shown = subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout
        assert "\033[" in shown, "a terminal"
        assert not re.search(r"\033\[[\d;]*3\dm", shown), "no colour"
        assert max(len(line) for line in re.sub(r"\033\[[\d;]*m", "", shown).splitlines()) <= 60
