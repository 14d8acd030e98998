"""Real training: sampled responses, a rule's rewards, real updates; and the model gets better."""

from __future__ import annotations

from pathlib import Path

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

STEPS = 10
TASK = ResidueTask(prompts_per_step=16)
JOB = Job(
    model="qwen2.5-0.5b", prompts_per_step=16, responses_per_prompt=8, steps=STEPS, dataset_prompts=16,
    mini_batch_prompts=4, max_prompt_tokens=8, max_response_tokens=20,
)  # fmt: skip


def rewards_under(policy: Policy, hosts: HostPool, seed: int) -> list[float]:
    backend = RealBackend(
        JOB, Engine(tensor_parallel=1), 1, 2, work_of_task(TASK, JOB, seed), Recorder(), hosts, Sampled(TASK, seed),
        lambda _: Guess(),
    )  # fmt: skip
    drive(backend, policy)
    assert max(backend.weight_errors) < 1e-3, "engines do not sample from the weights that were learned"
    return backend.rewards


def test_the_mean_reward_rises_under_both_policies(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", seed=0, **LEARNS)
    engine = EngineSettings(model=str(model), num_kv_blocks=512, max_num_seqs=64, max_num_batched_tokens=1024)
    learner = LearnerSettings(
        str(model), 0, 1, "", learning_rate=2e-3, micro_batch_tokens=4096, mini_batch_prompts=4, timeout_s=120
    )
    with HostPool(engine, learner) as hosts:
        curves = {type(policy).__name__: rewards_under(policy, hosts, seed=0) for policy in (Verl(), RLHFless())}
    for name, rewards in curves.items():
        assert rewards[0] == pytest.approx(0.5, abs=0.08), f"{name}: an untrained model is right half of the time"
        assert sum(rewards[-3:]) / 3 > 0.75, f"{name}: {rewards}"
