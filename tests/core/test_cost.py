import time

import torch

from headwater.core.capture import BatchPlan
from headwater.core.cost import (
    KeptMemory,
    available_memory_bytes,
    held_memory_bytes,
    peak_memory_bytes,
    plain_pass_seconds,
    positions,
    spread,
)
from headwater.core.task import Classification
from tests.plan_cases import images, mlp


def test_every_beginning_of_a_spread_is_even():
    for n in (1, 2, 7, 16, 100):
        assert sorted(spread(n)) == list(range(n))
    for k in (2, 4, 8):
        gaps = torch.tensor(sorted(spread(64)[:k])).diff()
        assert gaps.tolist() == [64 // k] * (k - 1)


def test_a_plain_pass_costs_what_running_it_costs():
    model, data, task = mlp(400, 400, 4), images(512, 400), Classification()
    batches = [BatchPlan(tuple(range(i, i + 128)), 0) for i in range(0, 512, 128)]
    assert sum(positions(data, b) for b in batches) == 512
    told = plain_pass_seconds(model, task, data, batches)
    runs = []
    for _ in range(5):
        started = time.perf_counter()
        for batch in batches:
            loss = task.loss(model, data.batch(batch.indices)).sum()
            torch.autograd.grad(loss, list(model.parameters()))
        runs.append(time.perf_counter() - started)
    # Other processes share the cores: an order of magnitude is all a fast test can hold it to.
    assert min(runs) / 10 < told < max(runs) * 10
    assert all(p.grad is None for p in model.parameters())


def test_memory_that_a_pass_keeps_counts_each_storage_once():
    model = mlp(10, 10)
    kept = KeptMemory(model)
    x = torch.randn(50, 10, requires_grad=True)
    with kept.watching():
        y = x.exp()  # saves y
        (y * y).sum()  # saves y again
    assert kept.total == kept.largest == 50 * 10 * 4
    kept.add(model[0].weight)
    assert kept.total == 50 * 10 * 4


def test_memory_of_the_process_grows_by_what_is_allocated():
    before = held_memory_bytes()
    block = torch.ones(25_000_000)  # 100 MB, written
    # The allocator may reuse pages that were free before: most of it must show.
    assert held_memory_bytes() - before > 80e6
    assert peak_memory_bytes() >= before + 80e6
    assert available_memory_bytes() > 0
    del block
