"""The lower bound against brute force, against simulated runs, and against hand arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from clusters import make_backend, make_job
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_policy import RandomPolicy
from test_profile import PROFILE

from simrl.experiments.bound import Infeasible, StepBound, _EngineTimes, bound, fullest, gap
from simrl.experiments.config import Config, ConfigError
from simrl.experiments.run import run
from simrl.policies.contract import (
    Assign,
    Decision,
    Learn,
    Observation,
    Prepare,
    Release,
    StageFinished,
    Start,
    StepStarted,
    Subscribe,
    drive,
)
from simrl.simulator.costs import Costs, DoesNotFit, NodeType
from simrl.simulator.engine import Engine, Request
from simrl.traces.iteration import CONTEXT_KNOTS, Execution, IterationTimes, load_iteration_times
from simrl.traces.job import Engine as EngineSpec
from simrl.traces.parameters import Parameters
from simrl.traces.roofline import load_roofline

PROMPT = 20
SIZES = range(1, 9)
Point = tuple[float, float]  # seconds, GPU-seconds
Phases = list[tuple[int, tuple[int, list[Point]]]]  # unfinished responses, iterations, the ways to do them


@dataclasses.dataclass
class Early:
    """Preparation of all but the *late* longest responses before generation is over, in one task.

    In *static* it follows on the GPUs of those engines, which have to be done *sooner_s* before the others.
    """

    late: int
    sooner_s: float
    phases: Phases
    rest_of_cut: list[Point]
    rest_of_static: list[Point]


class BruteForce:
    """Schedules of a step without weight sync, by enumeration; each is one that a policy could make.

    Generation is the cheapest of two families. *Static*: every partition of the responses into engines of 1 to 8
    GPUs, each timed by the simulator's engine, longest first. *Cut*: all unfinished responses go on at the same mean
    pace, in any partition, or (between completions that are 8 tokens apart or more) taking turns in any set of engines
    that never wait. Both may change when a response finishes, and at one token between; migration is free and takes no
    time. Then preparation on 1 to n functions of one GPU, then learning on any number of GPUs. The shorter responses
    may be prepared before that, in one task: in *cut* on a GPU that generation does without from when they are done.
    """

    def __init__(self, costs: Costs, lengths: Sequence[int]) -> None:
        self.costs, self.lengths = costs, sorted(lengths, reverse=True)
        self.gpus = costs.node.gpus * costs.nodes
        self.sizes = [g for g in SIZES if g <= self.gpus and _fits(costs, g, "decode")]
        tokens = [PROMPT + n for n in self.lengths]
        learn = {
            n: costs.learning.learn_s(tokens, n, math.ceil(n / costs.node.gpus))
            for n in range(1, self.gpus + 1)
            if _fits(costs, n, "learn")
        }
        self.learn = list(learn.items())
        self.phases = self._phases(len(tokens))
        self.rest = self._rest(self._prepare(tokens, self.gpus))
        some = [n for n in range(1, len(tokens)) if self.gpus > 1 and self.lengths[n] < self.lengths[n - 1]]
        self.early = [self._early(tokens, late) for late in some]
        self.engine = functools.cache(self._engine)

    def _prepare(self, tokens: list[int], most: int) -> list[list[float]]:
        """Seconds of each task, on 1 to *most* functions."""
        shares = [[tokens[i::h] for i in range(h)] for h in range(1, min(len(tokens), most) + 1)]
        return [[self.costs.learning.prepare_s(share, 1, loaded=True) for share in part] for part in shares]

    def _rest(self, prepare: list[list[float]], before_gpu_s: float = 0.0) -> list[Point]:
        """Seconds after generation, and GPU-seconds: what is not beaten in both."""
        rest = sorted((max(p) + s, before_gpu_s + sum(p) + n * s) for p in prepare for n, s in self.learn)
        return [point for i, point in enumerate(rest) if all(point[1] < faster[1] for faster in rest[:i])]

    def _early(self, tokens: list[int], late: int) -> Early:
        """What there is to do if only the *late* longest are prepared after generation."""
        phases = self._phases(late)
        after_s = sum(options[-1][0] for active, (_, options) in phases if active <= late)
        early_s = self.costs.learning.prepare_s(tokens[late:], 1, loaded=True)
        prepare = self._prepare(tokens[:late], self.gpus - 1)
        in_time = [p for p in prepare if early_s <= after_s + max(p)]
        late_s = max(prepare[-1])
        return Early(late, early_s - late_s, phases, self._rest(in_time, early_s), self._rest(prepare, early_s))

    def gpu_s(self, step_s: float) -> float:
        """The least GPU-seconds in *step_s*."""
        plain = min(self.generation_gpu_s(step_s - rest_s) + gpu_s for rest_s, gpu_s in self.rest)
        return min(plain, min((self._early_gpu_s(step_s, early) for early in self.early), default=math.inf))

    def _early_gpu_s(self, step_s: float, early: Early) -> float:
        cut = (self.cut(step_s - rest_s, early.phases) + gpu_s for rest_s, gpu_s in early.rest_of_cut)
        static = (
            self.static(self.lengths[: early.late], step_s - rest_s, gpus)
            + self.static(self.lengths[early.late :], step_s - rest_s - early.sooner_s, self.gpus - gpus)
            + gpu_s
            for rest_s, gpu_s in early.rest_of_static
            for gpus in range(1, self.gpus)
        )
        return min(*cut, *static, math.inf, math.inf)

    def step_s(self) -> float:
        """The least step time."""
        return self.least_generation_s() + min(rest_s for rest_s, _ in self.rest)

    def generation_gpu_s(self, limit_s: float) -> float:
        return min(self.static(self.lengths, limit_s, self.gpus), self.cut(limit_s, self.phases))

    def least_generation_s(self) -> float:
        times = sorted({self.engine(block, g) for block in self._blocks() for g in self.sizes})
        static_s = next((t for t in times if self.static(self.lengths, t, self.gpus) < math.inf), math.inf)
        return min(static_s, sum(options[-1][0] for _, (_, options) in self.phases))

    def _blocks(self) -> set[tuple[int, ...]]:
        return {b for n in range(1, len(self.lengths) + 1) for b in itertools.combinations(self.lengths, n)}

    def _engine(self, block: tuple[int, ...], gpus: int) -> float:
        """Seconds of the simulator's engine."""
        c = self.costs
        blocks = c.memory.kv_blocks(gpus, None)
        engine = Engine[Request](c.times(gpus), blocks, c.max_num_seqs, c.max_batched_tokens)
        for i, length in enumerate(block):
            engine.add(Request(i, i, PROMPT, length, 0, 0, 0, 0, 0))
        seconds = 0.0
        while (span := engine.plan()) is not None:
            seconds += span.seconds
            engine.advance(span.iterations)
        return seconds

    def static(self, lengths: list[int], limit_s: float, most: int) -> float:
        @functools.cache
        def least(left: tuple[int, ...], gpus: int) -> float:
            if not left:
                return 0.0
            found = math.inf
            for n in range(len(left)):
                for others in set(itertools.combinations(left[1:], n)):
                    rest = list(left[1:])
                    for length in others:
                        rest.remove(length)
                    for g in self.sizes:
                        seconds = self.engine((left[0], *others), g)
                        if g <= gpus and seconds <= limit_s:
                            found = min(found, g * seconds + least(tuple(rest), gpus - g))
            return found

        return least(tuple(lengths), most)

    def _phases(self, late: int) -> Phases:
        """Unfinished responses, iterations between completions, and the ways to do them.

        With no more than *late* unfinished a GPU is left to preparation, but if these are all.
        """
        everyone = len(self.lengths)
        found = [(everyone, (1, self._options(everyone, self.gpus, self._prefill, rotate=False)))]
        done = 1
        for active in range(len(self.lengths), 0, -1):
            end = self.lengths[active - 1]
            if end > done:
                span = functools.partial(self._decode, context=PROMPT + done, iterations=end - done)
                gpus = self.gpus - (active <= late < everyone)
                found.append((active, (end - done, self._options(active, gpus, span, rotate=end - done >= 8))))
                done = end
        return found

    def _prefill(self, batch: int, gpus: int) -> float:
        return self.costs.times(gpus).prefill_s(PROMPT * batch, PROMPT / 2)

    def _decode(self, batch: int, gpus: int, *, context: int, iterations: int) -> float:
        return self.costs.times(gpus).decode_span_s(batch, context, iterations)

    def _options(self, active: int, gpus: int, seconds: Callable[[int, int], float], *, rotate: bool) -> list[Point]:
        """The lower hull of (seconds, GPU-seconds), cheapest first."""
        most = min(active, self.costs.max_num_seqs)
        times = {(b, g): seconds(b, g) for b in range(1, most + 1) for g in self.sizes if g <= gpus}
        points = [(t, self._at_one_pace(active, gpus, times, t)) for t in set(times.values())]
        full, rest = divmod(active, most)
        for g in (g for b, g in times if b == 1):  # batch after batch
            t = full * times[most, g] + (times[rest, g] if rest else 0.0)
            points.append((t, g * t))
        if rotate:
            points += self._rotating(active, gpus, times)
        hull: list[Point] = []
        for point in sorted((p for p in points if p[1] < math.inf), key=lambda p: (p[1], p[0])):
            if hull and point[0] >= hull[-1][0]:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        return hull

    def _at_one_pace(self, active: int, gpus: int, times: dict[tuple[int, int], float], limit_s: float) -> float:
        """All go on side by side, each engine within *limit_s*: least GPU-seconds, by batches and GPUs."""
        best = np.full((active + 1, gpus + 1), math.inf)
        best[0] = 0.0
        for m in range(1, active + 1):
            for (b, g), t in times.items():
                if b <= m and t <= limit_s:
                    best[m, g:] = np.minimum(best[m, g:], g * t + best[m - b, : gpus + 1 - g])
        return float(best[active, gpus])

    def _rotating(self, active: int, most: int, times: dict[tuple[int, int], float]) -> list[Point]:
        """Engines never wait, responses take turns on them and in waiting: most tokens a second by number of GPUs."""
        rate = np.zeros((active + 1, most + 1))
        for m, gpus in itertools.product(range(1, active + 1), range(1, most + 1)):
            rate[m, gpus] = max(
                (b / t + rate[m - b, gpus - g] for (b, g), t in times.items() if b <= m and g <= gpus), default=0.0
            )
        return [(active / r, g * active / r) for g, r in enumerate(rate[active]) if r > 0]

    def cut(self, limit_s: float, phases: Phases) -> float:
        gpu_s = sum(options[0][1] for _, (_, options) in phases)
        over_s = sum(options[0][0] for _, (_, options) in phases) - limit_s
        moves = [(_slope(a, b), n, a, b) for _, (n, options) in phases for a, b in itertools.pairwise(options)]
        for _, n, a, b in sorted(moves):
            if over_s <= 0:
                return gpu_s
            share = min(math.ceil(n * over_s / (a[0] - b[0])) / n, 1.0)  # at a token boundary
            over_s -= share * (a[0] - b[0])
            gpu_s += share * (b[1] - a[1])
        return gpu_s if over_s <= 1e-9 * limit_s else math.inf


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])


