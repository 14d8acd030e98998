"""`RealBackend`: carries out a policy's decisions on real vLLM engines and a real FSDP learner."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import simpy

from simrl.policies.contract import Estimates, Prompt, Start
from simrl.policies.runtime.backend import ClusterBackend
from simrl.policies.runtime.function import ClusterFunction, HostDied, Process
from simrl.policies.runtime.rollout import Rollout
from simrl.policies.runtime.steps import StepState, StepWork
from simrl.policies.runtime.view import View
from simrl.real_backend.actors import CALL_TIMEOUT_S, HostPool, Place
from simrl.real_backend.batch import TokenScores, TrainingBatch
from simrl.real_backend.clock import Clock, VirtualClock, WallClock
from simrl.real_backend.engine import Finished, Work
from simrl.real_backend.function import RealFunction
from simrl.real_backend.ranks import PROBE, PROBE_PROMPT_TOKENS, Learned, Learner
from simrl.real_backend.rewards import Task
from simrl.traces.job import Engine, Job
from simrl.traces.records import Recorder
from simrl.traces.streams import stream

ClockName = Literal["virtual", "wall"]
FIRST_TOKEN_ID = 3  # after padding, begin and end of sequence


class Content(Protocol):
    """What is said: prompts, how responses come about, and what they are worth."""

    def prompt(self, step: int, row: int, prompt_id: int | str, tokens: int) -> Sequence[int]:
        """Token ids of a prompt."""

    def work(self, response_id: int, prompt: Sequence[int], target_tokens: int) -> Work:
        """How to generate a response that has not begun."""

    def reward(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """What a response is worth."""


class Replay:
    """Responses of given lengths to prompts of random tokens: real and simulated engines face the same work.

    Rewards are drawn, since there is nothing to be right about; learning on them takes what learning takes.

    Args:
        seed: Of the tokens.
        vocabulary: Token ids are below it.
    """

    def __init__(self, seed: int, vocabulary: int) -> None:
        self.seed, self.vocabulary = seed, vocabulary

    def prompt(self, step: int, row: int, prompt_id: int | str, tokens: int) -> Sequence[int]:
        """Random token ids, the same whenever this prompt is asked."""
        drawn: list[int] = (
            stream(self.seed, "prompt tokens", prompt_id).integers(FIRST_TOKEN_ID, self.vocabulary, tokens).tolist()
        )
        return drawn

    def work(self, response_id: int, prompt: Sequence[int], target_tokens: int) -> Work:
        """Sampled tokens, as many as the trace says."""
        return Work(
            response_id=response_id,
            prompt_token_ids=prompt,
            forced_tokens=target_tokens,
            temperature=1.0,
            seed=self.seed + response_id,
        )

    def reward(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """A number from 0 to 1 that depends on the response alone."""
        return float(stream(self.seed, "reward", len(response), response[0]).random())


class Sampled:
    """Responses to a task's prompts, sampled up to a cap, with the task's rewards.

    Args:
        task: What is to be learned.
        seed: Of prompts and sampling.
        temperature: Of sampling; the learner's must be the same.
        stop_token_ids: Ids that end a response.
    """

    def __init__(self, task: Task, seed: int, temperature: float = 1.0, stop_token_ids: tuple[int, ...] = ()) -> None:
        self.task, self.seed, self.temperature, self.stop_token_ids = task, seed, temperature, stop_token_ids
        self._prompts = lru_cache(maxsize=4)(task.prompts)  # asked for a row at a time

    def prompt(self, step: int, row: int, prompt_id: int | str, tokens: int) -> Sequence[int]:
        """The task's prompt."""
        return self._prompts(step, self.seed)[row]

    def work(self, response_id: int, prompt: Sequence[int], target_tokens: int) -> Work:
        """Sampled tokens, at most as many as the job allows."""
        return Work(
            response_id=response_id,
            prompt_token_ids=prompt,
            max_tokens=target_tokens,
            stop_token_ids=self.stop_token_ids,
            temperature=self.temperature,
            seed=(self.seed << 32) + response_id,
        )

    def reward(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """The task's."""
        return self.task.reward(prompt, response)


def work_of_task(task: Task, job: Job, seed: int) -> Callable[[int], StepWork]:
    """The steps of a task; every response may grow to the job's cap."""

    def work(step: int) -> StepWork:
        prompts = task.prompts(step, seed)
        shape = [[job.max_response_tokens] * job.responses_per_prompt for _ in prompts]
        cut = [[True] * job.responses_per_prompt for _ in prompts]
        return StepWork(step, list(range(len(prompts))), [len(prompt) for prompt in prompts], shape, cut)

    return work


class RealBackend(ClusterBackend):
    """Real engines and a real learner.

    Args:
        job: What is trained.
        engine: Options of the rollout engines.
        nodes: Machines; on one machine, as many logical ones as are asked for.
        gpus_per_node: GPUs of each, or CPU cores, on the virtual clock as many as are asked for.
        work: The work of a step, by its number; response lengths are caps where the content samples.
        recorder: Gets every fact of the run.
        hosts: Hosts of engines and ranks; outlives the run.
        content: Prompts and rewards.
        estimates: What profiling knows in advance, given this backend.
        clock: See `simrl.real_backend.clock`.
        on_step: Called with the number of learned steps.
        checkpoints: Whether one is written after every update. Without one, the death of a rank ends the run.
        checkpoint_folder: Where the newest is kept; None: among the run's own files, in memory, which go with it.

    Attributes:
        texts: Token ids of each response of an open step so far.
        rewards: Mean reward of each finished step.
        weight_errors: Largest difference of the engines' log-probs from the learner's after each sync.
        learning: What each update told.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        nodes: int,
        gpus_per_node: int,
        work: Callable[[int], StepWork],
        recorder: Recorder,
        hosts: HostPool,
        content: Content,
        estimates: Callable[[RealBackend], Estimates],
        clock: ClockName = "virtual",
        on_step: Callable[[int], None] | None = None,
        *,
        checkpoints: bool = True,
        checkpoint_folder: Path | None = None,
    ) -> None:
        super().__init__(job, engine, nodes, gpus_per_node, work, recorder, on_step)
        self._checkpoints, self._checkpoint_folder = checkpoints, checkpoint_folder
        self.hosts, self.content = hosts, content
        self._estimates, self._clock_name = estimates, clock
        self.max_batched_tokens = hosts.engine.max_num_batched_tokens

    def reset(self) -> View:
        """Begin the job with no function started."""
        self.texts: dict[int, list[int]] = {}
        self.rewards: list[float] = []
        self.weight_errors: list[float] = []
        self.learning: list[Any] = []
        self.kv_bytes_saved = self.num_preemptions = 0
        self._prompts: dict[int, Sequence[int]] = {}
        self._scores: dict[int, TokenScores] = {}
        self._reward_of: dict[int, float] = {}
        self._weights: dict[int, Learned] = {}  # by version; 0 is what was there
        self._learning_process: simpy.Process | None = None
        folder = self.hosts.new_run()
        view = super().reset()
        checkpoints = (self._checkpoint_folder or folder) if self._checkpoints else None
        self._learner = Learner(self.hosts, self.clock, folder, checkpoints)
        return view

    def new_environment(self) -> simpy.Environment:
        """The chosen clock's."""
        if self._clock_name == "virtual":
            self.clock: Clock = VirtualClock(self.hosts.result)
        else:
            self.clock = WallClock(self.hosts.wait, self.hosts.result, CALL_TIMEOUT_S)
        return self.clock.env

    def new_function(self, decision: Start) -> RealFunction:
        """A function that will have a host."""
        return RealFunction(self, decision)

    def new_rollouts(self, step: int, prompt: Prompt, lengths: Sequence[int]) -> Sequence[Rollout]:
        """Responses of a prompt, whose token ids are made here."""
        group = prompt.responses[0]
        row = group % self.job.responses_per_step // self.job.responses_per_prompt
        self._prompts[group] = self.content.prompt(step, row, prompt.prompt_id, prompt.tokens)
        self.texts.update((response_id, []) for response_id in prompt.responses)
        return [
            Rollout(response_id, group, prompt.tokens, length, step=step)
            for response_id, length in zip(prompt.responses, lengths, strict=True)
        ]

    def estimates(self) -> Estimates:
        """What profiling knows."""
        return self._estimates(self)

    def misfit(self, function: ClusterFunction) -> tuple[str, str] | None:
        """An engine tells itself when it has no room."""
        return None

    def parked_bytes(self, function: ClusterFunction) -> tuple[float, float]:
        """Weights of a parked engine, and the memory of this machine."""
        weights = sum(entry.stat().st_size for entry in os.scandir(self.hosts.engine.model))
        return float(weights), float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    # --- texts ---

    def prompt_ids(self, rollout: Rollout) -> Sequence[int]:
        """Token ids of a response's prompt."""
        return self._prompts[rollout.group]

    def work_for(self, rollout: Rollout) -> Work:
        """What an engine is asked to do with a response, from the beginning or from where it is."""
        prompt, known = self.prompt_ids(rollout), tuple(self.texts[rollout.response_id])
        work = self.content.work(rollout.response_id, prompt, rollout.target_tokens)
        return replace(work, generated_token_ids=known) if known else work

    def completed(self, rollout: Rollout, finished: Finished) -> None:
        """The engine says that a response is complete."""
        assert tuple(self.texts[rollout.response_id]) == tuple(finished.token_ids), "tokens were lost or doubled"

    # --- preparation ---

    def newest_weights(self) -> tuple[int, str]:
        """The newest version of the learner's weights, and the folder that holds them."""
        learned = self._weights.get(self.version)
        return self.version, learned.folder if learned else self.hosts.engine.model

    def batch_of(self, rollouts: Sequence[Rollout]) -> TrainingBatch:
        """Responses as the learner takes them, without scores."""
        prompts = tuple(self.prompt_ids(rollout) for rollout in rollouts)
        texts = tuple(tuple(self.texts[rollout.response_id]) for rollout in rollouts)
        for rollout, prompt, text in zip(rollouts, prompts, texts, strict=True):
            if rollout.response_id not in self._reward_of:  # known, once it was prepared
                self._reward_of[rollout.response_id] = self.content.reward(prompt, text)
        rewards = tuple(self._reward_of[rollout.response_id] for rollout in rollouts)
        return TrainingBatch(prompts, texts, rewards, tuple(rollout.group for rollout in rollouts))

    def scored(self, rollouts: Sequence[Rollout], scores: TokenScores) -> None:
        """Keep what preparation computed."""
        columns = (scores.old_log_probs, scores.ref_log_probs)
        for position, index in enumerate(scores.indices):
            old, ref = ((column[position],) if column is not None else None for column in columns)
            self._scores[rollouts[index].response_id] = TokenScores((0,), old, ref, None, 0, 0.0)

    # --- learning and weights ---

    def learn_work(self, functions: Sequence[ClusterFunction], state: StepState) -> Callable[[], simpy.Event]:
        """All ranks update together, one for each GPU; on the virtual clock for as long as the busiest computes."""

        def begin() -> simpy.Event:
            places = [
                place for function in functions if isinstance(function, RealFunction) for place in function.places()
            ]
            self._learning_process = self.env.process(self._learning(places, state))
            return self._learning_process

        return begin

    def _learning(self, places: Sequence[Place], state: StepState) -> Process:
        version, batch = self.version + 1, self._prepared_batch(state)
        wait = self._clock_name == "virtual" or version == self.job.steps
        try:
            learned = yield from self._learner.learn(places, version, batch, state.step, wait=wait)
        except simpy.Interrupt:  # a function of the learner is lost
            return
        self.learning[version - 1 :] = [learned.stats]
        self.rewards[version - 1 :] = [sum(batch.rewards) / len(batch)]
        self._weights[version] = learned

    def learner_lost(self) -> None:
        """Its ranks end; others go on from the last checkpoint when the policy lets them."""
        if self._learning_process is not None and self._learning_process.is_alive:
            self._learning_process.interrupt()
        self._learner.end()

    def _close_step(self, state: StepState) -> None:
        super()._close_step(state)
        for rollout in state.rollouts:
            del self._scores[rollout.response_id], self._reward_of[rollout.response_id]

    def _prepared_batch(self, state: StepState) -> TrainingBatch:
        batch = self.batch_of(state.rollouts)
        scores = [self._scores[rollout.response_id] for rollout in state.rollouts]
        parts = [replace(score, indices=(index,)) for index, score in enumerate(scores)]
        return batch.with_scores(parts)

    def sync_work(self, behind: Sequence[ClusterFunction], version: int) -> Callable[[], simpy.Event]:
        """Engines load what the learner exported, each for itself; then all are checked."""
        return lambda: self.env.process(self._syncing(behind, version))

    def _syncing(self, behind: Sequence[ClusterFunction], version: int) -> Process:
        functions = [function for function in behind if isinstance(function, RealFunction) and function.host]
        learned = self._weights.get(version)
        folder, export_s = (learned.folder, learned.export_s) if learned else (self.hosts.engine.model, 0.0)
        loads = [self.env.process(function.load_weights(folder, version, export_s)) for function in functions]
        yield self.env.all_of(loads)
        if learned is not None:
            self._verify(functions, learned)

    def _verify(self, functions: Sequence[RealFunction], learned: Learned) -> None:
        """Compare the engines' log-probs of a text with the learner's; takes no time of the run."""
        calls = [
            (function, function.host.actor.log_probs.remote(PROBE, PROBE_PROMPT_TOKENS))
            for function in functions
            if function.host is not None
        ]
        errors = []
        for function, call in calls:
            try:
                found = self.hosts.result(call)
            except HostDied:
                function.died()
                continue
            errors += [abs(float(a) - float(b)) for a, b in zip(found, learned.probe_log_probs, strict=True)]
        if errors:
            self._check_error(max(errors), learned.stats.weights_version)

    def _check_error(self, error: float, version: int) -> None:
        self.weight_errors.append(error)
        if not error <= self.hosts.weight_tolerance:
            raise RuntimeError(
                f"after the sync to version {version} the engines' log-probs are up to {error:.3g} from the learner's,"
                f" more than {self.hosts.weight_tolerance:g}: some engine holds other weights"
            )
