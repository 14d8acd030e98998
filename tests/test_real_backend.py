"""Policies on real engines and a real learner: the books of the simulated cluster, and work that is really done."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conformance import Case, check_frames
from rich.console import Console
from test_profile import PROFILE

from simrl.experiments.config import load_config
from simrl.experiments.report import of_run, of_validation
from simrl.experiments.run import Result, write_run
from simrl.experiments.validate import Run, compare_runs, write_validation
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
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.profiled import ProfiledCosts
from simrl.traces.job import Engine, Job
from simrl.traces.parameters import Parameters
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
    engine = EngineSettings(model=str(model), num_kv_blocks=256, max_num_seqs=40, max_num_batched_tokens=256)
    learner = LearnerSettings(str(model), 0, 1, "", micro_batch_tokens=1024, mini_batch_prompts=2, timeout_s=120)
    with HostPool(engine, learner) as pool:
        folder = pool.folder
        assert folder.stat().st_mode & 0o777 == 0o700
        yield pool
    assert not folder.exists()


def run(
    hosts: HostPool,
    policy: Policy,
    clock: ClockName = "virtual",
    gpus: int = 2,
    content: Content | None = None,
    case: Case | None = None,
) -> tuple[RealBackend, Frames]:
    recorder = Recorder()
    content = content or Replay(0, vocabulary=4096)
    engine = Engine(tensor_parallel=1, max_num_seqs=hosts.engine.max_num_seqs)
    job, steps = (JOB, work) if case is None else (case.job(), case.work)
    backend = RealBackend(
        job, engine, 1, gpus, steps, recorder, hosts, content, lambda _: Guess(), clock, checkpoints=False
    )
    drive(backend, policy)
    return backend, recorder.frames()


def check(backend: RealBackend, frames: Frames) -> None:
    check_frames(frames, JOB, work)
    wanted: list[int] = [length for step in range(STEPS) for row in work(step).response_tokens for length in row]
    assert [len(backend.texts[i]) for i in range(len(wanted))] == wanted, "so many tokens were really generated"
    assert (frames.samples.weights_version == frames.samples.step).all()
    assert len(backend.weight_errors) == STEPS - 1, "every sync is verified"
    assert max(backend.weight_errors) < 1e-3
    assert backend.learning[-1].weights_version == STEPS


@pytest.mark.parametrize("policy", [Verl(), RLHFuse(), RLHFless()], ids=["verl", "rlhfuse", "rlhfless"])
def test_a_policy_runs_on_real_engines(hosts: HostPool, policy: Policy) -> None:
    backend, frames = run(hosts, policy)
    check(backend, frames)
    # Blocks of 32 tokens: of a group's prompts of 70, 40, 33 and 64 tokens, 64, 32, 32 and 32 tokens are computed once.
    computed = frames.samples.groupby("step").prefill_tokens.sum()
    assert (computed < SAMPLES * (70 + 40 + 33 + 64)).all(), "no prompt is shared"


# --- frames of real runs, where those of simulated ones are read ---


def simulate(hosts: HostPool, policy: Policy, gpus: int, case: Case | None = None) -> Frames:
    """The same work under the same policy on simulated engines like the pool's; what they take is made up."""
    settings, recorder = hosts.engine, Recorder()
    assert settings.num_kv_blocks is not None
    limits = {"max_num_seqs": settings.max_num_seqs, "max_num_batched_tokens": settings.max_num_batched_tokens}
    measured = PROFILE.engine.model_copy(
        update={"kv_blocks": settings.num_kv_blocks - 1, **limits}
    )  # one is vLLM's own
    profile = PROFILE.model_copy(update={"engine": measured})
    engine = Engine(tensor_parallel=1, prefix_caching=settings.prefix_caching)
    job, steps = (JOB, work) if case is None else (case.job(), case.work)
    costs = ProfiledCosts(
        job, engine, profile, nodes=1, gpus_per_node=gpus, parameters=Parameters(), path="p", clock="virtual"
    )
    drive(SimulatedBackend(costs, steps, recorder, 0), policy)
    return recorder.frames()


