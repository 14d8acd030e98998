"""A reproduction at a small size, end to end; its arithmetic by hand; and that nothing half-written is left."""

import dataclasses
import itertools
import math
import os
import re
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from simrl.cli import main
from simrl.experiments import reproduce, reproduction_page
from simrl.experiments.compare import compare
from simrl.experiments.pool import map_on_cores
from simrl.experiments.reproduce import (
    BEST,
    CAUSES,
    EPOCHS,
    FULL,
    HEADLINE,
    POLICIES,
    QUICK,
    RLHFLESS,
    SIMULATED,
    SWEEPS,
    VERL,
    Runs,
    Sizes,
    standing,
    sweep,
)
from simrl.policies.rlhfless import RLHFless

TINY = Sizes(
    seeds=2, points=1, bound_steps=1, every=9, steps_per_epoch=2, headline=(BEST,), causes=CAUSES[:2], name="tiny",
    sets=("job.model=qwen2.5-0.5b", "cluster.nodes=2", "job.prompts_per_step=8", "job.max_response_tokens=128"),
)  # fmt: skip


def summary(policy, later, first, paper, tokens=5):
    epochs = {
        name: dict(zip(("step_s", "gpu_s_per_step"), values, strict=True))
        for name, values in (("later_epochs", later), ("first_epoch", first))
    }
    same_work = {"responses": 1, "response_tokens": tokens, "prompt_tokens": 3}
    return {"policy": policy, "seed": 0, "gpu_s_paper": paper, **epochs, **same_work}


def test_a_standing_by_hand():
    ours = [summary("x", (4.0, 30.0), (10.0, 90.0), 40.0), summary("x", (5.0, 40.0), (20.0, 50.0), 60.0)]
    theirs = [summary("v", (8.0, 40.0), (5.0, 100.0), 50.0), summary("v", (5.0, 50.0), (40.0, 40.0), 120.0)]
    found = standing(ours, theirs)
    assert found.speedup.tolist() == [2.0, 1.0]
    assert found.saved == pytest.approx(np.array([0.25, 0.2]))
    assert found.saved_paper == pytest.approx(np.array([0.2, 0.5]))
    assert found.first_speedup.tolist() == [0.5, 2.0]
    assert found.first_saved == pytest.approx(np.array([0.1, -0.25]))


def test_other_work_is_no_comparison():
    figures = ((1.0, 1.0), (1.0, 1.0), 1.0)
    with pytest.raises(AssertionError, match="response_tokens differ"):
        standing([summary("x", *figures)], [summary("v", *figures, tokens=6)])


def test_the_full_size_is_what_the_paper_ran():
    models, workloads, algorithms = ("3b", "7b"), ("gsm8k", "gpqa", "livecodebench"), ("ppo", "grpo")
    jobs = [Runs(FULL).config(case, VERL).job for case in HEADLINE]
    cells = {(job.model.removeprefix("qwen2.5-"), job.workload, job.algorithm) for job in jobs}
    assert cells == set(itertools.product(models, workloads, algorithms))
    assert {(job.responses_per_prompt, job.max_prompt_tokens, job.max_response_tokens) for job in jobs} == {
        (3, 1024, 2048)
    }
    assert FULL.seeds >= 10
    for size, case in itertools.product((FULL, QUICK), (BEST, SIMULATED)):
        job = Runs(size).config(case, VERL).job
        assert job.steps * job.prompts_per_step == EPOCHS * job.dataset_prompts
        assert EPOCHS >= 3


