"""The oracle tells what the backend will generate, and copies for nothing."""

import copy

import pytest

from simrl.experiments.config import load_config
from simrl.experiments.run import simulate
from simrl.traces.lengths import load_workload
from simrl.traces.oracle import Oracle


@pytest.fixture
def oracle():
    return Oracle(load_workload("gsm8k"), seed=3, dataset_prompts=20, responses_per_prompt=4, max_tokens=300)


def test_lengths_are_those_of_the_length_model(oracle):
    drawn = load_workload("gsm8k").response_lengths(3, 1, 20, 4, 300)
    assert oracle.lengths(1, 7) == tuple(drawn.tokens[7].tolist())
    assert all(type(tokens) is int for tokens in oracle.lengths(1, 7))


def test_epochs_are_drawn_once_and_old_ones_forgotten(oracle):
    first = oracle.responses(0)
    assert oracle.responses(0) is first
    before = oracle.lengths(0, 0)
    for epoch in (1, 2, 3):
        oracle.responses(epoch)
    assert oracle.responses(0) is not first
    assert oracle.lengths(0, 0) == before


def test_copies_are_free(oracle):
    assert copy.deepcopy(oracle) is oracle


@pytest.mark.parametrize("prompt_id", [-1, 20, "7"])
def test_unknown_prompts_are_refused(oracle, prompt_id):
    with pytest.raises(ValueError, match="prompt_id"):
        oracle.lengths(0, prompt_id)


def test_the_backend_generates_what_the_oracle_says():
    config = load_config(nodes=1, sets=["job.prompts_per_step=8", "job.dataset_prompts=16", "job.model=qwen2.5-0.5b"])
    simulation = simulate(config)
    work = simulation.backend._work(3)
    assert work.epoch == 1
    for prompt_id, lengths in zip(work.prompt_ids, work.response_tokens, strict=True):
        assert tuple(lengths) == simulation.oracle.lengths(work.epoch, prompt_id)


def test_prompts_are_cut_at_the_jobs_longest():
    sets = ["job.prompts_per_step=8", "job.dataset_prompts=16", "job.max_prompt_tokens=60"]
    work = simulate(load_config(nodes=1, sets=sets)).backend._work(0)
    assert max(work.prompt_tokens) == 60
