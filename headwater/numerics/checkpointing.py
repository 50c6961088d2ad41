"""Going backwards through a recursion whose states are made again from a few that are kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Keep = Literal["auto", "all", "sqrt", "tree"]


@dataclass
class Meter:
    """What going backwards costs: states held at once, and steps made."""

    held: int = 0
    peak: int = 0
    made: int = 0

    def hold(self, n: int = 1) -> None:
        """Hold `n` more states, or fewer."""
        self.held += n
        self.peak = max(self.peak, self.held)


def backwards(
    step: Callable[[int, Any], Any],
    first: Any,
    n: int,
    *,
    branching: int,
    start: int = 0,
    meter: Meter | None = None,
) -> Iterator[tuple[int, Any]]:
    """The states of a recursion, last first, each made again from the nearest that is kept.

    A stretch is cut into `branching` parts; the state at the beginning of each is kept until the
    parts after it are done. With `branching` = n every state is kept, and every step made once;
    with √n two levels hold 2√n states and make 2n steps; with k there are log_k n levels.

    Args:
        step: (k, state k) to state k + 1.
        first: State number `start`.
        n: How many states.
        branching: Parts of each stretch, at least 2.
        start: Number of the first.
        meter: Counts states and steps.

    Example:
        >>> list(backwards(lambda k, s: s + k, 0, 4, branching=2))
        [(3, 3), (2, 1), (1, 0), (0, 0)]
    """
    meter = meter or Meter(held=1, peak=1)
    if n == 1:
        yield start, first
        return
    size = -(-n // max(branching, 2))
    kept, state = [(start, first)], first
    for k in range(start, start + (n - 1) // size * size):
        state = step(k, state)
        meter.made += 1
        if (k + 1 - start) % size == 0:
            kept.append((k + 1, state))
            meter.hold()
    del state
    while kept:
        at, state = kept.pop()
        length = min(size, start + n - at)
        yield from backwards(step, state, length, branching=branching, start=at, meter=meter)
        if kept:  # the first state is the caller's
            meter.hold(-1)


def branching_of(keep: Keep, n: int, k: int = 4) -> int:
    """Parts of a stretch under a policy, for runs of `n` steps."""
    return {"all": max(n, 2), "sqrt": max(math.isqrt(n - 1) + 1, 2), "tree": max(k, 2)}[keep]


def states_held(n: int, branching: int) -> int:
    """Most states that `backwards` holds at once."""
    if n == 1:
        return 1
    size = -(-n // max(branching, 2))
    parts, rest = -(-n // size), n - (n - 1) // size * size  # the last part may be shorter
    last = parts - 1 + states_held(rest, branching)
    return max(last, parts - 2 + states_held(size, branching))


def choose(keep: Keep, *, n: int, state_bytes: int, budget: int, k: int = 4) -> Keep:
    """The policy that keeps most states within a budget of bytes, or the one asked for if it fits.

    Raises:
        MemoryError: The policy asked for, or every policy, needs more.
    """
    needs = {
        p: states_held(n, branching_of(p, n, k)) * state_bytes for p in ("all", "sqrt", "tree")
    }
    for policy in ("all", "sqrt", "tree") if keep == "auto" else (keep,):
        if needs[policy] <= budget:
            return policy
    raise MemoryError(
        f"Keeping states for {n} steps of {state_bytes / 1e6:.3g} MB each needs "
        + ", ".join(f"{v / 1e9:.3g} GB ({p})" for p, v in needs.items())
        + f", and {budget / 1e9:.3g} GB are free; choose keep='tree' with a smaller branching, or a "
        "machine with more memory."
    )