def _fits(costs: Costs, gpus: int, role: str) -> bool:
    try:
        costs.memory.check_fit(gpus, (role,), gpus if role == "learn" else None)  # type: ignore[arg-type]
    except DoesNotFit:
        return False
    return True


def small_case(
    lengths: Sequence[int],
    model: str = "qwen2.5-0.5b",
    node_type: str = "g6e.48xlarge",
    gpus: int = 8,
    **engine: object,
) -> tuple[StepBound, BruteForce]:
    table = Parameters()
    job = make_job([[[n] for n in lengths]], model=model)
    node = dataclasses.replace(NodeType.load(node_type, table), gpus=gpus)
    costs = Costs(job, EngineSpec(tensor_parallel=1, **engine), node, 1, table)
    return StepBound(costs, table, [PROMPT] * len(lengths), lengths, synced=False), BruteForce(costs, lengths)


# --- brute force ---

SHAPES = {
    "one": [40],
    "two": [64, 9],
    "equal": [40] * 8,
    "tail": [64] + [8] * 7,
    "halves": [60] * 4 + [12] * 4,
    "linear": [13, 26, 38, 51, 64],
    "mixed": [64, 50, 30, 30, 12, 12],
    "short": [3] * 8,
}
MACHINES = {
    "L40S": {},
    "H100": {"model": "qwen2.5-7b", "node_type": "p5.48xlarge"},
    "eager": {"preset": "vllm-0.8-eager"},
    "one GPU": {"gpus": 1},
    "three slots": {"max_num_seqs": 3},
    "one GPU, three slots": {"gpus": 1, "max_num_seqs": 3},
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_is_below_brute_force_and_near_it(shape, machine):
    least, brute = small_case(SHAPES[shape], **MACHINES[machine])
    fastest_s = brute.step_s()
    assert least.step_s <= fastest_s <= (1.05 if machine == "one GPU, three slots" else 1.01) * least.step_s
    near = {1: 1.5, 1.05: 1.17, 1.15: 1.12} if machine == "three slots" else {1: 1.5, 1.05: 1.05}
    for stretch in (1, 1.05, 1.15, 1.3, 2, math.inf):
        most = brute.gpu_s(stretch * fastest_s * (1 + 1e-9))
        assert least.within(stretch * fastest_s).gpu_s <= most
        assert most <= near.get(stretch, 1.05) * least.within(stretch * fastest_s).gpu_s
        # From any point of the bound's curve a schedule is no farther than a tenth in both directions.
        assert brute.gpu_s(1.1 * stretch * least.step_s) <= 1.1 * least.within(stretch * least.step_s).gpu_s
    assert brute.gpu_s(math.inf) <= 1.1 * least.within(math.inf).gpu_s


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=6),
    st.sampled_from(sorted(MACHINES)),
    st.floats(1, 1.2),
)
def test_no_schedule_of_brute_force_is_below_the_bound(lengths, machine, stretch):
    least, brute = small_case(lengths, **MACHINES[machine])
    limit_s = stretch * brute.step_s()
    assert least.step_s <= brute.step_s()
    assert least.within(limit_s).gpu_s <= brute.gpu_s(limit_s * (1 + 1e-9))


