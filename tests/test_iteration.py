import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.experiments.derive_iteration_times import MODELS, Estimator, configurations
from simrl.traces.iteration import (
    BATCH_KNOTS,
    CONTEXT_KNOTS,
    Execution,
    IterationTimes,
    Table,
    graph_batches,
    load_iteration_times,
)
from simrl.traces.models import load_model

SHIPPED = list(configurations())

DECODE = Table((1, 3, 5), (10, 20, 40), ((1, 2, 6), (3, 6, 8), (4, 6, 12)))
PREFILL = Table((1, 11), (10, 30), ((2, 4), (22, 44)))


def times_of(decode=DECODE, prefill=PREFILL, **options):
    return IterationTimes(decode, prefill, execution=Execution(**options), source="this test", status="assumed")


def shipped(name, gpu, tensor_parallel, **options):
    times = load_iteration_times(load_model(name), gpu, tensor_parallel, Execution(**options))
    assert times is not None
    return times


def plain_sum(times, batch, context, iterations):
    return math.fsum(times.decode_s(batch, context + j) for j in range(iterations))


# Lookups


def test_decode_at_and_between_knots():
    times = times_of()
    assert times.decode_s(1, 10) == 1
    assert times.decode_s(5, 40) == 12
    assert times.decode_s(1, 15) == pytest.approx((1 + 2) / 2)
    assert times.decode_s(2, 20) == pytest.approx((2 + 6) / 2)
    assert times.decode_s(4, 30) == pytest.approx(((6 + 8) / 2 + (6 + 12) / 2) / 2)


def test_prefill_between_knots():
    assert times_of().prefill_s(6, 20) == pytest.approx(((2 + 4) / 2 + (22 + 44) / 2) / 2)


def test_launches_hide_kernels_that_are_faster_and_overhead_adds_to_both():
    times = times_of(calibration=2.0, launch_s=5.0, overhead_s=0.25)
    assert times.decode_s(1, 10) == max(2 * 1, 5) + 0.25
    assert times.decode_s(5, 40) == max(2 * 12, 5) + 0.25


def test_graphs_pad_the_linear_layers_of_a_batch_and_not_its_context():
    times = times_of(graph_batches=(1, 3, 4))
    assert times.decode_s(1, 20) == 2
    # Batch 2 at context 20 reads (2 + 6) / 2 = 4, of which its linear layers, at the first knot, (1 + 3) / 2 = 2;
    # those of batch 3 take 3.
    assert times.decode_s(2, 20) == pytest.approx(4 + (3 - 2))
    assert times.decode_s(5, 20) == 6  # larger than any captured
    assert times.prefill_s(2, 10) == pytest.approx(2 + 2 * 2)  # 3 tokens, 2 each


def test_reading_kv_of_another_type_scales_what_context_adds():
    times = times_of(kv_read_factor=0.5)
    assert times.decode_s(1, 40) == 1 + (6 - 1) / 2
    assert times.prefill_s(1, 30) == 4  # of prompts it is computing


