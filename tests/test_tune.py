"""Tuning: the space by hand, the search on functions with known answers, and small real searches."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from statistics import mean, median
from typing import Literal

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from simrl.cli import main
from simrl.experiments import tune as tuning
from simrl.experiments.config import ConfigError, load_config
from simrl.experiments.run import run
from simrl.experiments.tune import Plan, Trial, figures_of, front_of, search, space_of
from simrl.policies.verl import Verl

SMALL = (
    "job.model=qwen2.5-0.5b", "job.prompts_per_step=8", "job.dataset_prompts=16", "job.max_response_tokens=128",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_fresh_seeds():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "FRESH_SEEDS", 2)
        yield


class Knobs(Verl):
    """A policy that has one parameter of each kind, and does as verl does."""

    class Params(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        x: float = Field(0.5, ge=0, le=1)
        inside: float = Field(2.0, gt=1, lt=3)
        count: int = Field(3, gt=1, lt=6)
        kind: Literal["a", "b", "oracle"] = "a"
        flag: bool = True
        maybe: float | None = Field(None, ge=0, le=1)
        endless: float = Field(1.0, ge=0)
        label: str = "me"
        known: Literal["oracle", "history"] = "history"

    def __init__(self, params: Params | None = None) -> None:
        super().__init__()


KNOBS = "test_tune:Knobs"


class Computed:
    """In place of `Runs`: figures by a formula of the policy's parameters and the seed."""

    def __init__(self, figures):
        self.figures, self.asked, self.computed = figures, [], 0

    def of(self, configs):
        self.asked += [(json.dumps(config.policy_params, sort_keys=True), config.seed) for config in configs]
        return [self.outcome(config) for config in configs]

    def outcome(self, config):
        found = self.figures(config.policy_params, config)
        if isinstance(found, str):
            return {"error": found}
        step_s, gpu_s = found
        epoch = {"steps": 2, "step_s": step_s, "gpu_s_per_step": gpu_s}
        return {"summary": {"steps": 4, "first_epoch": epoch, "later_epochs": epoch}}

    def tick(self, runs):
        pass

    def warnings(self):
        return ()


def knobs(**options):
    config = load_config(policy=KNOBS, nodes=1, steps=8, seed=5, sets=SMALL)
    return Plan(config, **{"check_workloads": "none", **options})


def small(**options):
    config = load_config(policy="rlhfless", nodes=1, steps=4, seed=5, sets=SMALL)
    return Plan(config, **options)


def tune(plan):
    """In this process, nothing written."""
    options = {one.name: getattr(plan, one.name) for one in fields(plan) if one.name != "base"}
    return tuning.tune(plan.base, jobs=1, **options)


# --- the space ---


def test_bounds_and_values_of_the_policy_are_the_space():
    dimensions, skipped = space_of(load_config(policy=KNOBS, sets=SMALL), {})
    assert {d.axis.path: str(d) for d in dimensions} == {
        "policy.x": "0 to 1", "policy.inside": "1.002 to 2.998", "policy.count": "2 to 5, whole numbers",
        "policy.kind": '"a", "b"', "policy.flag": "false, true", "policy.maybe": "0 to 1, or left out",
    }  # fmt: skip
    assert set(skipped) == {"policy.endless", "policy.label", "policy.known"}
    assert "oracle" in skipped["policy.known"]


