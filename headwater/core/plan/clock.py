"""Work timed on a few batches, and extrapolated to all of them by positions."""

import time
from collections.abc import Callable
from typing import Any

from headwater.core.capture import BatchPlan, Capture
from headwater.core.cost import plain_pass_seconds, positions, spread, synchronize
from headwater.core.examples import Examples


class Clock:
    """Times work on a few batches and extrapolates it to all."""

    def __init__(self, capture: Capture, examples: Examples, batches: list[BatchPlan]):
        self.batch_size = max(len(b.indices) for b in batches)
        self.batch_tokens = max(positions(examples, b) for b in batches)
        self.capture, self.examples, self.batches = capture, examples, batches
        width = sorted(batches, key=lambda b: positions(examples, b) / len(b.indices))
        self.order = [width[i] for i in spread(len(width))]
        self.n_positions = sum(positions(examples, b) for b in batches)
        self.limit = 0.7  # seconds a measurement, before it is known how long the whole will take

    def plain_pass(self) -> float:
        """Seconds of one plain pass over all the data."""
        model, task = self.capture.model, self.capture.task
        seconds = self.all_data(
            lambda some: plain_pass_seconds(model, task, self.examples, some, n=len(some))
        )
        self.limit = max(self.limit, 0.005 * seconds)
        return seconds

    def all_data(self, run: Callable[[list[BatchPlan]], Any]) -> float:
        """Seconds that `run` would take on all batches, from a few of them or from parts of one.

        What `run` returns, if it is a number, are the seconds it took.
        """
        middle = self.order[0]
        small = self._part(middle, max(1, len(middle.indices) // 8))
        self._time(run, [small])  # warms up
        first = self._time(run, [small])
        whole = first * self._size([middle]) / self._size([small])
        if whole <= self.limit:
            n = min(len(self.order), max(2, int(self.limit / max(whole, 1e-9))))
            some = self.order[:n]
            return self._time(run, some) * self.n_positions / self._size(some)
        n = int(self.limit / max(first, 1e-9) * len(small.indices))
        larger = self._part(middle, min(max(n, 2 * len(small.indices)), len(middle.indices)))
        if self._size([larger]) <= self._size([small]):
            return first * self.n_positions / self._size([small])
        second = self._time(run, [larger])
        slope = (second - first) / (self._size([larger]) - self._size([small]))
        slope = max(slope, 0.25 * second / self._size([larger]))
        each = max(0.0, second - slope * self._size([larger]))
        return each * len(self.batches) + slope * self.n_positions

    def _part(self, batch: BatchPlan, n: int) -> BatchPlan:
        return BatchPlan(batch.indices[:n], batch.fold)

    def _size(self, batches: list[BatchPlan]) -> int:
        return sum(positions(self.examples, b) for b in batches)

    def _time(self, run: Callable[[list[BatchPlan]], Any], batches: list[BatchPlan]) -> float:
        synchronize(self.capture.device)
        started = time.perf_counter()
        told = run(batches)
        synchronize(self.capture.device)
        return told if isinstance(told, float) else time.perf_counter() - started

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds of work that is done once: the better of two runs where they are short."""
        seconds = self._time(lambda _: (work(), None)[1], [])
        if seconds < self.limit:
            seconds = min(seconds, self._time(lambda _: (work(), None)[1], []))
        return seconds
