"""The page docs/accuracy.md: every error figure of the documentation, copied from the page of who measured it.

`python -m simrl.experiments.accuracy_page` writes it again. It computes nothing: figures change on their own pages.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from simrl.traces.trace import whole_file

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Figures(NamedTuple):
    """A table of errors.

    Attributes:
        title: Of its section here.
        page: That has it.
        heading: Of the section of that page.
        columns: How the table's first row begins, which finds it.
        command: That measures it again.
        meaning: What the figures are, and of what.
        optional: Whether the page may be missing: it takes half an hour to make.
    """

    title: str
    page: str
    heading: str
    columns: str
    command: str
    meaning: str
    optional: bool = False


FIGURES = (
    Figures(
        "Real engines of one machine, profiled first", "real_backend.md", "On CPUs", "| policy | step | generation |",
        "simrl validate --policy verl --policy rlhfuse --policy rlhfless --output validation",
        "Median over steps of |simulated / real - 1|, raw and normalised by a probe of the machine's speed. On CPUs, a"
        " tiny model; GPUs have not been tried.",
    ),
    Figures(
        "Published training logs, each predicted from the others", "records.md", "What comes out",
        "| stage | limit | 13 logs |", "simrl validate --records experiments/data/records.csv",
        "Median absolute relative error of a stage's seconds, one vote a log, beside a model that is proportional to"
        " tokens. *Missed*: above the limit.",
    ),
    Figures(
        "The same by log", "records.md", "What comes out", "| log | generation | log-probs |",
        "simrl validate --records experiments/data/records.csv",
        "Signed median within each log, before and after a change of the model that the page tells.",
    ),
    Figures(
        "Later steps of a run, predicted from its first tenth", "traces.md", "simrl validate --trace",
        "| run | stage | steps | simrl |", "simrl validate --trace run.parquet",
        "Median absolute relative error, and Spearman's rank correlation over steps; [a] to [c] name the logs on that"
        " page. Advice is refused for all of them but the last.",
    ),
    Figures(
        "Weight syncs", "model.md", "Movement", "| model | GPUs | published |",
        "python -m pytest tests/test_network.py",
        "Seconds of a sync beside those of verl's documentation. No test on other data: two of them set the rate.",
    ),
    Figures(
        "Iteration times between the knots of the tables", "hardware.md", "Iteration times",
        "| | decode | prefill | mixed |",
        "python -m simrl.experiments.derive_iteration_times --check",
        "Median (range over models) and worst error of looking up, against the estimator that the tables are from.",
    ),
    Figures(
        "Iteration times without a table: the roofline", "hardware.md", "The roofline", "| | decode | prefill |",
        "python -m simrl.experiments.derive_iteration_times --roofline",
        "Median, worst (bias) against the tables, with the shipped constants.",
    ),
    Figures(
        "RLHFless's paper beside simrl", "reproduction.md", "In short", "| quantity | paper |",
        "make reproduce", "Not an error of the simulator alone: policy, batch and cluster are reconstructions, too.",
        optional=True,
    ),
)  # fmt: skip


def table(text: str, columns: str) -> str:
    """The one Markdown table in *text* whose first row begins with *columns*.

    Raises:
        ValueError: there is none, or more than one.
    """
    tables: list[str] = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    found = [each for each in tables if each.startswith(columns)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} tables begin with {columns!r}; exactly one must")
    return found[0]


def anchor(heading: str) -> str:
    """What links call a heading, on GitHub and on the site."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section(figures: Figures, docs: Path) -> str:
    """A table with its command and the page that it is from."""
    text = (docs / figures.page).read_text(encoding="utf-8")
    link = f"[{figures.page.removesuffix('.md')}: {figures.heading}]({figures.page}#{anchor(figures.heading)})"
    copied = table(text.partition(f"\n## {figures.heading}\n")[2].split("\n## ")[0], figures.columns)
    said = textwrap.fill(f"{figures.meaning} From {link}.", 120, break_on_hyphens=False)
    return f"## {figures.title}\n\n{said}\n\n    {figures.command}\n\n{copied}"


def page(docs: Path = DOCS) -> str:
    """The whole page."""
    there = [figures for figures in FIGURES if not figures.optional or (docs / figures.page).is_file()]
    head = """# Accuracy

How far simrl is off, where somebody has measured it. Written by `python -m simrl.experiments.accuracy_page`, which
copies the tables from the pages named. Each has the command that measures it; dates, causes and what is assumed are on
its own page.

**Not known**: no public record of RL training on L40S exists, and the real backend has not run on GPUs.
`simrl compare --robustness` says whether a ranking of policies holds over the ranges of what is assumed.
"""
    return "\n".join([head, *(section(figures, docs) for figures in there)])


def main() -> None:
    """Write the page."""
    with whole_file(DOCS / "accuracy.md") as hidden:
        hidden.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