def test_captured_batches_are_those_of_vllm():
    assert graph_batches(512, 256, 16) == (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
    assert graph_batches(512, 256, 8) == (1, 2, 4, *range(8, 513, 8))
    assert graph_batches(20, 256, 16) == (1, 2, 4, 8, 16)
    assert graph_batches(3, 256, 16) == (1, 2)


def test_calibration_scales_the_table_and_overhead_adds():
    times = times_of(calibration=1.5, overhead_s=0.25)
    assert times.decode_s(1, 20) == pytest.approx(2 * 1.5 + 0.25)
    assert times.prefill_s(11, 30) == pytest.approx(44 * 1.5 + 0.25)


def test_a_time_holds_below_the_first_knot():
    times = times_of(decode=Table((4, 8), (10, 20), ((1, 3), (5, 9))))
    assert times.decode_s(1, 0) == 1
    assert times.decode_s(6, 2.5) == pytest.approx((1 + 5) / 2)
    assert times.extrapolated == 0


def test_the_last_segment_goes_on_beyond_the_last_knot_and_is_counted():
    times = times_of()
    assert times.decode_s(1, 60) == pytest.approx(6 + (6 - 2))
    assert times.decode_s(7, 10) == pytest.approx(4 + (4 - 3))
    assert times.prefill_s(21, 10) == pytest.approx(22 + (22 - 2))
    assert times.extrapolated == 3
    times.decode_span_s(1, 35, 7)  # 35 .. 41
    assert times.extrapolated == 4
    times.decode_span_s(1, 35, 6)  # 35 .. 40
    times.decode_s(5, 40)
    assert times.extrapolated == 4


def test_a_table_that_falls_at_its_end_goes_on_level():
    times = times_of(decode=Table((1, 2), (1, 10, 11), ((5, 5, 4), (5, 3, 2))))
    assert times.decode_s(1, 1000) == pytest.approx(4)
    assert times.decode_s(100, 1000) == pytest.approx(2)


def test_one_knot_is_a_constant():
    times = times_of(decode=Table((8,), (100,), ((3,),)))
    assert times.decode_s(1, 1) == times.decode_s(8, 100) == times.decode_s(16, 1000) == 3


@pytest.mark.parametrize("batch", [0, -1])
def test_an_iteration_needs_a_token(batch):
    with pytest.raises(ValueError, match=f"at least 1 token, got {batch}"):
        times_of().decode_s(batch, 10)


# Mixed iterations


def test_a_mixed_iteration_by_hand():
    # 4 prompt tokens and 2 decoding requests pass the layers as 6; the requests count with the shortest context, 10.
    through_layers = times_of().prefill_s(6, (4 * 25 + 2 * 10) / 6)
    reading = (2 + 6) / 2 - (1 + 3) / 2
    assert times_of(overhead_s=0.5).iteration_s(4, 25, 2, 20) == pytest.approx(through_layers + reading + 0.5)


def test_an_iteration_of_one_part_takes_that_part_s_time():
    times = times_of(overhead_s=0.5)
    assert times.iteration_s(0, 0.0, 2, 15) == times.decode_s(2, 15)
    assert times.iteration_s(6, 20, 0, 0.0) == times.prefill_s(6, 20)


@pytest.mark.parametrize(
    ("configuration", "tokens", "batch", "context", "milliseconds"),
    [
        # aiconfigurator-core's own mixed iterations: one fresh prompt of `tokens`, `batch` requests at `context`.
        (("qwen2.5-7b", "l40s", 1), 1024, 32, 1024, 76.8),
        (("qwen2.5-7b", "l40s", 2), 1024, 32, 1024, 66.2),
        (("qwen2.5-7b", "h100", 1), 1024, 32, 1024, 23.7),
        (("qwen2.5-7b", "l40s", 1), 256, 128, 4096, 75.1),
    ],
)
def test_mixed_iterations_are_near_the_estimator(configuration, tokens, batch, context, milliseconds):
    ours_s = shipped(*configuration).iteration_s(tokens, tokens / 2, batch, context)
    assert ours_s * 1e3 == pytest.approx(milliseconds, rel=0.03)


# Spans

grid_times = st.floats(0.001, 10.0)


@st.composite
def tables(draw):
    tokens = tuple(sorted(draw(st.sets(st.integers(1, 50), min_size=1, max_size=4))))
    contexts = tuple(sorted(draw(st.sets(st.floats(0, 200).map(lambda x: round(x, 2)), min_size=1, max_size=6))))
    row = st.tuples(*[grid_times] * len(contexts))
    return Table(tokens, contexts, tuple(draw(row) for _ in tokens))


spans = {
    "decode": tables(),
    "batch": st.integers(1, 60),
    "context": st.floats(0, 250),
    "overhead_s": st.sampled_from([0.0, 0.04]),
}


@given(**spans, iterations=st.integers(0, 400))
@settings(deadline=None)
def test_a_span_is_the_plain_sum(decode, batch, context, overhead_s, iterations):
    times = times_of(decode=decode, overhead_s=overhead_s)
    expected = plain_sum(times, batch, context, iterations)
    assert times.decode_span_s(batch, context, iterations) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(
    batch=st.integers(1, 600),
    context=st.floats(1, 40000),
    iterations=st.integers(0, 3000),
    where=st.sampled_from(SHIPPED),
)
@settings(deadline=None, max_examples=60)
def test_a_span_over_the_shipped_tables_is_the_plain_sum(batch, context, iterations, where):
    times = shipped(*where, overhead_s=0.003)
    expected = plain_sum(times, batch, context, iterations)
    assert times.decode_span_s(batch, context, iterations) == pytest.approx(expected, rel=1e-9)


def test_a_span_by_hand():
    # Contexts 8 .. 22 at batch 1: level below 10, slope 1/10 to 20, then 4/20.
    level = 2 * 1
    middle = sum(1 + j / 10 for j in range(10))
    end = sum(2 + j * 4 / 20 for j in range(3))
    assert times_of().decode_span_s(1, 8, 15) == pytest.approx(level + middle + end)


def test_a_span_cannot_be_negative():
    with pytest.raises(ValueError, match="iterations=-1 must be >= 0"):
        times_of().decode_span_s(1, 10, -1)


@given(**spans, iterations=st.integers(0, 400))
@settings(deadline=None)
def test_iterations_until_inverts_the_span(decode, batch, context, overhead_s, iterations):
    times = times_of(decode=decode, overhead_s=overhead_s)
    seconds = times.decode_span_s(batch, context, iterations)
    assert times.iterations_until(batch, context, seconds) == iterations
    assert times.iterations_until(batch, context, seconds * (1 + 1e-14)) == iterations
    assert times.iterations_until(batch, context, seconds * (1 + 1e-9) + 1e-6) == iterations + 1


@given(**spans, seconds=st.floats(0.01, 500))
@settings(deadline=None)
def test_iterations_until_is_the_smallest_number(decode, batch, context, overhead_s, seconds):
    times = times_of(decode=decode, overhead_s=overhead_s)
    count = times.iterations_until(batch, context, seconds)
    assert times.decode_span_s(batch, context, count) >= seconds * (1 - 1e-9)
    assert times.decode_span_s(batch, context, count - 1) < seconds * (1 + 1e-9)


def test_iterations_until_nothing_has_to_pass():
    assert times_of().iterations_until(1, 10, 0.0) == 0
    assert times_of().iterations_until(1, 10, -1.0) == 0


def test_iterations_until_refuses_what_no_number_reaches():
    with pytest.raises(ValueError, match="seconds=inf must be finite"):
        times_of().iterations_until(1, 10, math.inf)
    with pytest.raises(ValueError, match="take no time"):
        times_of(decode=Table((1,), (1,), ((0,),))).iterations_until(1, 10, 1.0)


# Flat batch


def test_flat_batch_by_hand():
    # At context 10 the times are 1, 2, 3, 3.5, 4 for batches 1 to 5.
    times = times_of()
    assert [times.flat_batch(10, tolerance) for tolerance in (0, 0.9, 1, 2.4, 2.5, 2.9, 3, 100)] == [
        1,
        1,
        2,
        3,
        4,
        4,
        5,
        5,
    ]


def test_flat_batch_takes_the_largest_where_a_table_dips():
    times = times_of(decode=Table((1, 2, 3, 5), (1,), ((4,), (6,), (4,), (8,))))
    assert times.flat_batch(1, 0.0) == 3
    assert times.flat_batch(1, 0.5) == 4


@given(where=st.sampled_from(SHIPPED), context=st.floats(1, 30000), tolerance=st.floats(0, 3))
@settings(deadline=None, max_examples=40)
def test_no_larger_batch_is_within_the_tolerance(where, context, tolerance):
    times = shipped(*where)
    batch = times.flat_batch(context, tolerance)
    limit_s = (1 + tolerance) * times.decode_s(1, context)
    assert times.decode_s(batch, context) <= limit_s
    assert all(times.decode_s(larger, context) > limit_s for larger in range(batch + 1, BATCH_KNOTS[-1] + 1))


def test_flat_batch_refuses_a_negative_tolerance():
    with pytest.raises(ValueError, match=r"tolerance=-0\.1 must be >= 0"):
        times_of().flat_batch(10, -0.1)


# Validation


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -0.001])
def test_a_bad_time_is_named_by_its_row(seconds):
    with pytest.raises(ValueError, match=rf"row tokens=3, context=20: seconds={seconds} must be finite and >= 0"):
        Table((1, 3), (10, 20), ((1, 2), (3, seconds)))


