"""What an Adam-like optimizer remembers of each parameter, layer by layer.

`mean` and `square` are the running means of gradients and of their squares, by the names of the model's parameters, as
`Trajectory.load_optimizer` returns them and as `torch.optim.Adam` keeps them (`exp_avg`, `exp_avg_sq`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from headwater.core.layers import Layer

Moments = Mapping[str, Mapping[str, Tensor]]


def moment_of(layer: Layer, moments: Moments, name: str) -> Tensor:
    r"""One moment of a layer, with the shape of its gradients (\*block).

    Raises:
        ValueError: The optimizer kept none for this layer.
    """
    values = moments.get(name, {})
    missing = [p for p in layer.parameters if p not in values]
    if missing:
        raise ValueError(
            f"The optimizer's moment {name!r} is missing for {', '.join(missing[:3])}; keep the optimizer's state with "
            "each checkpoint, or follow only the parameters that it trained."
        )
    return layer.from_parameters({p: values[p][None] for p in layer.parameters})[0]


def moments_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The moments of a live Adam or AdamW optimizer, by the names of the model's parameters."""
    found: dict[str, dict[str, Tensor]] = {"mean": {}, "square": {}}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for ours, theirs in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
            if theirs in state:
                found[ours][name] = state[theirs].detach().clone()
    return found