def test_a_simulated_policy_does_what_brute_force_counts():
    lengths = [50, 50, 20, 20, 6]
    least, brute = small_case(lengths)
    blocks = [(50, 50, 20), (20, 6)]
    backend, recorder = make_backend(brute.costs, [[[n] for n in lengths]], PROMPT)
    drive(backend, Scripted([(0, 1, 2), (3, 4)]))
    frames = recorder.frames()
    busy = frames.workers[frames.workers["state"] == "busy"]
    gpu_s = (busy["gpus"] * (busy["end_s"] - busy["start_s"])).groupby(busy["stage"]).sum()
    assert gpu_s["generation"] == pytest.approx(sum(brute.engine(block, 1) for block in blocks))
    tokens = [PROMPT + n for n in lengths]
    assert gpu_s["preparation"] == pytest.approx(brute.costs.learning.prepare_s(tokens, 1))
    assert gpu_s["learning"] == pytest.approx(brute.costs.learning.learn_s(tokens, 1, 1))
    assert brute.gpu_s(math.inf) <= gpu_s.sum()
    assert least.within(math.inf).gpu_s <= gpu_s.sum()


class Scripted:
    """Engines of one GPU with given responses, and one GPU that prepares and learns."""

    def __init__(self, parts: Sequence[tuple[int, ...]]) -> None:
        self.parts = {f"engine-{i}": part for i, part in enumerate(parts)}

    def decide(self, observation: Observation) -> list[Decision]:
        decisions: list[Decision] = []
        for event in observation.events:
            match event:
                case StepStarted():
                    decisions += [Subscribe(StageFinished(stage)) for stage in ("generation", "preparation")]
                    decisions.append(Start("learner", 1, ("prepare", "learn")))
                    for name, part in self.parts.items():
                        decisions += [Start(name, 1, ("decode",)), Assign(name, part)]
                case StageFinished("generation"):
                    decisions += [Release(name) for name in self.parts]
                    decisions.append(Prepare(("learner",), observation.unprepared))
                case StageFinished("preparation"):
                    decisions.append(Learn(("learner",)))
        return decisions


