"""What work costs on this machine: seconds of an ordinary pass over data, and bytes of memory.

Costs are told in units of one plain pass: forward and backward with weight gradients, over the same
data, in the same process. That unit travels between machines; seconds do not.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, evaluation_mode
from headwater.core.examples import Examples, to_device
from headwater.core.task import Task


def positions(examples: Examples, batch: BatchPlan) -> int:
    """Positions of a batch, padding included; examples where they have no lengths."""
    if examples.lengths is None:
        return len(batch.indices)
    return len(batch.indices) * max(examples.lengths[i] for i in batch.indices)


def spread(n: int) -> list[int]:
    """The numbers below n from the middle on, every beginning of them spread evenly.

    Example:
        >>> spread(5)
        [2, 1, 4, 3, 0]
    """
    bits = max(1, (n - 1).bit_length())
    order = (int(f"{k:0{bits}b}"[::-1], 2) for k in range(1 << bits))
    return [(i + n // 2) % n for i in order if i < n]


@contextmanager
def weight_gradients(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters that training changes, requiring a gradient; all of them where none does."""
    every = [p for p in model.parameters() if p.is_floating_point()]
    chosen = [p for p in every if p.requires_grad] or every
    frozen = [p for p in chosen if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield chosen
    finally:
        for p in frozen:
            p.requires_grad_(False)


def plain_pass_seconds(
    model: nn.Module, task: Task, examples: Examples, batches: Sequence[BatchPlan], n: int = 3
) -> float:
    """Seconds of one ordinary forward and backward pass over all batches, with weight gradients.

    Args:
        model: The model; its parameters and modes are left as they were.
        task: Its task.
        examples: The data.
        batches: The batches of the pass.
        n: How many of them are measured, evenly over their lengths; the rest is extrapolated by
            positions.
    """
    device = next(model.parameters()).device
    by_length = sorted(batches, key=lambda b: positions(examples, b) / len(b.indices))
    chosen = [by_length[i] for i in spread(len(by_length))[:n]]
    seconds, seen = 0.0, 0
    with evaluation_mode(model), weight_gradients(model) as parameters, torch.enable_grad():
        for number, batch in enumerate([chosen[0], *chosen]):  # the first one warms up
            data = to_device(examples.batch(batch.indices), device)
            synchronize(device)
            started = time.perf_counter()
            loss = task.loss(model, data).sum()
            torch.autograd.grad(loss, parameters, allow_unused=True)
            synchronize(device)
            if number:
                seconds += time.perf_counter() - started
                seen += positions(examples, batch)
    return seconds / seen * sum(positions(examples, b) for b in batches)


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator, so that clocks tell the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class KeptMemory:
    """What passes keep of their activations, every storage once and the model's own not at all.

    Args:
        model: The model, whose parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module):
        own = (*model.parameters(), *model.buffers())
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self._kept: dict[int, int] = {}
        self._alive: list[Tensor] = []  # addresses are only unique among living tensors

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what autograd keeps of the passes inside."""
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield

    @property
    def total(self) -> int:
        return sum(self._kept.values())

    @property
    def largest(self) -> int:
        return max(self._kept.values(), default=0)


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory this process has held so far, on the machine or on a CUDA device."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every platform

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def held_memory_bytes(device: torch.device | None = None) -> int:
    """The memory that this process holds now."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_memory_bytes(device: torch.device | None = None) -> int:
    """The memory that this process may still take without swapping, within a container's limit."""
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = _fields("/proc/meminfo").get("MemAvailable:")
    if found is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - held_memory_bytes()
    else:
        free = 1024 * found
    limit = _number("/sys/fs/cgroup/memory.max")
    if limit is not None:
        used = _number("/sys/fs/cgroup/memory.current") or 0
        cache = _fields("/sys/fs/cgroup/memory.stat").get("inactive_file", 0)
        free = min(free, limit - used + cache)
    return max(free, 0)


def _fields(path: str) -> dict[str, int]:
    """The numbers of a file of "name number" lines; nothing where there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    split = (line.split() for line in lines)
    return {words[0]: int(words[1]) for words in split if len(words) > 1 and words[1].isdigit()}


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
