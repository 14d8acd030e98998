"""Collectives: look-ups by hand, and the shipped measurements against what links can do."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.traces.collectives import KINDS, Collectives, load_collectives

CURVES = {
    ("all_reduce", 2): ((1000.0, 1e-5), (4000.0, 2e-5), (16_000.0, 8e-5)),
    ("all_reduce", 8): ((1000.0, 3e-5), (16_000.0, 16e-5)),
}
MADE_UP = Collectives("test", CURVES, "this test")
LINK_BYTES_PER_S = {"l40s": 32e9, "h100": 450e9, "h200": 450e9, "a100": 300e9}  # data sheets, one way


def test_at_and_between_measured_sizes():
    assert MADE_UP.seconds("all_reduce", 4000, 2) == pytest.approx(2e-5)
    assert MADE_UP.seconds("all_reduce", 2000, 2) == pytest.approx(math.sqrt(1e-5 * 2e-5))  # half way in logarithms
    assert MADE_UP.seconds("all_reduce", 8000, 2) == pytest.approx(math.sqrt(2e-5 * 8e-5))


def test_latency_below_and_bandwidth_beyond():
    assert MADE_UP.seconds("all_reduce", 1, 2) == 1e-5
    assert MADE_UP.seconds("all_reduce", 160_000, 2) == pytest.approx(10 * 8e-5)


def test_between_numbers_of_gpus():
    assert MADE_UP.seconds("all_reduce", 1000, 5) == pytest.approx((1e-5 + 3e-5) / 2)


def test_one_gpu_or_nothing_to_send_takes_no_time():
    assert MADE_UP.seconds("all_reduce", 1e9, 1) == 0
    assert MADE_UP.seconds("all_reduce", 0, 8) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("broadcast", 1, 2), "kind='broadcast' must be one of all_gather"),
        (("all_reduce", -1, 2), "size_bytes=-1 must be finite and >= 0"),
        (("all_reduce", math.nan, 2), "size_bytes=nan"),
        (("all_reduce", 1, 0), "gpus=0 of test: all_reduce was measured over up to 8 GPUs"),
        (("all_reduce", 1, 9), "gpus=9 of test: all_reduce was measured over up to 8 GPUs"),
        (("all_gather", 1, 2), "all_gather was not measured on test"),
    ],
)
def test_what_was_not_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MADE_UP.seconds(*arguments)


@pytest.mark.parametrize("curve", [(), ((0.0, 1.0),), ((2.0, 1.0), (1.0, 2.0)), ((1.0, 0.0),), ((1.0, math.inf),)])
def test_bad_curves_are_refused(curve):
    with pytest.raises(ValueError, match="all_reduce over 2 x test"):
        Collectives("test", {("all_reduce", 2): curve})


def test_gpus_without_measurements_have_none():
    assert load_collectives("h20") is None
    assert load_collectives("H100") is load_collectives("h100")


@pytest.mark.parametrize("gpu", LINK_BYTES_PER_S)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_no_shipped_collective_is_faster_than_its_links(gpu, kind, gpus):
    # nccl-tests' bus bandwidth. Elements taken for bytes, or a GPU's share for the whole buffer, would break it.
    # A switch that reduces on the way lets an all-reduce go a little beyond the link.
    size_bytes, trips = 512 * 2**20, {"all_gather": 1, "reduce_scatter": 1}.get(kind, 2)
    seconds = load_collectives(gpu).seconds(kind, size_bytes, gpus)
    bus_bytes_per_s = trips * size_bytes * (gpus - 1) / gpus / seconds
    assert bus_bytes_per_s <= (1.1 if trips == 2 else 1.0) * LINK_BYTES_PER_S[gpu]
    if gpu != "l40s":
        assert bus_bytes_per_s >= 0.49 * LINK_BYTES_PER_S[gpu]


@pytest.mark.parametrize("gpu", LINK_BYTES_PER_S)
def test_an_all_reduce_is_about_a_reduce_scatter_and_an_all_gather(gpu):
    shipped = load_collectives(gpu)
    for gpus in (2, 4, 8):
        both = sum(shipped.seconds(kind, 64e6, gpus) for kind in ("reduce_scatter", "all_gather"))
        assert 0.6 * both < shipped.seconds("all_reduce", 64e6, gpus) < 1.3 * both


@given(st.sampled_from(sorted(LINK_BYTES_PER_S)), st.sampled_from(KINDS), st.integers(2, 8), st.floats(1e6, 1e9))
def test_twice_the_size_takes_longer(gpu, kind, gpus, size_bytes):
    shipped = load_collectives(gpu)
    # 1.046 is the least: NCCL changes its protocol between 4 and 8 MB.
    assert shipped.seconds(kind, 2 * size_bytes, gpus) > 1.04 * shipped.seconds(kind, size_bytes, gpus)
