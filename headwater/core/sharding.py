"""Models whose weights are spread over the ranks of a process group, as `fully_shard` does it.

Their modules hold whole weights while they run, so activations and output gradients are captured as ever. But a pass
needs every rank, so all make equally many of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def _shards(model: nn.Module) -> list[Any]:
    """The modules whose weights are spread over several ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return []
    from torch.distributed import fsdp  # takes a while

    kind = getattr(fsdp, "FSDPModule", None)  # older versions have none
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are spread over several ranks."""
    return bool(_shards(model))


def reshard(model: nn.Module) -> None:
    """Let go of whole weights that a forward pass has left behind, so that parameters are always the same objects."""
    for module in _shards(model):
        module.reshard()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; neither do the whole weights that modules make of spread ones."""
    reshard(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def require(value: bool) -> None:
        for module in [None, *_shards(model)]:
            if module is not None:
                module.unshard()
            named = dict(model.named_parameters())
            for name in names:
                named[name].requires_grad_(value)
            if module is not None:
                module.reshard()

    require(False)
    try:
        yield
    finally:
        reshard(model)
        require(True)


def whole(x: Tensor) -> Tensor:
    """A tensor's values, put together where they are spread over ranks, for which all ranks must ask at once."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[attr-defined]


def refuse_sharded(model: nn.Module, what: str, instead: str) -> None:
    """Refuse a model whose weights are spread over ranks.

    Raises:
        ValueError: They are.
    """
    if is_sharded(model):
        raise ValueError(
            f"{what} cannot be taken of a model whose weights are spread over ranks (fully_shard); {instead}."
        )