def test_knots_must_ascend():
    with pytest.raises(ValueError, match=r"tokens\[1\]=1 must be finite and above tokens\[0\]=3"):
        Table((3, 1), (10,), ((1,), (2,)))
    with pytest.raises(ValueError, match=r"contexts\[2\]=10 must be finite and above contexts\[1\]=10"):
        Table((1,), (5, 10, 10), ((1, 2, 3),))
    with pytest.raises(ValueError, match=r"contexts\[1\]=nan must be finite"):
        Table((1,), (5, math.nan), ((1, 2),))
    with pytest.raises(ValueError, match=r"contexts\[0\]=-1 must be finite and >= 0"):
        Table((1,), (-1, 5), ((1, 2),))
    with pytest.raises(ValueError, match="tokens needs at least one knot"):
        Table((), (), ())


def test_a_table_must_be_full():
    with pytest.raises(
        ValueError, match=r"row tokens=3: expected one time for each of contexts=\(10, 20\), got \(3,\)"
    ):
        Table((1, 3), (10, 20), ((1, 2), (3,)))
    with pytest.raises(ValueError, match=r"expected one row for each of tokens=\(1, 3\), got 1"):
        Table((1, 3), (10, 20), ((1, 2),))
    with pytest.raises(ValueError, match="row tokens=3, context=10 is missing"):
        Table.from_rows([(1, 10, 1), (1, 20, 2), (3, 20, 4)])
    with pytest.raises(ValueError, match="row tokens=1, context=10 occurs twice"):
        Table.from_rows([(1, 10, 1), (1, 10, 2)])


