"""A lower bound on the GPU-seconds and on the time of a step, whatever the policy. docs/bound.md says how tight it is.

Only work is counted during which GPUs are busy, so that it bounds `gpu_s` and `gpu_s_paper` alike.

**Generation.** A response of l tokens takes part in l iterations, once in each, for nobody decodes two tokens at once.
Let x_gb be the number of iterations with b responses on engines of g GPUs, f_igb whether response i gets its first
token in one of them, and y_igb in how many it gets another. Let z_T be 1 if a task of preparation is a set T of
responses on a function of some GPUs, for P_T GPU-seconds in p_T, and else 0. Then in every schedule, if learning begins
D after generation may,

    sum_gb f_igb = 1, sum_gb y_igb = l_i - 1
    sum_i (f + y)_igb <= b x_gb                        no more responses than there are
    f_igb + y_igb <= x_gb                              each once in an iteration
    sum_(T with i) z_T = 1                             each is prepared once
    F_i + sum_gb t_gb y_igb + sum_(T with i) p_T z_T <= D  one after the other, F_i until the first token
    sum_gb g t_gb x_gb + sum_T P_T z_T <= GPUs D       GPU-seconds that there are
    sum_gb g t_gb x_gb <= GPUs (D - p)                 and are before the last is generated: p is the least p_T
    sum_i (l_i - 1)(l_i - 2) / 2 <= sum_gb K_g x_gb    own KV tokens of the batch, of K_g that an engine holds

and the least sum_gb g t_gb x_gb + sum_T P_T z_T under these constraints is no more than what the schedule takes: a
linear programme, where of up to 8 responses z is a choice among all sets. With more of them there is one z, for a task
that costs what preparing all on one GPU does, and takes each response what it does alone. Migration takes no time, and
engines are there when needed and may change their size at every token. Of equal responses the sums of f, y and z are
kept; beyond a dozen responses f and y are kept for the longest ones only, and of the others all tokens together.

**Context.** For any r >= 0, t_g(b, c) >= tau_gb + r b c / g, with tau_gb the least difference over the contexts c that
may occur. What is read of contexts is then r times the sum of all contexts, a constant. A good r is looked for. Where
time is counted one after the other, the same is done with what a response reads of its own context, in a batch whose
others have the shortest that there is.

**Prefill.** F_i is the least time of an iteration over a whole prompt, or of two over a token each. GPU-seconds do not
count the length of prompts: an iteration that prefills takes no less than one that decodes as many tokens. Where a
table says otherwise, it is a kind of its own, and there are no more of those than responses have first tokens. Tokens
after the first are taken to be decoded: a policy that had contexts computed again for each token, from cached blocks,
might read less than is counted.

**Learning** is on the number of GPUs that is best, over nodes as is best, with ranks as even as the responses allow.
**Weight sync** is that of the learner's GPUs alone, over the fastest links.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from simrl.experiments.config import Config, ConfigError
from simrl.experiments.run import Result, Simulation, drawn_work, simulate
from simrl.simulator.costs import Costs, DoesNotFit
from simrl.simulator.learning import Floats, Learning, Share, forward_flops
from simrl.traces.iteration import ATTENDED_KNOTS, CONTEXT_KNOTS, TOKEN_KNOTS, IterationTimes
from simrl.traces.summary import HOLDING, gpu_s_between

if TYPE_CHECKING:
    import pandas as pd

    from simrl.traces.models import Model
    from simrl.traces.parameters import Parameters

FEW = 8  # responses; of so many every set may be a task of preparation
EXACT = 12  # so many responses and batches have rows and columns of their own; more of them are taken together
GROWTH = 1.15  # of batches that are taken together
MARGIN = 1e-6  # relative; the solver keeps constraints to 1e-7
GAP = 2e-3  # relative; the search for whole tasks may end so near to the best
TANGENTS = 12  # the programme is solved at so many deadlines at most


class Infeasible(ValueError):
    """A step time that no policy can keep."""


class Bound(NamedTuple):
    """No policy does the step with less.

    Attributes:
        step_s: From the arrival of the prompts to the end of learning.
        gpu_s: The sum of the four parts.
        generation_gpu_s: Engines at work.
        preparation_gpu_s: Log-probs, values and rewards.
        learning_gpu_s: Of all learners.
        weight_sync_gpu_s: Of all learners, before the step.
        learner_gpus: Where this is reached.
    """

    step_s: float
    gpu_s: float
    generation_gpu_s: float
    preparation_gpu_s: float
    learning_gpu_s: float
    weight_sync_gpu_s: float
    learner_gpus: int


def bound(config: Config, step: int, step_s: float = math.inf) -> Bound:
    """The least GPU-seconds of a step that may last *step_s*, with the lengths that the responses really have.

    Its `step_s` is the least that this step can take on all GPUs of the cluster.

    Raises:
        ConfigError: the configuration is impossible, or names a profile.
        DoesNotFit: the model fits on no number of GPUs.
        Infeasible: the step takes longer.
    """
    work = drawn_work(config).of_step(step)
    prompts = np.repeat(work.prompt_tokens, config.job.responses_per_prompt)
    return StepBound.of(simulate(config), step, prompts, np.ravel(work.response_tokens)).within(step_s)


def gap(result: Result) -> pd.DataFrame:
    """A run beside the bound, a row a step.

    Columns: `step`; `step_s`, `gpu_s` and `busy_gpu_s` of the run; `bound_step_s`; `bound_gpu_s` in the run's step
    time; and what the run took as multiples of the bound: `step_gap`, `gpu_gap`, `busy_gap`. GPU-seconds are all
    between the step's beginning and end, where steps overlap (`job.max_staleness`) those of other steps too.

    Raises:
        ConfigError: the run's configuration names a profile.
    """
    import pandas as pd

    config, frames = result.config, result.frames
    simulation = simulate(config)
    held = frames.workers[frames.workers["state"].isin(HOLDING)]
    busy = held[held["state"] == "busy"]
    by_step = dict(iter(frames.samples.sort_values("response_id").groupby("step")))
    rows = []
    for phase in frames.phases[frames.phases["stage"] == "step"].to_dict("records"):
        step, begin_s, end_s = int(phase["step"]), float(phase["start_s"]), float(phase["end_s"])
        mine = by_step[step]
        least = StepBound.of(simulation, step, mine["prompt_tokens"], mine["response_tokens"]).within(
            (end_s - begin_s) * (1 + MARGIN)
        )
        gpu_s, busy_gpu_s = gpu_s_between(held, begin_s, end_s), gpu_s_between(busy, begin_s, end_s)
        rows.append({
            "step": step, "step_s": end_s - begin_s, "gpu_s": gpu_s, "busy_gpu_s": busy_gpu_s,
            "bound_step_s": least.step_s, "bound_gpu_s": least.gpu_s,
            "step_gap": (end_s - begin_s) / least.step_s, "gpu_gap": gpu_s / least.gpu_s,
            "busy_gap": busy_gpu_s / least.gpu_s,
        })  # fmt: skip
    return pd.DataFrame(rows)


class StepBound:
    """The bound on one step.

    Args:
        costs: What things take; the cluster.
        parameters: That *costs* reads.
        prompt_tokens: Of the prompt of each response, by response id.
        response_tokens: Of each response.
        synced: The engines need new weights first.

    Raises:
        DoesNotFit: the model fits on no number of GPUs.
    """

    def __init__(
        self, costs: Costs, parameters: Parameters, prompt_tokens: Any, response_tokens: Any, *, synced: bool
    ) -> None:
        prompts, responses = np.asarray(prompt_tokens, dtype=float), np.asarray(response_tokens, dtype=float)
        tokens = prompts + responses
        ideal = _EvenLearning(costs.job, costs.model, costs.node, parameters)
        self._sync_s = _sync_s(costs) if synced else 0.0
        self._learn_s = _learn_s(costs, ideal, tokens.tolist())
        self._generation = _Generation(costs, ideal, prompts, responses)
        after_s = min(self._learn_s.values())
        self.step_s = self._sync_s + self._generation.least_s + after_s

    @classmethod
    def of(cls, simulation: Simulation, step: int, prompt_tokens: Any, response_tokens: Any) -> Self:
        """The bound on a step of a simulation. The first has the weights on disk, staleness may do without new ones.

        Raises:
            ConfigError: the configuration names a profile.
            DoesNotFit: the model fits on no number of GPUs.
        """
        costs = simulation.costs
        if not isinstance(costs, Costs):
            profile = costs.engine.profile
            raise ConfigError(f"engine.profile={profile!r}: a bound needs the tables; leave the profile out")
        synced = step > 0 and costs.job.max_staleness == 0
        return cls(costs, simulation.parameters, prompt_tokens, response_tokens, synced=synced)

    def within(self, step_s: float) -> Bound:
        """The least GPU-seconds if the step may last *step_s*.

        Raises:
            Infeasible: no policy does it in that time.
        """
        gpus = np.array(list(self._learn_s))
        learn_s = np.array(list(self._learn_s.values()))
        others = gpus * (learn_s + self._sync_s)
        deadlines_s = step_s - self._sync_s - learn_s
        possible = deadlines_s >= self._generation.least_s * (1 - MARGIN)
        if not possible.any():
            raise Infeasible(f"step_s={step_s:.6g} must be >= {self.step_s:.6g}: no policy is faster")
        gpus, learn_s, others, deadlines_s = (a[possible] for a in (gpus, learn_s, others, deadlines_s))
        before = np.full(len(gpus), -math.inf)  # learning
        for _ in range(TANGENTS):
            best = int(np.argmin(others + before))
            value, slope = self._generation.least_gpu_s(float(deadlines_s[best]))
            if value <= before[best] * (1 + MARGIN):
                break
            # It is convex in the deadline: its tangent holds for the learners of other sizes.
            rise = slope * (deadlines_s - deadlines_s[best]) if slope else 0.0
            before = np.maximum(before, value + rise)
        preparation = dict[int, float]()
        while (best := int(np.argmin(others + before))) not in preparation:
            whole, preparation[best] = self._generation.whole_tasks_gpu_s(float(deadlines_s[best]))
            before[best] = max(before[best], whole)
        return Bound(
            self.step_s,
            float(others[best] + before[best]),
            float(before[best] - preparation[best]),
            preparation[best],
            float(gpus[best] * learn_s[best]),
            float(gpus[best] * self._sync_s),
            int(gpus[best]),
        )


# --- preparation, learning, weight sync ---


def fullest(loads: Floats, ranks: int) -> float:
    """No dealing of *loads* to *ranks* leaves the fullest rank with less (Graham).

    Of the k * ranks + 1 largest, some rank has k + 1: at least the smallest of them.

    >>> fullest(np.array([3.0, 3.0, 2.0, 2.0, 2.0]), 2)
    6.0
    """
    largest = -np.sort(-loads)
    sums = np.concatenate([[0.0], np.cumsum(largest)])
    k = np.arange((len(loads) - 1) // ranks + 1)
    return float(max(sums[-1] / ranks, (sums[k * ranks + 1] - sums[k * ranks - k]).max()))


class _EvenLearning(Learning):
    """Ranks that are as even as can be, and nothing padded."""

    def share(self, lengths: Floats, ranks: int, model: Model, *, head: bool = True) -> Share:
        tokens = fullest(lengths, ranks)
        # Without packing a micro-batch may hold a single response that is longer than the limit.
        limit = self.job.micro_batch_tokens if self.job.packing else max(self.job.micro_batch_tokens, lengths.max())
        return Share(
            tokens, fullest(forward_flops(model, lengths, head=head), ranks), math.ceil(tokens / limit * (1 - MARGIN))
        )


def _learn_s(costs: Costs, ideal: Learning, tokens: list[int]) -> dict[int, float]:
    """Seconds of learning by the number of GPUs that learn, over as many nodes as is best.

    What nodes do to it depends on the largest number of GPUs on one of them.
    """
    seconds, per_node, refusal = {}, costs.node.gpus, DoesNotFit("no GPUs")
    for gpus in range(1, per_node * costs.nodes + 1):
        try:
            costs.memory.check_fit(1, ("learn",), gpus)
        except DoesNotFit as error:
            refusal = error
            continue
        nodes = range(math.ceil(gpus / per_node), min(gpus, costs.nodes) + 1)
        spreads = {(math.ceil(gpus / n), n > 1): n for n in nodes}
        seconds[gpus] = min(ideal.learn_s(tokens, gpus, n) for n in spreads.values())
    if not seconds:
        raise refusal
    return seconds


def _sync_s(costs: Costs) -> float:
    """New weights into the first engine that generates, which has a node's GPUs at most."""
    rate = costs.node.gpus * costs.node.link_bytes_per_s
    loads = [
        costs.movement.sync_load(way, 1, rebuilt=False, crossing=0.0) for way in ("in place", "nccl", "object-store")
    ]
    return min(load.alone_s(rate) for load in loads)


