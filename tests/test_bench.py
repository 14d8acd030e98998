"""The benchmark runs, and its page has every row; how fast anything is, is not tested."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from simrl.experiments import bench

SECTIONS = ("Engine alone", "Whole simulator", "Growth", "Beside sched-sim 0.2.1", "Quoted")


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("bench") / "performance.md"
    bench.main(["--quick", "--output", str(path)])
    _, *parts = path.read_text(encoding="utf-8").split("\n## ")
    return {title: body for title, _, body in (part.partition("\n") for part in parts)}


def rows(section: str) -> list[list[str]]:
    """Cells of the table in a section, without its two lines of header."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1, "a table's rows have equally many cells"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_has_every_section_and_nothing_is_left_to_fill_in(sections: dict[str, str]) -> None:
    assert tuple(sections) == SECTIONS
    assert not re.search(r"\{\w+\}|nan", "".join(sections.values()))


def test_every_size_and_job_has_a_row_whose_responses_are_all_complete(sections: dict[str, str]) -> None:
    sizes = bench.QUICK
    shared = [str(requests) for requests, _ in sizes.shared]
    growing = [str(requests) for requests, _ in sizes.growing]
    spread = [growing[-2]] * len(growing)
    assert [row[1] for row in rows(sections["Engine alone"])] == shared
    assert [row[1] for row in rows(sections["Whole simulator"])] == [*shared, *["128"] * 3]
    assert [row[1] for row in rows(sections["Growth"])] == [*growing, *growing, *spread]


def test_every_row_names_its_command_and_has_figures(sections: dict[str, str]) -> None:
    for title in ("Engine alone", "Whole simulator", "Growth"):
        for _, _, wall_s, per_s, _, peak_mb, command in rows(sections[title]):
            assert float(wall_s) > 0
            assert int(per_s.replace(",", "")) > 0
            assert 10 < int(peak_mb.replace(",", "")) < 10_000
            assert re.fullmatch(r"`python -m simrl\S* .+`", command)


def test_the_simulator_runs_under_three_policies(sections: dict[str, str]) -> None:
    jobs = [row[-1] for row in rows(sections["Whole simulator"])[-3:]]
    policies = [re.findall(r"--policy (\S+)", job)[0] for job in jobs]
    assert policies == ["verl", "simrl.experiments.bench:EveryCompletion", "rlhfless"]


def test_quick_says_that_sched_sim_was_left_out(sections: dict[str, str]) -> None:
    assert "Not measured: `--quick`." in sections["Beside sched-sim 0.2.1"]


def test_without_sched_sim_its_section_says_so(tmp_path: Path) -> None:
    assert bench.peer_section([(8, 1)], 1, tmp_path / "python").startswith("Not measured: sched-sim is not installed")


def test_missing_responses_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_command", lambda _: {"responses": 7, "wall_s": 1.0, "peak_mb": 1.0})
    with pytest.raises(RuntimeError, match="7 of 8 responses"):
        bench.measure([bench.step_job(8, 1)], 1)


def test_repetitions_go_round_all_jobs_and_medians_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_command(command: list[str]) -> dict[str, float]:
        ran.append(command[0])
        return {"responses": 600, "wall_s": float(len(ran)), "peak_mb": 10.0}

    monkeypatch.setattr(bench, "run_command", run_command)
    rows = bench.measure([bench.Job("first", "a"), bench.Job("second", "b")], 3)
    assert ran == ["a", "b", "a", "b", "a", "b"]
    assert rows[0].cells == ("first", "600", "3", "200", "-", "10", "`python -m a`")
    assert rows[1].points == [(600, 2.0), (600, 4.0), (600, 6.0)]


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with 2"):
        bench.run_command(["simrl", "run", "--policy", "nobody"])


def test_shares_hold_every_request_once_and_whole_groups() -> None:
    lengths = bench.draw_lengths(10)
    parts = bench.shares(lengths, 2)
    assert [request for part in parts for request in part] == list(lengths)
    assert {request[0] for request in parts[0]}.isdisjoint(request[0] for request in parts[1])
    assert all(parts)


@pytest.mark.parametrize(
    ("power", "verdict"), [(0.5, "below it"), (1.0, "below it"), (1.5, "above it")], ids=["root", "linear", "above"]
)
def test_growth_is_told_from_n_log_n(power: float, verdict: str) -> None:
    noise = (0.99, 1.0, 1.01)
    points = [(n, factor * n**power) for n in (1_000, 10_000, 100_000) for factor in noise]
    over_all, last = bench.exponents(points).split("; from")
    assert f"n^{power:.2f}" in over_all
    assert verdict in over_all
    assert verdict in last


def test_growth_as_n_log_n_is_not_told_apart_from_it() -> None:
    points = [(n, f * n * math.log(n)) for n in (1_000, 10_000, 100_000) for f in (0.9, 1.0, 1.1)]
    assert bench.exponents(points).count("within noise") == 2


def test_the_engine_needs_nothing_that_a_peers_environment_lacks() -> None:
    """`peer` runs in sched-sim's environment, where only numpy and pydantic are sure to be."""
    missing = "import sys; sys.modules.update(dict.fromkeys(('simpy', 'pandas', 'scipy', 'typer', 'pyarrow')));"
    command = [sys.executable, "-c", f"{missing} import simrl.simulator.engine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-500:]
