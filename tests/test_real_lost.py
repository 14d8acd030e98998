"""Processes that die under a run on real engines and a real learner: the run goes on, and nothing is done twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_real_backend import JOB, Guess, check, work

from simrl.policies.contract import Completions, Decision, FunctionLost, Observation, Policy, Subscribe
from simrl.policies.rlhfless import RLHFless
from simrl.policies.runtime.function import HostDied
from simrl.policies.verl import Verl
from simrl.real_backend.actors import ANYWHERE, HostPool, Place, Timed
from simrl.real_backend.backend import ClockName, RealBackend, Replay
from simrl.real_backend.clock import VirtualClock, WallClock
from simrl.real_backend.engine import EngineSettings
from simrl.real_backend.learner_settings import LearnerLost, LearnerSettings
from simrl.real_backend.ranks import Learner
from simrl.real_backend.tiny_model import write_tiny_model
from simrl.traces.job import Engine
from simrl.traces.records import Frames, Recorder

At = Callable[[RealBackend, Observation], bool]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostPool]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"), seed=0)
    engine = EngineSettings(model=str(model), num_kv_blocks=128, max_num_seqs=16, max_num_batched_tokens=256)
    learner = LearnerSettings(
        str(model), 0, 1, "", learning_rate=1e-3, micro_batch_tokens=1024, mini_batch_prompts=2, timeout_s=60
    )
    with HostPool(engine, learner) as pool:
        yield pool


def kill(hosts: HostPool, actor: Any) -> None:
    """End a process as the kernel ends one: without a word."""
    os.kill(hosts.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


class Run:
    """A run in which something is done once, where a condition first holds."""

    def __init__(self, hosts: HostPool, clock: ClockName = "virtual") -> None:
        self.recorder = Recorder()
        engine, content = Engine(tensor_parallel=1, max_num_seqs=16), Replay(0, vocabulary=4096)
        self.backend = RealBackend(JOB, engine, 1, 2, work, self.recorder, hosts, content, lambda _: Guess(), clock)
        self.lost: list[FunctionLost] = []

    def drive(self, policy: Policy, when: At, do: Callable[[RealBackend], None]) -> Frames:
        observation: Observation | None = self.backend.reset()
        decisions: list[Decision] = [Subscribe(Completions(1))]
        done = False
        while observation is not None:
            self.lost += [event for event in observation.events if isinstance(event, FunctionLost)]
            decisions = [*decisions, *policy.decide(observation)]
            if not done and when(self.backend, observation):
                done = True
                do(self.backend)
            observation = self.backend.advance(decisions)
            decisions = []
        assert done, "it never came to that"
        return self.recorder.frames()


def in_mid_generation(name: str, step: int) -> At:
    """A function has finished a response, and has others in the works."""

    def holds(backend: RealBackend, observation: Observation) -> bool:
        there = observation.step == step and name in observation.functions
        return there and any(backend.texts[i] for i in observation.unfinished(name))

    return holds


@pytest.mark.parametrize(
    ("policy", "clock", "step"),
    [
        pytest.param(Verl(), "virtual", 1, id="verl"),
        pytest.param(RLHFless(RLHFless.Params(scale_actors=False)), "wall", 0, id="rlhfless"),
    ],
)
def test_an_engine_that_is_killed_costs_time_and_nothing_else(
    hosts: HostPool, policy: Policy, clock: ClockName, step: int
) -> None:
    run = Run(hosts, clock)
    killed: dict[str, Any] = {}

    def kill_one(backend: RealBackend) -> None:
        host = backend.functions["worker-0-1"].host  # type: ignore[attr-defined]
        kill(hosts, host.actor)
        killed["host"] = host

    frames = run.drive(policy, in_mid_generation("worker-0-1", step), kill_one)
    check(run.backend, frames)
    assert [event.function for event in run.lost] == ["worker-0-1"]
    assert run.lost[0].responses, "nothing was lost"
    assert killed["host"] not in [*hosts._idle, *hosts._taken]
    lives = frames.workers[(frames.workers.function == "worker-0-1") & (frames.workers.state == "cold")]
    assert len(lives) >= 2, "there is no replacement"


# --- the learner ---


def final_weights(backend: RealBackend) -> dict[str, np.ndarray]:
    return dict(load_file(Path(backend._weights[JOB.steps].folder) / "model.safetensors"))


def test_training_goes_on_from_the_checkpoint_and_learns_the_same(
    hosts: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Run(hosts)
    undisturbed.drive(Verl(), lambda *_: True, lambda _: None)
    expected = final_weights(undisturbed.backend)
    initial = load_file(Path(hosts.engine.model) / "model.safetensors")
    assert max(np.abs(expected[name] - initial[name]).max() for name in expected) > 1e-4, "nothing is learned"

    def kill_idle(backend: RealBackend) -> None:
        kill(hosts, backend._learner._ranks[1])
        kill_in_update(monkeypatch, hosts)

    check_same(hosts, expected, lambda _, observation: observation.step == 1, kill_idle)


def check_same(hosts: HostPool, expected: dict[str, np.ndarray], when: At, do: Callable[[RealBackend], None]) -> None:
    run = Run(hosts)
    frames = run.drive(Verl(), when, do)
    check(run.backend, frames)
    assert not run.lost, "the policy hears nothing of it"
    assert run.backend._learner._connections == 3, "two deaths were planned"
    assert [stats.step for stats in run.backend.learning] == [0, 1]
    for name, weights in final_weights(run.backend).items():
        np.testing.assert_allclose(weights, expected[name], rtol=0, atol=1e-6, err_msg=name)


def kill_in_update(monkeypatch: pytest.MonkeyPatch, hosts: HostPool) -> None:
    """Kill rank 1 once, just as the ranks were asked to update."""
    original = Learner._all_ranks
    killed: list[int] = []

    def killing(self: Learner, method: str, *arguments: Any) -> Any:
        if killed or method != "update" or hosts.some_died(self._ranks):
            return original(self, method, *arguments)
        killed.append(hosts.get(self._ranks[1].__ray_call__.remote(lambda _: os.getpid())))
        calls = [rank.update.remote(*arguments) for rank in self._ranks]
        os.kill(killed[0], signal.SIGKILL)
        return self._clock.call(lambda: calls, lambda _: 0.0)

    monkeypatch.setattr(Learner, "_all_ranks", killing)


# --- how often, and from where: ranks that only count ---


class CountingRank:
    """Its weights are the list of batches that it learned."""

    def __init__(self) -> None:
        self.learned: list[str] = []

    def __getattr__(self, method: str) -> Any:
        return Remote(getattr(type(self), f"do_{method}"), self)

    def do_connect(self, settings: LearnerSettings) -> Timed:
        return Timed(None, 0.0, 0.0)

    def do_load_checkpoint(self, folder: str) -> Timed:
        self.learned = (Path(folder) / "learned").read_text().split()
        return Timed(len(self.learned), 0.0, 0.0)

    def do_save_checkpoint(self, folder: str) -> Timed:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "learned").write_text(" ".join(self.learned))
        return Timed(None, 0.0, 0.0)

    def do_update(self, batch: str, step: int) -> Timed:
        self.learned.append(batch)
        return Timed(f"stats of {batch}", 1.0, 1.0)

    def do_export_weights(self, folder: str) -> Timed:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "learned").write_text(" ".join(self.learned))
        return Timed(None, 0.5, 0.5)

    def do_log_probs(self, batch: object) -> Timed:
        return Timed(Scored(), 0.0, 0.0)


class Scored:
    indices, old_log_probs = (0,), ((-1.0,),)


class Remote:
    """A method of an actor: what it returns is a call that is carried out when its result is asked for."""

    def __init__(self, method: Any, rank: CountingRank) -> None:
        self.method, self.rank = method, rank

    def remote(self, *arguments: Any) -> Any:
        return lambda: self.method(self.rank, *arguments)


class CountingHosts:
    """Hosts of such ranks; the calls with these numbers find a rank dead."""

    learner = LearnerSettings("", 0, 1, "")

    def __init__(self, deaths: dict[int, Exception]) -> None:
        self.deaths, self.calls, self.started = deaths, 0, 0

    def learners(self, places: Sequence[Place]) -> list[CountingRank]:
        self.started += 1
        return [CountingRank() for _ in places]

    def end_learners(self) -> None:
        pass

    def some_died(self, ranks: list[CountingRank]) -> bool:
        return False

    def result(self, calls: list[Callable[[], Timed]]) -> list[Timed]:
        self.calls += 1
        if self.calls in self.deaths:
            raise self.deaths[self.calls]
        return [call() for call in calls]


def learn_all(
    folder: Path, deaths: dict[int, Exception], *, checkpoints: bool = True, wait: bool = False, steps: int = 3
) -> CountingHosts:
    """Learn batches a, b, c; the weights that are told are always those of all batches so far."""
    hosts, clock = CountingHosts(deaths), VirtualClock(lambda calls: hosts.result(calls))
    learner = Learner(hosts, clock, folder, folder if checkpoints else None)  # type: ignore[arg-type]

    def job() -> Any:
        for step, batch in enumerate("abc"[:steps]):
            learned = yield from learner.learn([ANYWHERE], step + 1, batch, step, wait=wait)  # type: ignore[arg-type]
            assert (Path(learned.folder) / "learned").read_text().split() == list("abc"[: step + 1])
            assert learned.stats == f"stats of {batch}"

    clock.env.run(clock.env.process(job()))
    return hosts


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("error", [HostDied("rank 1"), LearnerLost("rank 0 of 2"), TimeoutError("stalled")])
def test_whatever_call_a_rank_dies_in_each_batch_is_learned_once(tmp_path: Path, error: Exception, wait: bool) -> None:
    calls = learn_all(tmp_path / "undisturbed", {}, wait=wait).calls
    for first in range(1, calls + 1):
        for second in (first + 1, first + 3, first + 6):
            hosts = learn_all(tmp_path / f"{first} {second}", {first: error, second: error}, wait=wait)
            assert hosts.started >= 2


def test_a_third_death_in_a_row_ends_the_run(tmp_path: Path) -> None:
    deaths: dict[int, Exception] = {number: HostDied("rank 1 died") for number in range(1, 4)}
    with pytest.raises(RuntimeError, match=r"learning step 0 failed 3 times in a row.*rank 1 died"):
        learn_all(tmp_path, deaths)


def test_without_checkpoints_a_death_ends_the_run(tmp_path: Path) -> None:
    learn_all(tmp_path, {}, checkpoints=False)
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(RuntimeError, match="no checkpoint to go on from"):
        learn_all(tmp_path / "again", {7: HostDied("rank 1 died")}, checkpoints=False)


def test_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    learn_all(tmp_path, {}, wait=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_failure_that_is_no_death_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        learn_all(tmp_path, {2: OSError("disk full")})
    with pytest.raises(ValueError, match="a bug"):
        learn_all(tmp_path / "again", {2: ValueError("a bug")})


# --- calls that never end ---


def test_a_call_that_takes_too_long_fails_although_other_things_happen() -> None:
    clock = WallClock(lambda calls, timeout_s: [], lambda call: call, limit_s=-1.0)

    def caller() -> Any:
        yield clock.call(lambda: "a call", lambda _: 0.0)

    clock.env.process(caller())
    clock.env.timeout(1e9)
    with pytest.raises(TimeoutError, match="took more than"):
        clock.env.run()


def test_a_call_that_fails_when_nobody_waits_for_it_any_more_is_forgotten() -> None:
    def fail(call: object) -> None:
        raise HostDied("it was killed")

    clock = WallClock(lambda calls, timeout_s: calls, fail, limit_s=9.0)
    clock.call(lambda: "a call", lambda _: 0.0)
    clock.env.run()