# --- simulated runs ---

NO_OVERHEAD = {  # what the bound does not count would hide that it is too high
    "start": dict.fromkeys(("runtime_s", "init_s", "compile_s", "capture_s", "warm_up_s"), 0.0)
    | dict.fromkeys(("download_bytes_per_s", "load_bytes_per_s"), 1e15),
    "switch": dict.fromkeys(("engine_sleep_s", "engine_wake_s", "sync_setup_s", "broadcast_setup_s"), 0.0),
}


@settings(max_examples=12, deadline=None)
@given(
    policy=st.sampled_from(["verl", "rlhfuse", "rlhfless", "oracle", "random"]),
    machine=st.sampled_from([("qwen2.5-0.5b", "g6e.48xlarge", 1), ("qwen2.5-7b", "p5.48xlarge", 2)]),
    preset=st.sampled_from(["vllm-current", "vllm-0.8-eager"]),
    prompts=st.integers(2, 6),
    samples=st.integers(1, 4),
    longest=st.integers(4, 400),
    slots=st.sampled_from([None, 3]),
    packing=st.booleans(),
    seed=st.integers(0, 100),
)
def test_no_run_is_below_the_bound(policy, machine, preset, prompts, samples, longest, slots, packing, seed):
    model, node_type, nodes = machine
    assume(policy != "random" or model == "qwen2.5-0.5b")  # it does not care for what fits
    config = Config.model_validate({
        "policy": policy if policy in ("verl", "rlhfuse") else "rlhfless",
        "policy_params": {"lengths": "oracle"} if policy == "oracle" else {},
        "seed": seed,
        "job": {
            "model": model, "prompts_per_step": prompts, "responses_per_prompt": samples, "steps": 2,
            "max_response_tokens": longest, "mini_batch_prompts": 3, "packing": packing,
        },
        "cluster": {"node_type": node_type, "nodes": nodes, "parameters": NO_OVERHEAD},
        "engine": {"preset": preset, "tensor_parallel": 2, "max_num_seqs": slots},
    })  # fmt: skip
    rows = gap(run(config, policy=RandomPolicy(seed) if policy == "random" else None))  # decides whatever is legal
    assert len(rows) == 2
    assert (rows[["step_gap", "busy_gap", "gpu_gap"]] >= 1).all(axis=None)
    assert (rows["gpu_gap"] >= rows["busy_gap"]).all()
    assert bound(config, 1).gpu_s <= rows["bound_gpu_s"][1] * (1 + 1e-5)
    assert bound(config, 1).step_s == pytest.approx(rows["bound_step_s"][1])