def test_every_case_and_value_is_another_configuration():
    runs = Runs(QUICK)
    causes = [runs.config(case, RLHFLESS).model_dump_json() for case in CAUSES]
    assert len(set(causes)) == len(CAUSES)
    for title, (key, values) in SWEEPS.items():
        known = {info.alias or name for name, info in RLHFless.Params.model_fields.items()}
        assert key in known
        configs = [runs.config(BEST, variant).policy_params[key] for variant in sweep(title, 1)]
        assert configs == list(values)
        shown = [variant.name for variant in sweep(title, 3)]
        assert (shown[0], shown[-1]) == (f"{values[0]:g}", f"{values[-1]:g}")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of `simrl reproduce rlhfless --quick` at a smaller size, and the runs behind it."""
    directory = tmp_path_factory.mktemp("reproduction") / "out"
    kept = []

    class Kept(Runs):
        def __init__(self, sizes, workers):
            super().__init__(sizes, 1)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "QUICK", TINY)
        patch.setattr(reproduce, "Runs", Kept)
        assert main(["reproduce", "rlhfless", "--quick", "-o", str(directory)]) == 0
    return directory, (directory / "reproduction.md").read_text(encoding="utf-8"), kept[0]


def row_of(page, *cells):
    """The rest of the only row of the page that begins with *cells*."""
    start = "| " + " | ".join(cells) + " | "
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return line.removeprefix(start).removesuffix(" |").split(" | ")


def section(page, letter):
    return page.split(f"## ({letter})")[1].split("\n## ")[0]


def leading(cell):
    return float(re.match(r"[-+\d.,]+", cell)[0].replace(",", ""))


def test_the_page_says_what_it_is(written):
    _, page, _ = written
    assert "`simrl reproduce rlhfless --quick` with simrl " in page
    assert re.search(r"at commit (\w{7,}|unknown)", page)
    assert "seeds 0 to 1" in " ".join(page.split())
    assert "**This is the tiny size" in page
    assert "nan" not in page


def test_pictures_are_few_and_small(written):
    directory, page, _ = written
    pictures = sorted(directory.glob("reproduction/*.png"))
    assert len(pictures) == 6
    assert all(picture.stat().st_size <= 80_000 for picture in pictures)
    assert sorted(re.findall(r"\((reproduction/\w+\.png)\)", page)) == [
        str(picture.relative_to(directory)) for picture in pictures
    ]


def test_the_page_has_the_figures_of_a_comparison(written):
    _, page, runs = written
    names = [variant.policy for variant in POLICIES]
    rows = {row["policy"]: row["later_epochs"] for row in compare(runs.config(BEST, VERL), names, seeds=2).rows}
    for name in names:
        step_s, speedup, gpu_s, saved, *_ = row_of(section(page, "a"), BEST.name, f"`{name}`")
        low, high = rows[name]["gpu_s_reduction_ci95"]
        assert step_s == f"{rows[name]['step_s']:.1f}"
        assert speedup.startswith(f"{rows[name]['speedup']:.3f} (")
        assert gpu_s == f"{rows[name]['gpu_s_per_step']:,.0f}"
        assert saved == f"{rows[name]['gpu_s_reduction']:z.1%} ({low:z.1%} to {high:z.1%})"
    # Against rlhfuse: the ratio of both, and not its inverse.
    versus = compare(runs.config(BEST, VERL), ["rlhfuse", "rlhfless"], seeds=2, baseline="rlhfuse").rows[1]
    assert leading(row_of(section(page, "d"), BEST.name)[1]) == pytest.approx(
        100 * versus["later_epochs"]["gpu_s_reduction"], abs=0.06
    )


def test_the_papers_figures_stand_beside_ours(written):
    _, page, _ = written
    paper, how_sure, ours, difference = row_of(page, "speed-up, best case")
    assert (paper, how_sure) == ("1.350x", "abstract")
    assert leading(difference) == pytest.approx(leading(ours) - 1.35, abs=0.002)
    assert row_of(page, "GPU-seconds saved, best case")[0] == "44.8%"


def test_the_waterfall_on_the_page_adds_up(written):
    _, page, _ = written
    table = page.split("| mechanism | s a step | GPU-s a step |")[1].split("\n\n")[0].splitlines()[2:]
    terms = np.array([[leading(cell) for cell in line.split(" | ")[1:]] for line in table])
    assert len(terms) == 1 + 6 + 1 + 1
    assert terms[:-1].sum(axis=0) == pytest.approx(terms[-1], abs=0.05)  # nine roundings to 0.01


def test_limits_hold_for_the_policies(written):
    """No policy beats the bound: its step and GPU-seconds are multiples of at least 1."""
    _, page, _ = written
    for variant in POLICIES:
        assert all(leading(cell) >= 1 for cell in row_of(section(page, "f"), f"`{variant.name}`")[2:])


def test_what_cannot_run_says_why(written, tmp_path):
    _, _, runs = written
    refused = {"impossible": "the model does not fit"}
    case = runs.sizes.causes[1]
    broken = Runs(runs.sizes)
    broken._configs, broken.answers = runs._configs, dict(runs.answers)
    for seed in range(runs.sizes.seeds):
        broken.answers["run", reproduce.key_of(broken.seeded(case, RLHFLESS, seed))] = refused
    page = reproduction_page.Page(broken, tmp_path).causes()
    assert row_of(page, case.name)[0] == "cannot run: the model does not fit"


def test_an_error_leaves_nothing(tmp_path, monkeypatch):
    def fails(runs, header, place):
        (place / "reproduction.md").write_text("half")
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Runs, "do", lambda self, progress=None: None)
    monkeypatch.setattr(reproduction_page, "write_page", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        reproduce.reproduce("rlhfless", tmp_path / "out", dataclasses.replace(TINY, seeds=1))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_paper_is_refused(tmp_path, capsys):
    assert main(["reproduce", "rlhffull", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "simrl: paper='rlhffull' must be one of rlhfless\n"
    assert list(tmp_path.iterdir()) == []


def test_answers_keep_the_order_of_jobs():
    done = []
    assert map_on_cores(math.sqrt, [4.0, 9.0, 16.0], workers=2, progress=done.append) == [2.0, 3.0, 4.0]
    assert done == [33, 66, 100]


def test_a_process_that_dies_ends_the_rest():
    with pytest.raises(BrokenProcessPool):
        map_on_cores(os._exit, [1, 1], workers=2)
