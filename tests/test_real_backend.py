"""Policies on real engines and a real learner: the books of the simulated cluster, and work that is really done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_backend import check_apart, check_stages

from simrl.policies.contract import (
    Assign,
    Completions,
    Decision,
    Learn,
    Migrate,
    Observation,
    Policy,
    Prepare,
    Role,
    Stage,
    StageFinished,
    Start,
    StepStarted,
    Subscribe,
    Sync,
    drive,
)
from simrl.policies.rlhfless import RLHFless
from simrl.policies.rlhfuse import RLHFuse
from simrl.policies.runtime.steps import StepWork
from simrl.policies.verl import Verl
from simrl.real_backend.actors import HostPool
from simrl.real_backend.backend import ClockName, Content, RealBackend, Replay
from simrl.real_backend.engine import EngineSettings, Work
from simrl.real_backend.learner_settings import LearnerSettings
from simrl.real_backend.tiny_model import write_tiny_model
from simrl.traces.job import Engine, Job
from simrl.traces.records import Frames, Recorder
from simrl.traces.summary import Price, summarise

PROMPTS, SAMPLES, STEPS = 4, 3, 2
JOB = Job(
    model="qwen2.5-0.5b", prompts_per_step=PROMPTS, responses_per_prompt=SAMPLES, steps=STEPS, dataset_prompts=PROMPTS,
    mini_batch_prompts=2, max_prompt_tokens=80, max_response_tokens=48,
)  # fmt: skip


class Guess:
    """Estimates of the right order for a tiny model on a core."""

    def decode_s(self, batch: int, context: float, gpus: int) -> float:
        return 3e-3 + 2e-4 * batch

    def prefill_s(self, tokens: int, gpus: int) -> float:
        return 3e-3 + 5e-5 * tokens

    def flat_batch(self, gpus: int) -> int:
        return 8

    def kv_tokens(self, gpus: int, roles: tuple[Role, ...]) -> int:
        return 256 * 32

    def transfer_s(self, tokens: int, gpus: int, *, same_node: bool) -> float:
        return 0.01

    def start_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        return 10.0

    def park_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        return 0.01

    def wake_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        return 0.03

    def prepare_s(self, tokens: int, gpus: int) -> float:
        return 1e-4 * tokens / gpus

    def learn_s(self, tokens: int, gpus: int) -> float:
        return 5e-4 * tokens / gpus

    def sync_s(self, gpus: int) -> float:
        return 0.1


def work(step: int) -> StepWork:
    lengths = np.random.default_rng(step).integers(2, 48, (PROMPTS, SAMPLES))
    lengths[0, 0] = 48  # a tail
    return StepWork(
        step, list(range(PROMPTS)), [70, 40, 33, 64], lengths.tolist(), (lengths == 48).tolist()
    )  # an epoch a step: history from the second on


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostPool]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"), seed=0)
    engine = EngineSettings(model=str(model), num_kv_blocks=128, max_num_seqs=16, max_num_batched_tokens=256)
    learner = LearnerSettings(str(model), 0, 1, "", micro_batch_tokens=1024, mini_batch_prompts=2, timeout_s=120)
    with HostPool(engine, learner) as pool:
        folder = pool.folder
        assert folder.stat().st_mode & 0o777 == 0o700
        yield pool
    assert not folder.exists()


def run(
    hosts: HostPool, policy: Policy, clock: ClockName = "virtual", gpus: int = 2, content: Content | None = None
) -> tuple[RealBackend, Frames]:
    recorder = Recorder()
    content = content or Replay(0, vocabulary=4096)
    engine = Engine(tensor_parallel=1, max_num_seqs=16)
    backend = RealBackend(JOB, engine, 1, gpus, work, recorder, hosts, content, lambda _: Guess(), clock)
    drive(backend, policy)
    return backend, recorder.frames()


def check(backend: RealBackend, frames: Frames) -> None:
    samples = frames.samples.sort_values("response_id")
    assert samples.response_id.tolist() == list(range(STEPS * PROMPTS * SAMPLES)), "each exactly once"
    wanted: list[int] = [length for step in range(STEPS) for row in work(step).response_tokens for length in row]
    assert samples.response_tokens.tolist() == wanted, "lengths are those of the trace"
    assert [len(backend.texts[i]) for i in range(len(wanted))] == wanted, "and so many tokens were really generated"
    assert (samples.weights_version == samples.step).all()
    check_stages(frames)
    for name, rows in frames.workers.groupby("function"):
        check_apart(rows, f"intervals of {name}")
    assert len(backend.weight_errors) == STEPS - 1, "every sync is verified"
    assert max(backend.weight_errors) < 1e-3
    assert backend.learning[-1].weights_version == STEPS
    summary = summarise(
        frames, policy="test", seed=0, nodes=1, gpus=2, price=Price(0.0, "gpu", 0.0), policy_wall_s=0.0,
        wall_s=0.0,
    )  # fmt: skip
    assert summary["responses"] == len(wanted)
    assert summary["gpu_s"] > 0


@pytest.mark.parametrize("policy", [Verl(), RLHFuse(), RLHFless()], ids=["verl", "rlhfuse", "rlhfless"])
def test_a_policy_runs_on_real_engines(hosts: HostPool, policy: Policy) -> None:
    backend, frames = run(hosts, policy)
    check(backend, frames)
    # Blocks of 32 tokens: of a group's prompts of 70, 40, 33 and 64 tokens, 64, 32, 32 and 32 tokens are computed once.
    computed = frames.samples.groupby("step").prefill_tokens.sum()
    assert (computed < SAMPLES * (70 + 40 + 33 + 64)).all(), "no prompt is shared"


def test_a_policy_runs_on_the_wall_clock(hosts: HostPool) -> None:
    backend, frames = run(hosts, Verl(), clock="wall")
    check(backend, frames)


def test_real_and_simulated_functions_are_told_apart_by_nothing_in_the_frames(hosts: HostPool) -> None:
    _, frames = run(hosts, Verl())
    assert set(frames.workers.state) <= {"busy", "idle", "cold", "parked"}
    assert set(frames.phases.stage) == {"generation", "preparation", "learning", "weight_sync", "step"}


# --- what is generated ---


class Greedy(Replay):
    """Replay that decodes greedily: a response's tokens depend on its prompt and the weights alone."""

    def work(self, response_id: int, prompt: Sequence[int], target_tokens: int) -> Work:
        sampled = super().work(response_id, prompt, target_tokens)
        return replace(sampled, temperature=0.0)