# --- generation ---


@dataclass(frozen=True, slots=True)
class _Columns:
    """Kinds of iterations, one an entry.

    Attributes:
        gpus: Of the engine.
        low: Responses that it has at least.
        high: At most.
        cost_s: Least seconds, what contexts add taken off.
        wall_s: Least seconds.
        kv_tokens: Room of the engine.
        with_prefill: 1 if they hold a first token, else 0.
    """

    gpus: Floats
    low: Floats
    high: Floats
    cost_s: Floats
    wall_s: Floats
    kv_tokens: Floats
    with_prefill: Floats

    def undominated(self) -> _Columns:
        """Without those for which another engine size is never worse."""
        cost = self.gpus * self.cost_s
        pairs = (
            (self.low[:, None] == self.low)
            & (cost[:, None] <= cost)
            & (self.wall_s[:, None] <= self.wall_s)
            & (self.kv_tokens[:, None] >= self.kv_tokens)
            & (self.with_prefill[:, None] <= self.with_prefill)
        )
        same = pairs & pairs.T
        beaten = (pairs & ~same).any(axis=0) | np.triu(same, 1).any(axis=0)
        return _Columns(*(getattr(self, name)[~beaten] for name in self.__slots__))


class _EngineTimes:
    """Least seconds of iterations of an engine, by batch from 1 to *largest*.

    Args:
        times: Of the engine.
        gpus: Of the engine.
        largest: Batch.
        contexts: Where the shortest and the longest mean context and all bends between them are.
        max_batched_tokens: Of an iteration.
    """

    def __init__(
        self, times: IterationTimes, gpus: int, largest: int, contexts: list[float], max_batched_tokens: int
    ) -> None:
        self.gpus, self.batches, self.contexts = gpus, np.arange(1, largest + 1), np.array(contexts)
        self._decode_s = times.decode_s
        self.decode_s = np.array([[times.decode_s(b, c) for c in contexts] for b in range(1, largest + 1)])
        self._shortest_s = np.array([times.decode_s(b, CONTEXT_KNOTS[0]) for b in range(1, largest + 1)])
        sizes = sorted({*range(1, max(largest, 512) + 1), *TOKEN_KNOTS, max_batched_tokens})
        bends = [contexts[-1] + 1, *(knot for knot in ATTENDED_KNOTS if knot <= contexts[-1])]
        prefill_s = np.array([min(times.prefill_s(size, attended) for attended in bends) for size in sizes])
        self._sizes, self._at_least_s = np.array(sizes), np.minimum.accumulate(prefill_s[::-1])[::-1]
        self._prefill_s = self._at_least_s[:largest]
        self._whole_budget_s = prefill_s[sizes.index(max_batched_tokens) :].min()

    def least_s(self, read_gpu_s: float) -> tuple[Floats, Floats]:
        """Decoding, and with prefill, each without the *read_gpu_s* of each token of context."""
        reads_s = read_gpu_s / self.gpus * self.batches[:, None] * self.contexts
        decode_s = (self.decode_s - reads_s).min(axis=1)
        # Beside prefill, one decoding response fewer reads its context.
        beyond = (self.decode_s - self._shortest_s[:, None] - reads_s).min(axis=1)
        beside = np.minimum(np.concatenate([[0.0], np.minimum.accumulate(beyond)[:-1]]), 0.0)
        # Prefill that ends no prompt fills the iteration's budget: it may happen any number of times.
        return np.minimum(decode_s, self._whole_budget_s + beside), self._prefill_s + beside

    def first_s(self, prompts: Floats) -> Floats:
        """Until the first token: an iteration over a whole prompt, or more than one."""
        whole_s = self._at_least_s[np.searchsorted(self._sizes, prompts, side="right") - 1]
        return np.asarray(np.minimum(whole_s, 2 * self._at_least_s[0]))

    def least_wall_s(self, own_read_s: float) -> tuple[Floats, Floats]:
        """The same without the *own_read_s* of each token of context of one response of the batch."""
        shortest, longest = self.contexts[0], self.contexts[-1]
        # Up to where the others may be as short as can be, the mean is that of a longer response; a bend of its own.
        bends = (longest + (self.batches - 1) * shortest) / self.batches
        at_bends_s = np.array([self._decode_s(b, c) for b, c in zip(self.batches.tolist(), bends, strict=True)])
        own = np.minimum(self.batches[:, None] * (self.contexts - shortest) + shortest, longest)
        decode_s = np.minimum((self.decode_s - own_read_s * own).min(axis=1), at_bends_s - own_read_s * longest)
        with_s = self.least_s(0.0)[1]
        return np.minimum(decode_s, self._whole_budget_s - own_read_s * longest), with_s - own_read_s * longest


