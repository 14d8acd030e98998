"""Real training: sampled responses, a rule's rewards, real updates; the model gets better, whoever schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import pytest
from test_real_backend import Guess

from simrl.policies.contract import Policy, drive
from simrl.policies.rlhfless import RLHFless
from simrl.policies.verl import Verl
from simrl.real_backend.actors import HostPool
from simrl.real_backend.backend import RealBackend, Sampled, work_of_task
from simrl.real_backend.engine import EngineSettings
from simrl.real_backend.learner_settings import LearnerSettings
from simrl.real_backend.rewards import ResidueTask
from simrl.real_backend.tiny_model import LEARNS, write_tiny_model
from simrl.traces.job import Engine, Job
from simrl.traces.records import Recorder

STEPS, SEEDS, SLOTS = 8, 3, 64
TASK = ResidueTask(prompts_per_step=16)
STOPS = tuple(range(100, 112))  # as many of each residue: responses end at different lengths, and some then move
JOB = Job(
    model="qwen2.5-0.5b", prompts_per_step=16, responses_per_prompt=8, steps=STEPS, dataset_prompts=16,
    mini_batch_prompts=4, max_prompt_tokens=8, max_response_tokens=20,
)  # fmt: skip
POLICIES: dict[str, Policy] = {"verl": Verl(), "rlhfless": RLHFless(RLHFless.Params(cut_threshold=0.5))}


class Roomy(Guess):
    """Latency stays flat as far as there are slots: an engine takes what another hands on."""

    def flat_batch(self, gpus: int) -> int:
        return SLOTS


@dataclass(frozen=True)
class Trained:
    """A run: mean reward of each step, and how many responses moved."""

    rewards: Sequence[float]
    moved: int

    @property
    def final(self) -> float:
        """Mean reward of the last steps."""
        return fmean(self.rewards[-2:])


def train(policy: Policy, hosts: HostPool, seed: int) -> Trained:
    recorder, engine = Recorder(), Engine(tensor_parallel=1)
    backend = RealBackend(
        JOB, engine, 1, 2, work_of_task(TASK, JOB, seed), recorder, hosts, Sampled(TASK, seed, stop_token_ids=STOPS),
        lambda _: Roomy(), checkpoints=False,
    )  # fmt: skip
    drive(backend, policy)
    assert max(backend.weight_errors) < 1e-3, "engines do not sample from the weights that were learned"
    return Trained(backend.rewards, int(recorder.frames().samples.migrations.sum()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Trained]]]:
    """Each policy with each seed of prompts and sampling, from the same first weights."""
    model = write_tiny_model(tmp_path_factory.mktemp("model"), seed=0, **LEARNS)
    engine = EngineSettings(model=str(model), num_kv_blocks=512, max_num_seqs=SLOTS, max_num_batched_tokens=1024)
    learner = LearnerSettings(
        str(model), 0, 1, "", learning_rate=3e-3, micro_batch_tokens=4096, mini_batch_prompts=4, timeout_s=120
    )
    with HostPool(engine, learner) as hosts:
        yield {name: [train(policy, hosts, seed) for seed in range(SEEDS)] for name, policy in POLICIES.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mean_reward_rises_with_every_seed(trained: dict[str, list[Trained]], policy: str) -> None:
    for seed, run in enumerate(trained[policy]):
        told = f"seed {seed}: {run.rewards}"
        assert len(run.rewards) == STEPS
        assert run.rewards[0] == pytest.approx(0.5, abs=0.08), f"an untrained model is right half of the time; {told}"
        assert run.final > 0.75, told
        rises = [after > before for before, after in zip(run.rewards, run.rewards[1:], strict=False)]
        assert sum(rises) >= STEPS - 3, told


def test_how_it_is_scheduled_makes_no_more_difference_than_the_seed(trained: dict[str, list[Trained]]) -> None:
    finals = {name: [run.final for run in runs] for name, runs in trained.items()}
    means = [fmean(values) for values in finals.values()]
    spread = max(max(values) - min(values) for values in finals.values())
    assert abs(means[0] - means[1]) <= max(spread, 0.05), finals
    assert not any(run.moved for run in trained["verl"])
    assert all(run.moved > STEPS for run in trained["rlhfless"]), "nothing moves: both policies do the same"
    assert trained["verl"][0].rewards != trained["verl"][1].rewards, "the seed changes nothing"