def test_rows_may_come_in_any_order():
    rows = [(3, 20, 4), (1, 10, 1), (3, 10, 3), (1, 20, 2)]
    assert Table.from_rows(rows) == Table((1, 3), (10, 20), ((1, 2), (3, 4)))


@pytest.mark.parametrize(
    "option",
    [
        {"calibration": 0.0},
        {"calibration": math.nan},
        {"overhead_s": -1.0},
        {"launch_s": math.inf},
        {"kv_read_factor": 0.0},
        {"graph_batches": (4, 4)},
    ],
)
def test_options_are_checked(option):
    (name,) = option
    with pytest.raises(ValueError, match=name):
        times_of(**option)


# The shipped table


@pytest.mark.parametrize(
    ("configuration", "prefill_1024_ms", "decode_ms"),
    [
        # aiconfigurator-core 0.12.0; decode of batches 1, 32 and 128 at 1024 tokens of context, and 64 at 4096.
        (("qwen2.5-7b", "l40s", 1), 65.4, (21.4, 25.8, 36.3, 45.0)),
        (("qwen2.5-7b", "l40s", 2), 58.0, (10.7, 13.4, 21.7, 24.0)),
        (("qwen2.5-7b", "h100", 1), 21.2, (5.8, 7.0, 9.3, 11.2)),
    ],
)
def test_shipped_values(configuration, prefill_1024_ms, decode_ms):
    times = shipped(*configuration)
    assert times.prefill_s(1024, 512) * 1e3 == pytest.approx(prefill_1024_ms, abs=0.05)
    points = ((1, 1024), (32, 1024), (128, 1024), (64, 4096))
    assert [times.decode_s(*point) * 1e3 for point in points] == pytest.approx(decode_ms, abs=0.051)


# The kernel measurements are noisy: by how much a longer context, a larger batch may be faster from knot to knot, and a
# token of a larger batch dearer. On A100, whose kernels are of an older vLLM, more than elsewhere.
NOISE = {"l40s": (0.03, 0.06, 0.0), "h100": (0.03, 0.06, 0.0), "h200": (0.03, 0.09, 0.0), "a100": (0.08, 0.15, 0.14)}


