"""Named streams: the same for the same name, anywhere; another for any other name."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.traces.streams import stream

names = st.lists(st.text(max_size=5) | st.integers(-(2**70), 2**70), min_size=1, max_size=4).map(tuple)


def draws(seed: int, *name: str | int) -> list[int]:
    return stream(seed, *name).integers(2**63, size=3).tolist()


@given(st.integers(0, 2**128 - 1), names, names)
def test_equal_names_give_equal_draws_and_other_names_other_draws(seed, one, other):
    assert draws(seed, *one) == draws(seed, *one)
    if one != other:
        assert draws(seed, *one) != draws(seed, *other)


@given(st.integers(0, 2**128 - 1), st.integers(0, 2**128 - 1))
def test_seeds_do_not_share_draws(one, other):
    assert (draws(one, "length") == draws(other, "length")) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"), [((1,), ("1",)), (("ab",), ("a", "b")), (("a", 12), ("a", 1, 2)), (("",), ("", ""))]
)
def test_names_that_look_alike_are_different(one, other):
    assert draws(0, *one) != draws(0, *other)


def test_a_long_seed_does_not_run_into_the_name():
    # 2**32 fills a second word of entropy; unpadded, it could pass for a short seed with a longer name.
    assert len({tuple(draws(seed, "x")) for seed in (0, 1, 2**32, 2**64, 2**127)}) == 5


def test_another_process_draws_the_same():
    code = "from simrl.traces.streams import stream; print(stream(7, 'length', 2).integers(2**63, size=3).tolist())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": h}, capture_output=True, text=True, check=True
        )
        for h in ("1", "2")
    ]
    assert [run.stdout.strip() for run in runs] == [str(draws(7, "length", 2))] * 2


def test_numpy_integers_name_the_same_stream():
    assert draws(3, "length", 4) == draws(3, "length", np.int64(4))
    assert draws(3, "length") == stream(np.int64(3), "length").integers(2**63, size=3).tolist()


def test_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 - the point of the test
    stream(1, "length").random(10)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_draws_of_two_names_are_uncorrelated():
    size = 100_000
    one, other = (stream(0, "sample effect", 0, sample).standard_normal(size) for sample in (0, 1))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(size)


@pytest.mark.parametrize("seed", [-1, 2**128])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"{seed}"):
        stream(seed, "length")


def test_a_name_is_needed():
    with pytest.raises(ValueError, match="name"):
        stream(0)