@dataclass(frozen=True, slots=True)
class _Tasks:
    """Ways to prepare, one an entry: some responses together on some GPUs.

    Attributes:
        members: Responses of a group that are in it, [groups, tasks].
        wall_s: Least seconds from when they are generated to when they are prepared, summed over them, [groups, tasks].
        gpu_s: Least GPU-seconds.
    """

    members: Floats
    wall_s: Floats
    gpu_s: Floats

    @classmethod
    def all_sets(cls, ideal: Learning, tokens: Floats, counts: Floats, gpus_per_node: int) -> _Tasks:
        """Of few responses, equal ones in a group: all that may be together, on GPUs that may be better than fewer."""
        found = []
        for chosen in itertools.product(*(range(int(count) + 1) for count in counts)):
            together = np.repeat(tokens.astype(int), chosen).tolist()
            fastest_s = math.inf
            for gpus in range(1, gpus_per_node + 1) if together else ():
                seconds = ideal.prepare_s(together, gpus, loaded=True)
                if seconds < fastest_s:
                    found.append((chosen, seconds, gpus * seconds))
                    fastest_s = seconds
        members = np.array([chosen for chosen, _, _ in found], dtype=float).T
        return cls(members, members * [seconds for _, seconds, _ in found], np.array([gpu_s for _, _, gpu_s in found]))

    @classmethod
    def relaxed(
        cls, ideal: Learning, tokens: Floats, shortest: list[float], counts: Floats, gpus_per_node: int
    ) -> _Tasks:
        """Of many: a single task that costs what all do on one GPU, and takes each group what its *shortest* does."""
        wall_s = np.array([_prepare_alone_s(ideal, least, gpus_per_node) for least in shortest])
        gpu_s = ideal.prepare_s(tokens.tolist(), 1, loaded=True)
        return cls(counts[:, None], (counts * wall_s)[:, None], np.array([gpu_s]))


