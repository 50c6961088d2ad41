"""Several processes as one: ranks that share the passes over data and end with the same result.

Under `torchrun` every process runs the same program. What one rank must know of the others goes through `World`: it
has one number of ranks, one order of them, and one way to fail. A rank that fails says so in the group's store before
it ends, and the others stop with its error instead of waiting for it.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from headwater.core.fingerprint import portable, revive

T = TypeVar("T")
_BUCKET = 1 << 26  # bytes that travel together
_PATIENCE = 3.0  # seconds in which a rank that was lost may still be found to have said why
_SILENT = (
    "A rank has ended without saying why (killed, or its machine was lost); start the command again, and what was "
    "finished is kept."
)


class RankFailed(RuntimeError):
    """Another rank has failed. `rank` is its number, or None where it ended without a word."""

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


class _Link:
    """What a process keeps of its process group: the store, and how many exchanges there were."""

    def __init__(self, group: Any):
        self.group, self.exchanges, self.broken = group, 0, ""
        store = dist.distributed_c10d._get_default_store()
        self.store = dist.PrefixStore("headwater", store)
        self.on_cpu = "cpu:" in dist.get_backend_config() or dist.get_backend() == "gloo"


_link: _Link | None = None


@dataclass(frozen=True)
class World:
    """This process among all that work together; without a process group, a world of one.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and decides for all."""
        return self.rank == 0

    def exchange(self, value: Any = None) -> list[Any]:
        """What each rank has to say (JSON), in the order of the ranks; everyone waits for everyone.

        Raises:
            RankFailed: Another rank has failed.
        """
        if self.size == 1:
            return [value]
        text = json.dumps(portable(value)).encode()
        link = self._link()
        if link.broken:
            raise RankFailed(link.broken)
        link.exchanges += 1
        sizes = [int(n) for n in self._gathered(torch.tensor([len(text)]))]
        row = torch.zeros(max(sizes), dtype=torch.uint8)
        row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = self._gathered(row)
        texts = [bytes(r[:n].tolist()) for r, n in zip(rows, sizes, strict=True)]
        return [json.loads(t, object_hook=revive) for t in texts]

    def agreed(self, decide: Callable[[], Any]) -> Any:
        """What the first rank decides (JSON), known to all; the others do not ask."""
        with self.failing_together():
            return self.exchange(decide() if self.is_first else None)[0]

    def first(self, act: Callable[[], T]) -> T | None:
        """Let the first rank act while the others wait; None to these."""
        with self.failing_together():
            done = act() if self.is_first else None
            self.exchange()
            return done

    def each(self, mine: Mapping[str, Tensor] | None) -> Iterator[dict[str, Tensor] | None]:
        """The tensors of every rank in the order of the ranks, bit by bit; None where a rank has none.

        All ranks must take equally many of them.
        """
        header = None if mine is None else {k: _described(t) for k, t in mine.items()}
        for rank, found in enumerate(self.exchange(header)):
            if found is None:
                yield None
            elif rank == self.rank:
                own = dict(mine or {})
                if self.size > 1:
                    self._move(list(own.values()), rank)
                yield own
            else:
                yield self._receive(found, rank)

    def union(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all ranks, whose names differ."""
        found: dict[str, Tensor] = {}
        for theirs in self.each(mine):
            found |= theirs or {}
        return found

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What is raised inside stops the other ranks as well, at their next exchange."""
        try:
            yield
        except RankFailed:
            raise
        except BaseException as error:
            self.announce(error)
            raise

    def announce(self, error: BaseException) -> bool:
        """Tell the others why this rank goes no further; whether it is the first to fail since they last met."""
        if self.size == 1 or getattr(error, "_announced", None) is not None:
            return bool(getattr(error, "_announced", True))
        link = self._link()
        first = True
        try:
            first = link.store.add(f"claimed/{link.exchanges + 1}", 1) == 1
            if first:
                words = " ".join(str(error).split())
                said = {"rank": self.rank, "error": f"{type(error).__name__}: {words}"}
                link.store.set(_failure(link.exchanges + 1), json.dumps(said))
        except (RuntimeError, OSError):  # the store is gone, and with it those who could read it
            pass
        error._announced = first  # type: ignore[attr-defined]
        return first

    def _link(self) -> _Link:
        global _link
        group = dist.group.WORLD
        if _link is None or _link.group is not group:
            _link = _Link(group)
        return _link

    def _gathered(self, x: Tensor) -> list[Tensor]:
        """A tensor of one shape from each rank, with an eye on whether one has failed."""
        link, x = self._link(), self._sendable(x)
        found = [torch.empty_like(x) for _ in range(self.size)]
        pause, looked = 1e-4, time.monotonic()
        try:
            work = dist.all_gather(found, x, async_op=True)
            while not work.is_completed():  # type: ignore[union-attr]
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
                if time.monotonic() - looked > 0.2:
                    looked = time.monotonic()
                    self._look()
            work.wait()  # type: ignore[union-attr]
        except RankFailed:
            raise
        except RuntimeError as error:
            raise self._lost(link) from error
        return [f.cpu() for f in found]

    def _look(self) -> None:
        """Raise what another rank has failed with, if one has."""
        link = self._link()
        key = _failure(link.exchanges)
        if link.store.check([key]):
            said = json.loads(link.store.get(key))
            link.broken = f"rank {said['rank']} failed: {said['error']}"
            raise RankFailed(link.broken, said["rank"])

    def _lost(self, link: _Link) -> RankFailed:
        """Why a rank does not answer any more."""
        until = time.monotonic() + _PATIENCE
        try:
            while time.monotonic() < until:
                self._look()
                time.sleep(0.05)
        except RankFailed as failed:
            return failed
        except (RuntimeError, OSError):
            pass
        link.broken = _SILENT
        return RankFailed(link.broken)

    def _sendable(self, x: Tensor) -> Tensor:
        """On a device that the group's backend takes."""
        if x.device.type == "cpu" and not self._link().on_cpu:
            return x.to(torch.device("cuda", torch.cuda.current_device()))
        return x

    def _receive(self, header: dict[str, Any], rank: int) -> dict[str, Tensor]:
        here = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=_here(device))
            for name, (dtype, shape, device) in header.items()
        }
        self._move(list(here.values()), rank)
        return here

    def _move(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Broadcast tensors from a rank into those of the same shapes; small ones travel together."""
        for bucket in _buckets(tensors):
            flat = [_bytes(t) for t in bucket]
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            packed = self._sendable(flat[0] if alone else torch.cat(flat))
            try:
                dist.broadcast(packed, src=rank)
            except RuntimeError as error:
                raise self._lost(self._link()) from error
            if rank == self.rank or (alone and packed.data_ptr() == flat[0].data_ptr()):
                continue
            for tensor, part in zip(bucket, packed.split([len(f) for f in flat]), strict=True):
                tensor.copy_(part.to(tensor.device).clone().view(tensor.dtype).view(tensor.shape))


def current() -> World:
    """The world of the default process group; a world of one where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


@contextmanager
def started(timeout: timedelta = timedelta(hours=12)) -> Iterator[World]:
    """The process group that the environment of torchrun describes; a world of one outside of it.

    CPU tensors travel by gloo, those on GPUs by NCCL. A group that exists already is used as it is.

    Args:
        timeout: How long a rank may keep the others waiting.

    Raises:
        ValueError: The environment names no rank, or no place to meet.
    """
    if not is_launched() or dist.is_initialized():
        yield current()
        return
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with torchrun, or "
            "unset WORLD_SIZE to run in one process."
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timeout)
    yield current()
    dist.destroy_process_group()  # not after an error: others may still be in the middle of a message


def spread_out(costs: Sequence[float], size: int) -> list[int]:
    """Which rank does each piece of work: the most costly first, each to the rank with the least so far.

    Example:
        >>> spread_out([1.0, 5.0, 4.0], 2)
        [1, 0, 1]
    """
    loads, owner = [0.0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[i] = min(range(size), key=lambda r: (loads[r], r))
        loads[owner[i]] += costs[i]
    return owner


def _failure(exchange: int) -> str:
    return f"failed/{exchange}"


def _described(x: Tensor) -> list[Any]:
    return [str(x.dtype).removeprefix("torch."), list(x.shape), x.device.type]


def _here(kind: str) -> torch.device:
    if kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors on one device, of a limited size together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if not tensor.numel():
            continue
        together = sum(t.nbytes for t in bucket) + tensor.nbytes <= _BUCKET
        if bucket and not (together and tensor.device == bucket[0].device):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