def test_responses_that_move_or_whose_prompts_were_computed_elsewhere_say_the_same(hosts: HostPool) -> None:
    texts = {}
    for name, policy in {
        "verl": Verl(),
        "recompute": Mover(with_kv=False),
        "with KV": Mover(with_kv=True),
        "dedup": Mover(with_kv=True, prefill=True),
    }.items():
        backend, frames = run(hosts, policy, content=Greedy(1, vocabulary=4096))
        first = frames.samples[frames.samples.step == 0]
        texts[name] = [backend.texts[i] for i in range(PROMPTS * SAMPLES)]
        if name != "verl":
            assert first.migrations.sum() >= 3, "hardly anything moves"
        if name == "with KV":
            assert backend.kv_bytes_saved > 0
    assert len({token for text in texts["verl"] for token in text}) > 30, "the model repeats itself: this shows nothing"
    for name, moved in texts.items():
        assert moved == texts["verl"], name


class Mover:
    """Generates on one of two functions and moves what is unfinished to the other after a third of the responses."""

    def __init__(self, *, with_kv: bool, prefill: bool = False) -> None:
        self.with_kv, self.prefill, self.moved = with_kv, prefill, -1

    def decide(self, observation: Observation) -> Sequence[Decision]:
        decisions: list[Decision] = []
        if not observation.functions:
            decisions += [Start(name, 1, ("prefill", "decode", "prepare", "learn")) for name in ("a", "b")]
            stages: tuple[Stage, ...] = ("generation", "preparation")
            decisions += [Subscribe(StageFinished(stage)) for stage in stages]
            decisions.append(Subscribe(Completions(1)))
        for event in observation.events:
            match event:
                case StepStarted(prompts=prompts):
                    ids = tuple(i for prompt in prompts for i in prompt.responses)
                    decisions += [Sync(("a", "b")), Assign("a", ids, prefix_from="b" if self.prefill else None)]
                case Completions() if observation.step != self.moved and len(observation.unfinished("a")) < 9:
                    self.moved = observation.step
                    decisions.append(Migrate(observation.unfinished("a"), "b", self.with_kv))
                case StageFinished(stage="generation"):
                    decisions.append(Prepare(("a", "b"), observation.unprepared))
                case StageFinished(stage="preparation"):
                    decisions.append(Learn(("a", "b")))
        return decisions