class _Generation:
    """The linear programme.

    Its variables are x by column, y by group of responses and column, z by task of preparation, and the deadline D.
    """

    def __init__(self, costs: Costs, ideal: Learning, prompts: Floats, responses: Floats) -> None:
        self._gpus = costs.node.gpus * costs.nodes
        count, longest_first = len(responses), np.lexsort((prompts, -responses))
        # Deadlines bind the longest; the others are held by majorisation alone.
        equal = (np.diff(responses[longest_first]) == 0) & (np.diff(prompts[longest_first]) == 0)
        edges = np.append(np.flatnonzero(~equal) + 1, count) if count <= EXACT else np.array([1, 1 + -(-count // 50)])
        groups = np.split(longest_first, edges)[: len(edges)]
        self._counts = np.array([float(len(group)) for group in groups])
        self._tokens = np.array([responses[group].sum() for group in groups])
        both = prompts + responses
        self._tasks = (
            _Tasks.all_sets(ideal, both[longest_first[edges - 1]], self._counts, costs.node.gpus)
            if count <= FEW
            else _Tasks.relaxed(ideal, both, [both[g].min() for g in groups], self._counts, costs.node.gpus)
        )
        self._after_s = _prepare_alone_s(ideal, both.min(), costs.node.gpus)  # all are generated
        contexts = float((prompts * (responses - 1) + responses * (responses - 1) / 2).sum())
        self._responses, self._all_tokens = float(count), float(responses.sum())
        self._kv_tokens = float(((responses - 1) * (responses - 2) / 2).sum())
        engines = _engines(costs, min(count, costs.max_num_seqs), _bends(prompts, responses))
        read_gpu_s = _best_read_gpu_s(engines, float(responses.sum()), contexts)
        own = prompts * (responses - 1) + responses * (responses - 1) / 2
        self._constant_gpu_s = read_gpu_s * contexts
        own_read_s = _best_own_read_s(engines, responses[longest_first[0]], own[longest_first[0]])
        alone_s = own_read_s * own + np.min([engine.first_s(prompts) for engine in engines], axis=0)
        self._alone_s = np.array([alone_s[group].sum() for group in groups])
        self._columns = _columns(costs, engines, read_gpu_s, own_read_s)
        self._build()
        self.least_s = float(self._solve(self._deadline, (0.0, None)).fun) * (1 - MARGIN)

    def least_gpu_s(self, deadline_s: float) -> tuple[float, float]:
        """The least GPU-seconds before learning, and how fast they fall with the deadline (a tangent)."""
        found = self._solve(self._cost, self._until(deadline_s))
        value = (float(found.fun) + self._constant_gpu_s) * (1 - MARGIN)
        return max(value, 0.0), min(float(found.upper.marginals[-1]), 0.0)

    def whole_tasks_gpu_s(self, deadline_s: float) -> tuple[float, float]:
        """The least GPU-seconds if every task of preparation is done or not, and the part of preparation in it."""
        found = self._solve(self._cost, self._until(deadline_s), whole=True)
        if found.x is None:  # only parts of tasks can be done in time, which is less
            found = self._solve(self._cost, self._until(deadline_s))
            found.mip_dual_bound = found.fun
        value = (float(found.mip_dual_bound) + self._constant_gpu_s) * (1 - MARGIN)
        return max(value, 0.0), float(self._cost[self._z] @ found.x[self._z])

    def _until(self, deadline_s: float) -> tuple[float, float | None]:
        most_s = max(deadline_s, self.least_s * (1 + 2 * MARGIN))
        return 0.0, most_s if most_s < math.inf else None

    def _build(self) -> None:
        columns, groups = self._columns, len(self._counts)
        n = len(columns.gpus)
        x, (y, first) = np.arange(n), n + np.arange(2 * groups * n).reshape(2, groups, n)
        self._z = z = n + 2 * groups * n + np.arange(len(self._tasks.gpu_s))
        d = z[-1] + 1
        self._size = d + 1
        self._cost, self._deadline = np.zeros(self._size), np.zeros(self._size)
        self._cost[x], self._cost[z], self._deadline[d] = columns.gpus * columns.cost_s, self._tasks.gpu_s, 1.0
        rows = _Rows()
        rows.add(n, (y.T, 1.0), (first.T, 1.0), (x[:, None], -columns.high[:, None]))
        both = (y.reshape(-1, 1), 1.0), (first.reshape(-1, 1), 1.0)
        rows.add(y.size, *both, (np.tile(x, groups)[:, None], -np.repeat(self._counts, n)[:, None]))
        every, counts = np.broadcast_to(z, (groups, len(z))), self._counts[:, None]
        prepared = (every, self._tasks.wall_s), (np.full((groups, 1), d), -counts)
        rows.add(groups, (y, columns.wall_s), *prepared, limit=-self._alone_s)
        spent = np.concatenate([x, z])
        rows.add(
            1, (spent[None], self._cost[spent]), (np.array([[d]]), -float(self._gpus)), limit=-self._constant_gpu_s
        )
        generated = -self._constant_gpu_s - self._gpus * self._after_s
        rows.add(1, (x[None], self._cost[x]), (np.array([[d]]), -float(self._gpus)), limit=generated)
        rows.add(1, (x[None], -columns.kv_tokens), limit=-self._kv_tokens)
        rows.add(1, (x[None], -columns.high), limit=-self._all_tokens)
        rows.add(1, (x[None], columns.with_prefill), limit=self._responses)
        self._upper, self._limits = rows.matrix(self._size)
        once = _Rows()
        once.add(groups, (y, 1.0), limit=self._tokens - self._counts)
        once.add(groups, (first, 1.0), limit=self._counts)
        once.add(groups, (every, self._tasks.members), limit=self._counts)
        self._equal, self._equals = once.matrix(self._size)

    def _solve(self, objective: Floats, deadline_s: tuple[float, float | None], *, whole: bool = False) -> Any:
        bounds = [(0.0, None)] * (self._size - 1) + [deadline_s]
        integers = np.isin(np.arange(self._size), self._z).astype(int) if whole else None
        rows = (self._upper, self._limits, self._equal, self._equals)
        options: Any = {"mip_rel_gap": GAP} if whole else None
        found: Any = linprog(objective, *rows, bounds, method="highs", integrality=integers, options=options)
        assert found.success or whole, f"the linear programme of a bound has a solution: {found.message}"
        return found


class _Rows:
    """Rows of a sparse matrix, and their right-hand sides."""

    def __init__(self) -> None:
        self._row: list[Any] = []
        self._column: list[Any] = []
        self._value: list[Any] = []
        self._limits: list[Any] = []
        self._count = 0

    def add(self, count: int, *terms: tuple[Any, Any], limit: Any = 0.0) -> None:
        """Append *count* rows; a term is (indices of variables, coefficients), a row each."""
        for variables, coefficients in terms:
            rows = self._count + np.arange(count)[:, None]
            for parts, array in zip(
                (self._row, self._column, self._value), (rows, variables, coefficients), strict=True
            ):
                parts.append(np.broadcast_to(array, np.shape(variables)).ravel())
        self._limits.append(np.broadcast_to(limit, count))
        self._count += count

    def matrix(self, size: int) -> tuple[Any, Floats]:
        """The rows over *size* variables, and their limits."""
        row, column, value, limits = map(np.concatenate, (self._row, self._column, self._value, self._limits))
        return coo_array((value, (row, column)), shape=(self._count, size)).tocsr(), limits


def _prepare_alone_s(ideal: Learning, tokens: float, gpus_per_node: int) -> float:
    return float(min(ideal.prepare_s([int(tokens)], gpus, loaded=True) for gpus in range(1, gpus_per_node + 1)))


def _bends(prompts: Floats, responses: Floats) -> list[float]:
    """Ends of the range of mean contexts of a decoding batch, and the tables' knots between them."""
    low, high = float(prompts.min()) + 1, max(float((prompts + responses).max()) - 1, float(prompts.min()) + 1)
    return [low, *(float(knot) for knot in CONTEXT_KNOTS if low < knot < high), high]


def _engines(costs: Costs, largest: int, contexts: list[float]) -> list[_EngineTimes]:
    """Engines of all sizes that hold the model."""
    engines = []
    for gpus in range(1, costs.node.gpus + 1):
        try:
            costs.memory.check_fit(gpus, ("decode",), None)
        except DoesNotFit:
            continue
        engines.append(_EngineTimes(costs.times(gpus), gpus, largest, contexts, costs.max_batched_tokens))
    return engines


def _best_read_gpu_s(engines: list[_EngineTimes], tokens: float, contexts: float) -> float:
    """GPU-seconds a token of context, such that the least per token is largest."""

    def least(read_gpu_s: float) -> float:
        by_token = [(e.gpus * e.least_s(read_gpu_s)[0] / e.batches).min() for e in engines]
        return float(read_gpu_s * contexts + tokens * min(by_token))

    span = max(engines[0].contexts[-1] - engines[0].contexts[0], 1.0)
    slopes = [
        float(s)
        for e in engines
        for s in (e.gpus * (e.decode_s[:, -1] - e.decode_s[:, 0]) / span / e.batches)[[0, len(e.batches) // 2, -1]]
    ]
    return max((0.0, *(s for s in slopes if s > 0)), key=least)


def _best_own_read_s(engines: list[_EngineTimes], tokens: float, contexts: float) -> float:
    """Seconds a token of its own context, such that the least time of one response is largest."""

    def least(own_read_s: float) -> float:
        return float(own_read_s * contexts + tokens * min(e.least_wall_s(own_read_s)[0].min() for e in engines))

    span = max(engines[0].contexts[-1] - engines[0].contexts[0], 1.0)
    slopes: list[float] = [max(float(e.decode_s[0, -1] - e.decode_s[0, 0]) / span, 0.0) for e in engines]
    return max((0.0, *slopes), key=least)


def _columns(costs: Costs, engines: list[_EngineTimes], read_gpu_s: float, own_read_s: float) -> _Columns:
    """The kinds of iterations; with prefill only those that a table says are faster so."""
    largest = len(engines[0].batches)
    edges = [*range(1, min(EXACT, largest) + 1)]
    while edges[-1] < largest:
        edges.append(min(max(edges[-1] + 1, math.floor(edges[-1] * GROWTH)), largest))
    found = []
    for engine in engines:
        kv_tokens = costs.memory.kv_blocks(engine.gpus, None) * costs.block_tokens
        costs_s, walls_s = engine.least_s(read_gpu_s), engine.least_wall_s(own_read_s)
        for below, high in itertools.pairwise([0, *edges]):
            (cost_s, with_s), (wall_s, wall_with_s) = (
                [max(float(least[below:high].min()), 0.0) for least in pair] for pair in (costs_s, walls_s)
            )
            found.append((engine.gpus, below + 1, high, cost_s, wall_s, kv_tokens, 0))
            if with_s < cost_s or wall_with_s < wall_s:
                found.append((engine.gpus, below + 1, high, with_s, wall_with_s, kv_tokens, 1))
    return _Columns(*np.array(found, dtype=float).T).undominated()