def test_frames_of_a_real_run_are_read_by_all_that_reads_simulated_ones(hosts: HostPool, tmp_path: Path) -> None:
    _, frames = run(hosts, Verl())
    simulated = simulate(hosts, Verl(), gpus=2)
    for name, frame in frames.by_name().items():
        pd.testing.assert_series_equal(frame.dtypes, simulated.by_name()[name].dtypes)
        assert len(frame), name
    for column in ("state", "role", "stage"):
        assert set(frames.workers[column]) == set(simulated.workers[column]), column
    assert set(frames.phases.stage) == set(simulated.phases.stage)

    price = Price(36.0, "gpu", 0.0)
    summary = summarise(frames, policy="verl", seed=0, nodes=1, gpus=2, price=price, policy_wall_s=0.0, wall_s=0.0)
    assert summary["responses"] == STEPS * PROMPTS * SAMPLES
    ended_s = float(frames.workers.end_s.max())
    assert summary["gpu_s"] == pytest.approx(2 * ended_s), "two GPUs are held to the end"
    assert summary["cost_usd"] == pytest.approx(0.02 * ended_s)
    assert sum(summary["gpu_s_by"]["stage"].values()) == pytest.approx(summary["gpu_s"])

    result = Result(load_config(policies=["verl"]), summary, frames, [])
    write_run(result, tmp_path / "run")
    validation = compare_runs([Run("verl", "real", frames), Run("verl", "simulated", simulated)])
    assert len(validation.rows) == STEPS * 6 - 1, "five stages and GPU-seconds of each step; the first has no sync"
    assert (validation.rows[["real_s", "simulated_s"]] > 0).all(axis=None)
    write_validation(validation, tmp_path / "validation")
    for folder in (tmp_path / "run", tmp_path / "validation" / "verl-real-0"):
        for name, frame in frames.by_name().items():
            pd.testing.assert_frame_equal(pd.read_parquet(folder / f"{name}.parquet"), frame)
    assert summarise(
        Frames(*(pd.read_parquet(tmp_path / "run" / f"{name}.parquet") for name in frames.by_name())),
        policy="verl", seed=0, nodes=1, gpus=2, price=price, policy_wall_s=0.0, wall_s=0.0,
    ) == summary  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(of_run(result, None), of_validation(validation, None))
    assert "24 responses" in console.export_text()


# --- which prompts are computed ---

BLOCK = 32
AROUND_BLOCKS = [31, 32, 33, 63, 64, 65, 96, 97, 1, 45]  # tokens of prompts


def around_blocks() -> Case:
    """40 responses whose prompts end shortly before, at and after the end of a block; more than an iteration takes.

    The first two are complete after one and the same number of iterations and one more. Both kinds of engines hear of
    what is decided at a completion an iteration later; here a completion ends that one, too, so that both take the same
    tokens out.
    """
    lengths = np.random.default_rng(0).integers(40, 60, (len(AROUND_BLOCKS), 4))
    lengths[0, :2] = 10, 11
    return Case([lengths.tolist()], AROUND_BLOCKS, {"max_prompt_tokens": 128, "mini_batch_prompts": 10})


def prefills(hosts: HostPool, policy: Policy, gpus: int) -> pd.DataFrame:
    """A row a response: its text, and tokens cached and computed, as vLLM tells and as simulated."""
    case = around_blocks()
    backend, frames = run(hosts, policy, gpus=gpus, case=case)
    assert backend.num_preemptions == 0
    both = [
        each.samples.sort_values("response_id", ignore_index=True)
        for each in (frames, simulate(hosts, policy, gpus, case))
    ]
    for column in ("function", "migrations", "response_tokens"):
        assert both[0][column].tolist() == both[1][column].tolist(), "they are not the same runs"
    texts = pd.Series([tuple(backend.texts[i]) for i in range(len(both[0]))], dtype=object)
    table = both[0][["prompt_tokens", "sample", "migrations"]].assign(text=texts)
    for kind, samples in zip(("real", "simulated"), both, strict=True):
        table = table.assign(**{f"{kind}_cached": samples.cached_tokens, f"{kind}_computed": samples.prefill_tokens})
    return table


def whole_blocks(tokens: pd.Series[int]) -> pd.Series[int]:
    return tokens // BLOCK * BLOCK