# --- by hand ---


@pytest.mark.parametrize(
    ("lengths", "slots", "iterations"),
    [([10, 64, 33], None, 64), ([64] + [8] * 39, None, 64), ([64] + [8] * 39, 3, (64 + 8 * 39) / 3)],
)
def test_where_launches_set_the_pace_iterations_on_one_gpu_are_counted(lengths, slots, iterations):
    least, _ = small_case(lengths, preset="vllm-0.8-eager", max_num_seqs=slots, gpus=1)
    gpu_s = least.within(math.inf)
    assert gpu_s.generation_gpu_s == pytest.approx(iterations * 24 * 1.43e-3, rel=1e-4)
    assert least.step_s == pytest.approx(gpu_s.gpu_s, rel=1e-4)  # one GPU does one thing after the other


def test_first_tokens_may_be_cheaper_than_decoding():
    table = Parameters()
    costs = Costs(make_job([[[1]] * 192]), EngineSpec(), NodeType.load("g6e.48xlarge", table), 1, table)
    costs = Costs(costs.job.model_copy(update={"model": "qwen2.5-7b"}), costs.engine, costs.node, 2, table)
    prefill_s, decode_s = costs.times(1).prefill_s(192, 0.5), costs.times(1).decode_s(192, 1)
    assert prefill_s < 0.95 * decode_s  # so says the table
    least = StepBound(costs, table, [1] * 192, [1] * 192, synced=False).within(math.inf)
    assert least.generation_gpu_s <= prefill_s


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 300),
    first=st.integers(0, 300),
    prefill=st.integers(0, 9000),
    context=st.floats(21, 5000),
    attended=st.floats(0.5, 5000),
    read_gpu_s=st.sampled_from([0.0, 4e-8, 1e-7, 3e-7]),
    gpus=st.sampled_from(SIZES),
)
def test_no_iteration_is_faster_than_the_least(batch, first, prefill, context, attended, read_gpu_s, gpus):
    times, engine = engine_times(gpus)
    decode_s, prefill_s = engine.least_s(read_gpu_s)
    reads_s = read_gpu_s * batch * context / gpus
    assert times.decode_s(batch, context) >= (decode_s[batch - 1] + reads_s) * (1 - 1e-9)
    wall_s, wall_with_s = (least[batch - 1] for least in engine.least_wall_s(read_gpu_s))
    for mean in (context, (5000 + (batch - 1) * 21) / batch):
        own_s = read_gpu_s * min(batch * mean - (batch - 1) * 21, 5000)  # of the longest that may be among the shortest
        assert times.decode_s(batch, mean) >= wall_s + own_s - 1e-12
        assert not prefill or times.iteration_s(prefill, attended, batch, mean) >= wall_with_s + own_s - 1e-12
    if prefill:
        assert times.prefill_s(prefill, attended) >= engine.first_s(np.array([float(prefill)]))[0] * (1 - 1e-9)
    if first:  # each has a token of prefill at least
        seconds = times.iteration_s(first + prefill, attended, batch, context)
        assert seconds >= (prefill_s[batch + first - 1] + reads_s) * (1 - 1e-9)


