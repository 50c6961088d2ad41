import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.numerics.checkpointing import (
    Meter,
    backwards,
    branching_of,
    choose,
    states_held,
)


@given(n=st.integers(1, 300), branching=st.integers(1, 40))
def test_going_backwards_visits_every_state_once_and_holds_as_many_as_said(n, branching):
    forwards, state = [], 1
    for k in range(n):
        forwards.append((k, state))
        state = (state * 31 + k) % 1_000_003
    meter = Meter(held=1, peak=1)
    found = backwards(lambda k, s: (s * 31 + k) % 1_000_003, 1, n, branching=branching, meter=meter)
    assert list(found) == forwards[::-1]
    assert meter.peak == states_held(n, branching)
    assert meter.held == 1  # the first, which is the caller's


def test_the_policy_follows_from_the_memory_there_is():
    need = {p: states_held(10_000, branching_of(p, 10_000)) for p in ("all", "sqrt", "tree")}
    assert need["all"] == 10_000 and need["sqrt"] == 199 and need["tree"] < 25
    for policy, states in need.items():
        assert choose("auto", n=10_000, state_bytes=8, budget=8 * states) == policy
    with pytest.raises(MemoryError, match=r"10000 steps .* choose keep='tree'"):
        choose("all", n=10_000, state_bytes=8, budget=8 * 9_999)