def check_equal(table: pd.DataFrame) -> None:
    """What is cached is equal to the token, and so is what is computed, but for last tokens that are computed alone."""
    assert table.real_cached.tolist() == table.simulated_cached.tolist()
    alone = table.prompt_tokens - table.real_cached == 1  # to an engine, that is decoding
    assert (table.simulated_computed - table.real_computed).tolist() == alone.astype(int).tolist()


def test_groups_find_their_prompts_cached_as_simulated(hosts: HostPool) -> None:
    tables = [prefills(hosts, Verl(), gpus) for gpus in (1, 2)]
    for table in tables:
        check_equal(table)
        later = table[table["sample"] > 0]
        assert later.real_cached.tolist() == whole_blocks(later.prompt_tokens - 1).tolist()
    assert tables[0].text.tolist() == tables[1].text.tolist(), "what is sampled depends on how prompts are cut"


def test_without_prefix_caching_nothing_is_found(hosts: HostPool) -> None:
    with HostPool(replace(hosts.engine, prefix_caching=False), hosts.learner) as others:
        table = prefills(others, Verl(), 1)
    check_equal(table)
    assert table.real_cached.sum() == 0


def test_prompts_that_are_computed_elsewhere_are_found_as_simulated(hosts: HostPool) -> None:
    table = prefills(hosts, Mover(with_kv=True, prefill=True, below=0), 2)
    assert (
        table.real_cached.tolist() == table.simulated_cached.tolist() == whole_blocks(table.prompt_tokens - 1).tolist()
    )


def test_what_moves_without_its_kv_is_found_as_simulated(hosts: HostPool) -> None:
    """But for full last blocks of prompts: docs/model.md says that the simulator lets nobody share them."""
    table = prefills(hosts, Mover(with_kv=False, below=40), 2)
    moved = table.migrations == 1
    assert moved.sum() == len(table) - 2
    shared = moved & (table.prompt_tokens % BLOCK == 0) & (table["sample"] > 0)
    assert shared.sum() == 9
    assert (table.real_cached - table.simulated_cached).tolist() == (BLOCK * shared).tolist()


def test_what_moves_with_its_kv_is_found_as_simulated(hosts: HostPool) -> None:
    """But for KV of the last block that is not full: it does not move for real."""
    stayed = simulate(hosts, Verl(), 1, around_blocks()).samples.sort_values("response_id", ignore_index=True)
    table = prefills(hosts, Mover(with_kv=True, below=40), 2)
    assert (table.migrations == 1).sum() == len(table) - 2
    sent = table.simulated_cached - stayed.cached_tokens  # by the engine where all was the same
    assert (sent[table.migrations == 1] >= table.prompt_tokens[table.migrations == 1]).all()
    assert (table.simulated_cached - table.real_cached).tolist() == (sent % BLOCK).tolist()
    assert (sent % BLOCK > 0).sum() > 30


# --- what is generated ---


class Greedy(Replay):
    """Replay that decodes greedily: a response's tokens depend on its prompt and the weights alone."""

    def work(self, response_id: int, prompt: Sequence[int], target_tokens: int) -> Work:
        sampled = super().work(response_id, prompt, target_tokens)
        return replace(sampled, temperature=0.0)


def test_responses_that_move_or_whose_prompts_were_computed_elsewhere_say_the_same(hosts: HostPool) -> None:
    texts = {}
    policies: dict[str, Policy] = {
        "verl": Verl(),
        "recompute": Mover(with_kv=False),
        "with KV": Mover(with_kv=True),
        "dedup": Mover(with_kv=True, prefill=True),
    }
    for name, policy in policies.items():
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
    """Generates on one of two functions and moves what is unfinished to the other when fewer than *below* are left."""

    def __init__(self, *, with_kv: bool, prefill: bool = False, below: int = 9) -> None:
        self.with_kv, self.prefill, self.below, self.moved = with_kv, prefill, below, -1

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
                case Completions() if observation.step != self.moved and len(observation.unfinished("a")) < self.below:
                    self.moved = observation.step
                    decisions.append(Migrate(observation.unfinished("a"), "b", self.with_kv))
                case StageFinished(stage="generation"):
                    decisions.append(Prepare(("a", "b"), observation.unprepared))
                case StageFinished(stage="preparation"):
                    decisions.append(Learn(("a", "b")))
        return decisions