@functools.cache
def engine_times(gpus: int) -> tuple[IterationTimes, _EngineTimes]:
    table = Parameters()
    times = load_iteration_times(table.model("qwen2.5-7b"), "l40s", gpus)
    if times is None:
        times = load_roofline(table.model("qwen2.5-7b"), "l40s", gpus, table, Execution())
    return times, _EngineTimes(times, gpus, 600, [21.0, *(k for k in CONTEXT_KNOTS if 21 < k < 5000), 5000.0], 16384)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 4))
def test_no_dealing_is_more_even(loads, ranks):
    ends = itertools.product(range(ranks), repeat=len(loads))
    best = min(max(np.bincount(end, loads, ranks)) for end in ends)
    assert fullest(np.array(loads, dtype=float), ranks) <= best


def test_more_time_never_costs_more():
    least, _ = small_case([64, 40, 40, 10], model="qwen2.5-7b", node_type="p5.48xlarge")
    gpu_s = [least.within(least.step_s * stretch).gpu_s for stretch in (1, 1.1, 1.2, 1.5, 2, 4, math.inf)]
    assert gpu_s == sorted(gpu_s, reverse=True)
    assert gpu_s[0] > 1.2 * gpu_s[-1]
    with pytest.raises(Infeasible, match=r"^step_s=.* must be >= .*: no policy is faster$"):
        least.within(0.9 * least.step_s)


def test_a_profile_has_no_tables(tmp_path):
    PROFILE.write(tmp_path / "p.json")
    sizes = {"prompts_per_step": 4, "dataset_prompts": 8, "max_prompt_tokens": 64, "max_response_tokens": 64}
    engine = {"tensor_parallel": 1, "profile": str(tmp_path / "p.json")}
    with pytest.raises(ConfigError, match=r"^engine\.profile='.*p\.json': a bound needs the tables"):
        bound(Config.model_validate({"job": sizes, "engine": engine}), 0)