@pytest.mark.parametrize("where", SHIPPED, ids=str)
def test_a_longer_context_is_never_faster(where):
    times, noise = shipped(*where), NOISE[where[1]][0]
    for batch in BATCH_KNOTS:
        row = [times.decode_s(batch, context) for context in CONTEXT_KNOTS]
        assert all(later >= (1 - noise) * earlier for earlier, later in pairwise(row))


@pytest.mark.parametrize("where", SHIPPED, ids=str)
def test_a_larger_batch_is_never_faster(where):
    times, noise = shipped(*where), NOISE[where[1]][1]
    for context in CONTEXT_KNOTS:
        column = [times.decode_s(batch, context) for batch in BATCH_KNOTS]
        assert all(later >= (1 - noise) * earlier for earlier, later in pairwise(column))


# Not on four L40S or more, whose all-reduce takes over from 128 requests on.
@pytest.mark.parametrize("where", [w for w in SHIPPED if w[1:] not in (("l40s", 4), ("l40s", 8))], ids=str)
def test_a_larger_batch_is_cheaper_by_the_token(where):
    times, noise = shipped(*where), NOISE[where[1]][2]
    per_token = [times.decode_s(batch, 512) / batch for batch in BATCH_KNOTS]
    assert all((1 - noise) * dearer <= cheaper for cheaper, dearer in pairwise(per_token))


def test_the_table_says_where_it_comes_from():
    times = shipped("qwen2.5-7b", "L40S", 1)
    assert times.status == "derived"
    for word in ("aiconfigurator-core 0.12.0", "Apache-2.0", "vLLM 0.24.0", "2026-11-22"):
        assert word in times.source
    assert "vLLM 0.14.0" in shipped("qwen2.5-7b", "a100", 1).source


def test_what_the_table_does_not_hold_is_none():
    model = load_model("qwen2.5-7b")
    assert load_iteration_times(model, "l40s", 8) is None
    assert load_iteration_times(model, "tpu", 1) is None
    assert load_iteration_times(load_model("qwen2.5-0.5b"), "a100", 1) is None
    assert load_iteration_times(load_model("qwen2.5-32b"), "h100", 2) is None


def test_the_table_covers_nine_models_on_four_gpus_wherever_they_fit():
    covered = {(name, gpu): [] for name in MODELS for gpu in ("l40s", "h100", "h200", "a100")}
    for name, gpu, degree in SHIPPED:
        covered[name, gpu].append(degree)
    for (name, gpu), degrees in covered.items():
        if name in ("llama-2-70b", "qwen2.5-72b"):  # 138 and 145 GB of weights
            assert degrees == ([4, 8] if gpu == "l40s" else [2, 4, 8])
        elif name == "qwen2.5-0.5b":  # 14 heads
            assert degrees == ([] if gpu == "a100" else [1, 2])
        else:  # 28 heads
            assert degrees == ([1, 2, 4] if name == "qwen2.5-7b" else [1, 2, 4, 8])
    assert (BATCH_KNOTS[-1], CONTEXT_KNOTS[-1]) == (512, 32768)


def test_models_of_one_shape_have_one_table():
    table = shipped("qwen2.5-7b", "h100", 2)
    for name in ("qwen2-7b", "qwen2.5-math-7b"):
        assert shipped(name, "h100", 2).decode_s(17, 700) == table.decode_s(17, 700)
    tuned = replace(load_model("qwen2.5-7b"), name="mine", max_context=99, source="mine")
    assert load_iteration_times(tuned, "h100", 2) is not None
    assert load_iteration_times(replace(tuned, layers=27), "h100", 2) is None


def test_times_say_how_far_their_tables_reach():
    words = "batches of 5, contexts of 40 tokens and prefills of 11 tokens that attend to 30"
    assert times_of().reach == words


def test_deriving_the_table_without_its_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk", None)
    with pytest.raises(SystemExit, match=r"aiconfigurator-core is not installed: pip install 'simrl\[aic\]'"):
        Estimator(load_model("qwen2.5-7b"), "l40s", 1, tmp_path)
