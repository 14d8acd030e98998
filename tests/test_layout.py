"""Who may import what, where chance and clocks come from, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("traces", "policies", "simulator", "real_backend", "experiments")
MAY_IMPORT = {
    "traces": {"traces"},
    "policies": {"traces", "policies"},
    "simulator": {"traces", "policies", "simulator"},
    "real_backend": {"traces", "policies", "real_backend"},
    "experiments": {*FOLDERS},
    "simrl": {*FOLDERS},
}
HEAVY = {"torch", "vllm", "transformers", "ray"}
CONCRETE_POLICIES = {"verl", "rlhfuse", "rlhfless"}
SOURCES = sorted(
    (path, folder)
    for folder in (*FOLDERS, "simrl")
    for path in ((ROOT / "simrl").glob("*.py") if folder == "simrl" else (ROOT / folder).rglob("*.py"))
)


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(sources: list[tuple[Path, str]]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path, _ in sources]


@pytest.mark.parametrize(("path", "folder"), SOURCES, ids=names(SOURCES))
def test_imports_point_one_way(path: Path, folder: str) -> None:
    own = {name.split(".")[1] for name in imports_of(path) if name.startswith("simrl.")}
    if folder == "simrl":
        own -= {"cli"}
    assert own <= MAY_IMPORT[folder]


BACKENDS = [(path, folder) for path, folder in SOURCES if folder in ("simulator", "real_backend")]


@pytest.mark.parametrize(("path", "folder"), BACKENDS, ids=names(BACKENDS))
def test_backends_know_no_concrete_policy(path: Path, folder: str) -> None:
    known = {name.split(".")[2] for name in imports_of(path) if name.startswith("simrl.policies.")}
    assert not known & CONCRETE_POLICIES


LIGHT = [(path, folder) for path, folder in SOURCES if folder != "real_backend"]


@pytest.mark.parametrize(("path", "folder"), LIGHT, ids=names(LIGHT))
def test_heavy_packages_are_imported_by_the_real_backend_only(path: Path, folder: str) -> None:
    heavy = {name.split(".")[0] for name in imports_of(path)} & HEAVY
    assert heavy <= ({"ray"} if folder == "experiments" else set())  # sweeps may run on Ray


def test_importing_simrl_loads_nothing_heavy() -> None:
    code = "import sys, simrl; simrl.Assign; import simrl.policies.verl; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pandas", "matplotlib", "scipy.stats", "simpy", *HEAVY} & set(loaded)


MODEL = [(path, folder) for path, folder in SOURCES if folder in ("traces", "policies", "simulator")]
NUMPY_STATELESS = {"Generator", "SeedSequence", "Philox", "PCG64", "BitGenerator"}
CLOCKS = {"time.time", "time.monotonic", "time.sleep", "datetime.now", "datetime.datetime.now", "date.today"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def global_chance_and_clocks(text: str) -> set[str]:
    """What a file uses of global random generators and of the host's clock."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            numpy_global = re.fullmatch(r"(np|numpy)\.random\.(\w+)", name)
            if (numpy_global and numpy_global[2] not in NUMPY_STATELESS) or name in CLOCKS:
                found.add(name)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in ("random", "secrets", "uuid")}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names} & CLOCKS
            found |= {str(node.module)} & {"random", "secrets", "numpy.random"}
    return found


@pytest.mark.parametrize(("path", "folder"), MODEL, ids=names(MODEL))
def test_the_model_uses_no_global_chance_and_no_clock(path: Path, folder: str) -> None:
    assert not global_chance_and_clocks(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line", ["import random", "np.random.seed(1)", "x = numpy.random.rand(3)", "np.random.default_rng()", "time.time()"]
)
def test_global_chance_and_clocks_are_found(line: str) -> None:
    assert global_chance_and_clocks(line)


TEXT = {".py", ".md", ".toml", ".csv", ".json", ".ipynb", ".yaml", ".yml", ".cfg", ".txt", ""}
SKIPPED = {".git", ".venv", "build", "dist", "runs", "__pycache__"}
PRIVATE = re.compile(r"(?<![\w./~-])/(?:home|root|work|Users)/\w")


def texts() -> Iterator[Path]:
    """Files of the project: no caches, and each folder once, not through its link as well."""
    todo = [ROOT]
    while todo:
        for path in sorted(todo.pop().iterdir()):
            hidden = path.name.startswith(".") and path.name != ".ci" and path.is_dir()
            if path.is_symlink() or hidden or path.name in SKIPPED or path.name.endswith(".egg-info"):
                continue
            if path.is_dir():
                todo.append(path)
            elif path.suffix in TEXT:
                yield path


def test_no_file_names_a_directory_of_somebodys_machine() -> None:
    checked = list(texts())
    assert len(checked) > 20
    assert [str(path) for path in checked if PRIVATE.search(path.read_text(encoding="utf-8"))] == []


def test_directories_of_somebodys_machine_are_found() -> None:
    for folder in ("home", "root", "work", "Users"):
        assert PRIVATE.search(f"see /{folder}/me/x")
    assert not PRIVATE.search("https://example.org/" + "home/page")
