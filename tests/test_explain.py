"""Waterfalls: terms by hand, sums that are the difference, and what a technique's switch really switches off."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.cli import main
from simrl.experiments.compare import compare
from simrl.experiments.config import ConfigError, load_config
from simrl.experiments.explain import BASE, METRICS, REMAINDER, SWITCHES, explain, explanation, variants_of
from simrl.policies.rlhfless import RLHFless
from simrl.traces.summary import HOLDING, NO_STAGE, STAGES

SMALL = (
    "job.model=qwen2.5-0.5b",
    "job.prompts_per_step=16",
    "job.dataset_prompts=32",
    "job.max_response_tokens=256",
)


def summary(step_s, gpu_s, learning_s=1.0):
    """Two steps; what is not learning is generation, busy."""
    stages = dict.fromkeys((*STAGES, NO_STAGE), 0.0) | {"learning": 8.0, "generation": 2 * gpu_s - 8.0}
    return {
        "step_s": {"mean": step_s}, "gpu_s_per_step": gpu_s, "steps": 2, **{f"{stage}_s": 0.0 for stage in STAGES},
        "learning_s": learning_s, "gpu_s_by": {"stage": stages, "state": {"busy": 2 * gpu_s, "idle": 0.0, "cold": 0.0}},
    }  # fmt: skip


def variants(figures):
    return {label: [summary(step_s, 10 * step_s)] for label, step_s in figures.items()}


def three(none, alone, without, whole):
    """Figures with three techniques: with each *alone*, and *without* each."""
    return {
        "all": whole, "none": none,
        **{f"+{name}": value for name, value in zip("abc", alone, strict=True)},
        **{f"-{name}": value for name, value in zip("abc", without, strict=True)},
    }  # fmt: skip


def total(part, metric):
    return sum(term.get(metric, np.zeros(1)) for term in part.values())


def test_terms_by_hand():
    figures = three(10.0, (9.0, 8.0, 10.0), (7.0, 8.0, 6.0), 4.0)
    found = explanation("x", "v", variants(figures), [summary(12.0, 100.0)])
    terms = {name: term["step_s"][0] for name, term in found.by_mechanism.items()}
    # First on, last on: a (9 - 10, 4 - 7), b (8 - 10, 4 - 8), c (10 - 10, 4 - 6).
    assert terms == {BASE: -2.0, "a": -2.0, "b": -3.0, "c": -1.0, REMAINDER: 0.0}
    assert found.difference["step_s"] == -8.0
    # 40 of this policy less 100 of the baseline; without techniques it takes 100 as well.
    assert found.by_mechanism[BASE]["gpu_s_per_step"] == 0.0
    assert found.by_mechanism["b"]["gpu_s_per_step"] == -30.0
    assert found.difference["gpu_s_per_step"] == -60.0


def test_what_techniques_do_only_together_is_their_interaction():
    figures = three(10.0, (9.0, 9.0, 9.0), (8.0, 8.0, 8.0), 4.0)
    terms = explanation("x", "v", variants(figures), [summary(10.0, 100.0)]).by_mechanism
    assert [terms[name]["step_s"][0] for name in "abc"] == [-2.5] * 3
    assert terms[REMAINDER]["step_s"] == 1.5


def test_stages_and_states_by_hand():
    found = explanation("x", "v", {"all": [summary(5.0, 50.0, 2.0)]}, [summary(7.0, 90.0, 1.5)])
    assert found.by_mechanism == {}
    assert found.by_stage["learning"]["step_s"] == 0.5
    assert found.by_stage["overlap"]["step_s"] == (5.0 - 2.0) - (7.0 - 1.5)
    assert found.by_stage["generation"]["gpu_s_per_step"] == -40.0  # of each of the two steps
    assert found.by_state["busy"]["gpu_s_per_step"] == -40.0


FIGURES = st.floats(1.0, 1e4)


@settings(max_examples=50, deadline=None)
@given(FIGURES, st.tuples(*[FIGURES] * 3), st.tuples(*[FIGURES] * 3), FIGURES, FIGURES)
def test_terms_add_up_whatever_the_figures(none, alone, without, whole, baseline):
    found = explanation("x", "v", variants(three(none, alone, without, whole)), [summary(baseline, 3 * baseline)])
    for metric in METRICS:
        assert total(found.by_mechanism, metric) == pytest.approx(found.difference[metric], abs=1e-9 * 1e5)


@pytest.fixture(scope="module")
def small():
    return load_config(nodes=1, steps=2, seed=11, sets=SMALL, policies=["verl", "rlhfuse", "rlhfless"])


@pytest.fixture(scope="module")
def explained(small):
    return explain(small, ["verl", "rlhfuse", "rlhfless"], "verl", seeds=2, workers=1)


def test_parts_add_up_to_the_difference_of_the_comparison(small, explained):
    rows = {row["policy"]: row for row in compare(small, ["verl", "rlhfuse", "rlhfless"], seeds=2).rows}
    assert [found.policy for found in explained] == ["rlhfuse", "rlhfless"]
    for found in explained:
        for metric in METRICS:
            expected = rows[found.policy][metric] - rows["verl"][metric]
            assert found.difference[metric].mean() == pytest.approx(expected, abs=1e-9)
            for part in (found.by_mechanism, found.by_stage):
                assert total(part, metric) == pytest.approx(found.difference[metric], abs=1e-9)
        assert set(found.by_state) == set(HOLDING)
        assert total(found.by_state, "gpu_s_per_step") == pytest.approx(found.difference["gpu_s_per_step"], abs=1e-9)
    rlhfless = explained[1]
    assert any(abs(rlhfless.by_mechanism[name]["gpu_s_per_step"]).max() > 1 for name in SWITCHES[RLHFless])


def test_swapped_policies_swap_the_signs(small, explained):
    (swapped,) = explain(small, ["verl"], "rlhfuse", seeds=2, workers=1)
    for name, term in explained[0].by_stage.items():
        for metric in METRICS:
            assert swapped.by_stage[name][metric] == pytest.approx(-term[metric], abs=1e-9)


def test_without_fusion_rlhfuse_is_verl(explained):
    base = explained[0].by_mechanism[BASE]
    assert [abs(base[metric]).max() for metric in METRICS] == [pytest.approx(0, abs=1e-9)] * 2
    assert abs(explained[0].difference["gpu_s_per_step"]).max() > 1e-3  # with it it is not


def test_every_switch_of_rlhfless_is_explained():
    flags = {info.alias or name for name, info in RLHFless.Params.model_fields.items() if info.annotation is bool}
    assert {key for key, off in SWITCHES[RLHFless].values() if off is False} == flags


def test_what_the_user_switched_off_is_no_mechanism(small):
    config = small.with_policy("rlhfless").with_values({"policy.locality": False})
    labels = variants_of(config)
    assert "-prewarming" in labels
    assert "-locality" not in labels
    assert not any(variant.policy_params["locality"] for variant in labels.values())
    assert labels["+prewarming"].policy_params.get("prewarm", True)
    assert not labels["-prewarming"].policy_params["prewarm"]


def test_a_baseline_alone_explains_nothing(small):
    with pytest.raises(ConfigError, match="nothing to explain"):
        explain(small, ["verl"], "verl")


def test_the_command_prints_and_writes_the_same(tmp_path, capsys):
    sets = [part for assignment in SMALL for part in ("--set", assignment)]
    out = tmp_path / "out"
    arguments = ["compare", "--policies", "verl,rlhfuse", "--explain", "--nodes", "1", "--steps", "1", *sets]
    assert main([*arguments, "--json", "--output", str(out)]) == 0
    (printed,) = json.loads(capsys.readouterr().out)["explain"]
    assert json.loads((out / "explain.json").read_text()) == [printed]
    assert (printed["policy"], printed["baseline"]) == ("rlhfuse", "verl")
    assert printed["by_mechanism"]["inter-stage fusion"]["step_s_ci95"] is None  # one seed
