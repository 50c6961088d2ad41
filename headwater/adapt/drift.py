"""How far later checkpoints have moved from an anchor in what they compute, without the anchor's data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.core.function_space import FunctionSpaceDistance, squared_norm
from headwater.core.function_space.base import Theta


@dataclass(frozen=True, eq=False)
class Drift:
    """Distances of checkpoints from an anchor.

    Attributes:
        names: What the checkpoints are called.
        distance: Of their outputs, in the unit of the distance (nats where it is a KL divergence).
        moved: Euclidean distance of their parameters.
        flipped: Share of gates that are on another side: where most are, the distance is no estimate.
        rho: What the distance averages.
    """

    names: list[str]
    distance: list[float]
    moved: list[float]
    flipped: list[float]
    rho: str

    def table(self) -> dict[str, list[Any]]:
        """One row a checkpoint; `relative` is the distance over half the squared move of the parameters."""
        relative = [
            2 * d / m**2 if m else 0.0 for d, m in zip(self.distance, self.moved, strict=True)
        ]
        return {
            "checkpoint": self.names,
            "distance": self.distance,
            "moved": self.moved,
            "relative": relative,
            "flipped": self.flipped,
        }

    def __repr__(self) -> str:
        rows = zip(self.names, self.distance, self.moved, self.flipped, strict=True)
        lines = [
            f"  {n}: {d:.4g} at {m:.3g} from the anchor, {f:.0%} of gates flipped"
            for n, d, m, f in rows
        ]
        return "\n".join([f"Drift({self.rho}, {len(self.names)} checkpoints)", *lines])


def drift(
    distance: FunctionSpaceDistance,
    checkpoints: Mapping[str, Theta] | Sequence[Theta],
    *,
    probe: Tensor | None = None,
) -> Drift:
    """Distance of each checkpoint from the anchor; it warns where most gates have flipped.

    Args:
        distance: Anchored at the model that the checkpoints come from.
        checkpoints: Models or their parameters, by name or in order.
        probe: Inputs on which gates are looked at; drawn from the anchor's statistics when left out.

    Example:
        >>> from torch import nn
        >>> from headwater.core.function_space import function_space_distance
        >>> from headwater.core.task import Classification
        >>> net, data = nn.Linear(3, 2), (torch.randn(9, 3), torch.arange(9) % 2)
        >>> print(drift(function_space_distance(net, data, Classification()), {"same": net}))
        Drift(kl, 1 checkpoints)
          same: 0 at 0 from the anchor, 0% of gates flipped
    """
    if not isinstance(checkpoints, Mapping):
        checkpoints = {str(k): theta for k, theta in enumerate(checkpoints)}
    if not checkpoints:
        raise ValueError("Expected one checkpoint or more; got none.")
    found: dict[str, list[float]] = {"distance": [], "moved": [], "flipped": []}
    trained = {k: v for k, v in distance.anchor.items() if v.is_floating_point()}
    with torch.no_grad():
        for theta in checkpoints.values():
            found["distance"].append(float(distance(theta)))
            found["moved"].append(float(squared_norm(theta, trained).sqrt()))
            found["flipped"].append(distance.check(theta, probe))
    return Drift(list(checkpoints), **found, rho=distance.rho)