def test_what_is_named_or_set_goes_before():
    config = load_config(policy=KNOBS, sets=(*SMALL, "policy.flag=false"))
    params = {"policy.x": "0.1:0.5:0.2", "policy.endless": "0:4", "engine.tensor_parallel": "1,2"}
    dimensions, skipped = space_of(config, params)
    found = {d.axis.path: str(d) for d in dimensions}
    assert [found[path] for path in params] == ["0.1, 0.3, 0.5", "0 to 4, whole numbers", "1, 2"]
    assert "policy.flag" not in found
    assert skipped["policy.flag"].startswith("set to False")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "speed"], "objective='speed' must be one of time, cost, pareto (--objective)"),
        (["--trials", "0"], "trials=0 must be from 1 to"),
        (["--seconds", "0"], "seconds=0 must be above 0"),
        (["--seeds", "0"], "seeds=0 must be from 1"),
        (["--trial-steps", "99"], "trial_steps=99 must be from 1 to job.steps=45"),
        (["--jobs", "0"], "jobs=0 must be at least 1"),
        (["--check-workloads", "chatt"], "check_workloads='chatt' is unknown; did you mean 'chat'?"),
        (["--param", "policy.lambda=0:2"], "policy.lambda=2 must be a number of at least 0 and at most 1 (--param"),
        (["--param", "policy.lambda=0.6:0.2"], "0.6 must be below 0.2"),
        (["--param", "policy.lamda=0.1:0.2"], "policy.lamda is unknown; did you mean 'policy.lambda'? (--param"),
        (["--param", "job.steps=1,2"], "job.steps cannot be tuned"),
        (["--policy", KNOBS, "--set", "policy.x=1", *(f"--set=policy.{p}" for p in (
            "inside=2.0", "count=3", "kind=a", "flag=true", "maybe=0.5"))], "has no parameter to search"),
        (["--policy", "test_tune:Plain"], "has no parameter to search (it has none): name one (--param)"),
        (["--resume"], "name it"),
        (["--set", "job.max_staleness=1", "--trial-steps", "3"], "must be job.steps=45 with job.max_staleness"),
    ],
)  # fmt: skip
def test_impossible_searches_are_refused_in_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--policy", "rlhfless", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, printed.err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])


class Plain(Verl):
    """Without parameters."""

    Params = None

    def __init__(self) -> None:
        super().__init__()


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'simrl\[tune\]'"):
        small()


# --- figures ---


def test_a_short_run_weighs_its_epochs_as_the_whole_job_does():
    """Of 45 steps 7 are the first epoch's."""
    first, later = ({"steps": 7, "step_s": s, "gpu_s_per_step": g} for s, g in ((10.0, 300.0), (20.0, 100.0)))
    short = {"steps": 14, "first_epoch": first, "later_epochs": later}
    expected = {"step_s": (7 * 10 + 38 * 20) / 45, "gpu_s_per_step": (7 * 300 + 38 * 100) / 45}
    assert figures_of(short, 45) == pytest.approx(expected)
    assert figures_of({**short, "later_epochs": None}, 45) == pytest.approx({"step_s": 10, "gpu_s_per_step": 300})
    whole = {**short, "step_s": {"mean": 15.0}, "gpu_s_per_step": 201.0}
    assert figures_of(whole, 14) == {"step_s": 15.0, "gpu_s_per_step": 201.0}


def test_a_whole_jobs_figures_are_those_of_its_epochs():
    """Nothing is held between steps: so the weighted epochs are the run's own means."""
    summary = run(small().base).summary
    whole = figures_of(summary, 4)
    assert {m: (summary["first_epoch"][m] + summary["later_epochs"][m]) / 2 for m in whole} == pytest.approx(whole)


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points)
def test_a_front_is_what_nothing_dominates(pairs):
    trials = [Trial(i, {}, figures={"step_s": [a], "gpu_s_per_step": [b]}) for i, (a, b) in enumerate(pairs)]
    nothing = {"step_s": [-1.0], "gpu_s_per_step": [-1.0]}
    trials += [Trial(len(pairs), {}, "failed", nothing), Trial(len(pairs), {}, "pruned", nothing)]
    found = [t.number for t in front_of(trials, ("step_s", "gpu_s_per_step"))]
    beaten = {
        i for i, p in enumerate(pairs) for j, q in enumerate(pairs)
        if (q[0] <= p[0] and q[1] <= p[1] and q != p) or (q == p and j < i)
    }  # fmt: skip
    assert sorted(found) == [i for i in range(len(pairs)) if i not in beaten]
    assert found == sorted(found, key=lambda number: pairs[number]), "the fastest first"
    assert pairs[front_of(trials, ("gpu_s_per_step",))[0].number][1] == min(b for _, b in pairs)


