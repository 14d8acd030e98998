"""Ids in order, against a plain set."""

from hypothesis import given
from hypothesis import strategies as st

from simrl.policies.runtime.steps import Ids


@given(st.lists(st.tuples(st.sets(st.integers(0, 60), max_size=40), st.sampled_from(("add", "remove", "look")))))
def test_ids_are_those_of_a_set_in_ascending_order(changes):
    ids, plain = Ids(), set()
    for numbers, change in changes:
        if change == "add":
            ids.add(sorted(numbers - plain, reverse=True))
            plain |= numbers
        elif change == "remove":
            ids.remove(tuple(numbers & plain))
            plain -= numbers
        else:
            assert ids.in_order() == tuple(sorted(plain))
        assert {number for number in range(61) if number in ids} == plain
    assert ids.in_order() == tuple(sorted(plain))