# --- the search ---


def bowl(params, config):
    """Cheapest at x = 0.3; time only falls with x. The seeds' noise is the same for all."""
    x = params.get("x", 0.5)
    return 20 - 10 * x + config.seed, 100 + 400 * (x - 0.3) ** 2 + 10 * config.seed


def test_the_search_begins_with_the_defaults_and_comes_near_the_optimum():
    plan = knobs(trials=60, seeds=2)
    _, trials = search(plan, Computed(bowl))
    assert trials[0].values == {
        "policy.x": 0.5, "policy.inside": 2.0, "policy.count": 3, "policy.kind": "a", "policy.flag": True,
        "policy.maybe": None,
    }  # fmt: skip
    (best,) = front_of(trials, plan.metrics)
    assert abs(best.values["policy.x"] - 0.3) < 0.1
    assert {type(t.values["policy.maybe"]) for t in trials} == {type(None), float}
    assert {t.values["policy.count"] for t in trials} == {2, 3, 4, 5}


def test_defaults_outside_the_ranges_are_told(monkeypatch):
    monkeypatch.setattr(tuning, "Runs", lambda *_: Computed(bowl))
    found = tune(knobs(trials=3, objective="pareto", params={"policy.x": "0.6:0.9"}))
    assert all(0.6 <= t.values["policy.x"] <= 0.9 for t in found.trials)
    assert "outside the searched ranges" in found.standing()
    assert found.defaults.figures["step_s"] == [20, 21, 22]  # with seeds 5, 6, 7
    pruned = Trial(9, {}, "pruned", {"step_s": [10.0], "gpu_s_per_step": [1.0]})
    assert found.gain(pruned, "step_s") == 0.5, "on the seeds that it has run"


def test_all_trials_have_the_same_seeds_and_fresh_ones_are_kept_for_the_end(monkeypatch):
    runs = Computed(bowl)
    monkeypatch.setattr(tuning, "Runs", lambda *_: runs)
    found = tune(knobs(trials=12, seeds=3, objective="pareto"))
    assert {seed for _, seed in runs.asked} == {5, 6, 7, *found.plan.fresh_seeds}
    assert all(len(t.figures["step_s"]) == 3 for t in found.trials)
    order = [seed >= tuning.FRESH_OFFSET for _, seed in runs.asked]
    assert order == sorted(order)
    assert len(set(found.plan.fresh_seeds)) == tuning.FRESH_SEEDS


def test_pruned_are_those_that_are_worse_than_the_median_of_earlier_batches():
    def uneven(params, config):  # settings that are good on one seed and bad on another
        step_s, gpu_s = bowl(params, config)
        return step_s, gpu_s + 200 * (997 * params.get("x", 0.5) * config.seed % 1)

    plan = knobs(trials=32, seeds=3)
    runs = Computed(uneven)
    _, trials = search(plan, runs)
    pruned = [t for t in trials if t.state == "pruned"]
    assert {len(t.figures["step_s"]) for t in pruned} == {1, 2}
    assert len(runs.asked) == sum(len(t.figures["step_s"]) for t in trials) < 32 * 3
    for trial in trials:
        earlier = [t for t in trials if t.number < trial.number // 8 * 8 and t.state == "complete"]
        own = trial.figures["gpu_s_per_step"]
        running = [mean(own[: k + 1]) for k in range(min(len(own), 2))]
        limits = [median(mean(t.figures["gpu_s_per_step"][: k + 1]) for t in earlier) if earlier else 0 for k in (0, 1)]
        worse = [running[k] > limits[k] for k in range(len(running))] if len(earlier) >= 5 else [False]
        assert (trial.state == "pruned") == worse[-1], trial.number
        assert not any(worse[:-1])


@pytest.mark.parametrize("objective", ["cost", "pareto"])
def test_more_trials_continue_the_same_search(objective):
    few, many = (search(knobs(trials=n, seeds=1, objective=objective), Computed(bowl))[1] for n in (21, 30))
    assert [t.values for t in many[:21]] == [t.values for t in few]
    other = knobs(trials=21, seeds=1, objective=objective)
    other = search(replace(other, base=other.base.with_seed(6)), Computed(bowl))[1]
    assert [t.values for t in other[1:]] != [t.values for t in few[1:]]


def test_a_budget_of_seconds_ends_a_search_after_a_batch():
    assert len(search(knobs(seconds=1e-9), Computed(bowl))[1]) == tuning.BATCH


def test_settings_that_fail_are_left_behind(monkeypatch):
    def fragile(params, config):
        return "KeyError: a bug" if params.get("flag") is False else bowl(params, config)

    monkeypatch.setattr(tuning, "Runs", lambda *_: Computed(fragile))
    found = tune(knobs(trials=12, seeds=1))
    assert {t.state for t in found.trials if t.values["policy.flag"] is False} == {"failed"}
    assert {t.state for t in found.trials if t.values["policy.flag"]} == {"complete"}
    assert any("failed: KeyError: a bug" in note for note in found.notes)
    monkeypatch.setattr(tuning, "Runs", lambda *_: Computed(lambda *_: "KeyError: always"))
    with pytest.raises(ConfigError, match="the defaults cannot run: KeyError: always"):
        tune(knobs(trials=12))


def test_importance_finds_the_parameter_that_matters():
    def figures(params, config):
        return 10 * params.get("x", 0.5), 100 + 50 * params.get("inside", 2.0)

    study, _ = search(knobs(trials=40, seeds=1, objective="pareto"), Computed(figures))
    with pytest.warns(UserWarning, match="low `target` values"):
        shares = tuning.importance_of(study, ("step_s", "gpu_s_per_step"))
    assert [max(share, key=share.get) for share in shares.values()] == ["policy.x", "policy.inside"]
    assert sum(shares["step_s"].values()) == pytest.approx(1)
    few, _ = search(knobs(trials=19, seeds=1), Computed(bowl))
    assert tuning.importance_of(few, ("gpu_s_per_step",)) is None


# --- the comparison ---


def test_over_fitting_shows(monkeypatch):
    """A gain that only the search's seeds have."""

    def fitted(params, config):
        gain = params.get("x", 0.5) if config.seed < tuning.FRESH_OFFSET else 0.0
        return 10.0, 100 + config.seed % 7 - 50 * gain

    monkeypatch.setattr(tuning, "Runs", lambda *_: Computed(fitted))
    found = tune(knobs(trials=30))
    assert found.to_dict()["gain_in_search"]["tuned"]["gpu_s_per_step"] > 0.2
    (row,) = (row for row in found.comparison if row["metric"] == "gpu_s_per_step")
    assert (row["gain"], row["paired"]["verdict"]) == (0.0, "no difference shown")


def test_gains_are_those_of_single_runs_on_fresh_seeds():
    found = tune(small(trials=4, seeds=1, check_workloads="chat"))
    assert [(row["workload"], row["metric"]) for row in found.comparison] == [
        (w, m) for w in ("gsm8k", "chat") for m in ("step_s", "gpu_s_per_step")
    ]
    before, after = found.plan.base.with_values({"job.workload": "chat"}), found.plan.config(found.best.values)
    after = after.with_values({"job.workload": "chat"})
    figures = [
        mean(run(config.with_seed(1_000_005 + i)).summary["gpu_s_per_step"] for i in range(2))
        for config in (before, after)
    ]
    row = found.comparison[3]
    assert (row["defaults"], row["tuned"]) == pytest.approx(figures)
    assert row["gain"] == pytest.approx(1 - figures[1] / figures[0])
    assert row["gain_ci95"][0] <= row["gain"] <= row["gain_ci95"][1]
    ps = sorted(r["paired"]["p"] for r in found.comparison)
    assert min(r["paired"]["p_holm"] for r in found.comparison) == pytest.approx(min(1, 4 * ps[0])), "one family"


# --- what is written, and going on ---

COMMAND = [
    "tune", "--policy", "rlhfless", "--nodes=1", "--steps=4", "--seed=5", *(f"--set={one}" for one in SMALL),
    "--trials=20", "--seeds=1", "--check-workloads=none",
]  # fmt: skip


def outputs(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tune") / "out"
    assert main([*COMMAND, "--objective=pareto", "--jobs=1", "--output", str(directory)]) == 0
    return directory


def test_a_killed_search_ends_as_one_that_was_not_on_any_number_of_processes(tuned, tmp_path):
    killed = tmp_path / "killed"
    command = [*COMMAND, "--objective=pareto", "--output", str(killed)]
    with subprocess.Popen(
        [sys.executable, "-m", "simrl", *command, "--jobs=1"], env=os.environ, stdout=subprocess.DEVNULL
    ) as process:
        end = time.monotonic() + 60
        while len(list(killed.glob("runs/*.json"))) < 10:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "summary.json").exists()
    (killed / "runs/.half.json.1.tmp").write_text("{")
    done = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*.json")}
    assert main([*command, "--resume", "--jobs=2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished runs are not done again"
    both = [outputs(directory) for directory in (killed, tuned)]
    assert both[0].keys() == both[1].keys()
    # The journal has times and names of processes, runs have the host's times.
    different = {name for name in both[0] if both[0][name] != both[1][name]}
    assert {name for name in different if not name.startswith(("runs/", "journal.log"))} == set()


def test_the_files_of_a_search(tuned):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    summary = json.loads((tuned / "summary.json").read_text())
    frame = pd.read_parquet(tuned / "trials.parquet").set_index("trial")
    assert (len(frame), summary["trials"]["complete"]) == (20, 20)
    front = [trial["trial"] for trial in summary["front"]]
    assert pd.read_csv(tuned / "front.csv")["trial"].tolist() == front
    assert sorted(p.name for p in tuned.glob("front/*")) == sorted(f"trial-{n}.toml" for n in front)
    assert (tuned / "front.png").read_bytes().startswith(b"\x89PNG")
    best = frame.loc[summary["best"]["trial"]]
    products = frame.loc[front, "step_s"] * frame.loc[front, "gpu_s_per_step"]
    assert best["step_s"] * best["gpu_s_per_step"] == products.min()
    again = run(load_config(config=tuned / "best.toml", sets=[*SMALL, "job.steps=4", "cluster.nodes=1"], seed=5))
    assert again.summary["gpu_s_per_step"] == pytest.approx(best["gpu_s_per_step"])
    study = optuna.load_study(
        study_name="simrl", storage=JournalStorage(JournalFileBackend(str(tuned / "journal.log")))
    )
    assert [t.values for t in study.trials] == frame[["step_s", "gpu_s_per_step"]].to_numpy().tolist()


def test_a_single_objective_prints_json_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "--trials=9", "--seeds=2", "--json", "--jobs=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["gpu_s_per_step"] <= found["defaults"]["gpu_s_per_step"]
    assert found["runs_saved_by_pruning"] == found["trials"]["pruned"]  # of two seeds the first one decides
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["another search", "another version", "no search", "without --resume"])
def test_directories_of_others_are_left_alone(tuned, tmp_path, capsys, monkeypatch, there):
    directory = tmp_path / "out"
    shutil.copytree(tuned, directory)
    if there == "no search":
        (directory / "tune.json").unlink()
    if there == "another version":
        monkeypatch.setattr(tuning, "code_version", lambda: "another")
    before = outputs(directory)
    objective = "cost" if there == "another search" else "pareto"
    resume = [] if there == "without --resume" else ["--resume"]
    assert main([*COMMAND, "--objective", objective, *resume, "--jobs=1", "--output", str(directory)]) == 2
    message = {
        "another search": "is of another search: its objective differ",
        "another version": "its code_version differ",
        "no search": "is not the directory of a search",
        "without --resume": "exists and is not empty",
    }[there]
    assert message in capsys.readouterr().err
    assert outputs(directory) == before
