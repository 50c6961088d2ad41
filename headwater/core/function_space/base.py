"""Distances between a network at an anchor and the same network with other parameters."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, jvp

Theta = nn.Module | Mapping[str, Tensor]


class Distance(ABC):
    """A differentiable distance of parameters from an anchor, zero there and never negative.

    Attributes:
        facts: Numbers worth telling.
    """

    facts: dict[str, Any]

    @abstractmethod
    def __call__(self, theta: Theta, *, draw: int = 0) -> Float[Tensor, ""]:
        """The distance of a model, or of parameters by their names, from the anchor.

        Args:
            theta: Where; parameters that are left out stay at the anchor.
            draw: Number of the random draws, for distances that make any; the same number gives the same function.
        """

    @property
    @abstractmethod
    def anchor(self) -> dict[str, Tensor]:
        """The anchor's parameters, by their names."""

    @property
    @abstractmethod
    def n_numbers(self) -> int:
        """Numbers that are kept beside the anchor's parameters."""

    def gauss_newton_product(
        self, tangent: Mapping[str, Tensor], *, draw: int = 0
    ) -> dict[str, Tensor]:
        """The distance's Gauss–Newton matrix at the anchor times a change of the parameters.

        It is the Hessian there, since no output differs from the anchor's. Parameters that are left out do not change.
        """
        point = {name: self.anchor[name] for name in tangent}
        return jvp(grad(lambda t: self(t, draw=draw)), (point,), (dict(tangent),))[1]


def named_tensors(theta: Theta) -> dict[str, Tensor]:
    """Parameters and buffers by their names; those of a model carry its gradients."""
    if isinstance(theta, nn.Module):
        return dict(theta.named_parameters()) | dict(theta.named_buffers())
    return dict(theta)


def check_names(theta: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not the anchor's.

    Raises:
        ValueError: A name or a shape is another; the message names it.
    """
    for name, value in theta.items():
        if name not in anchor:
            some = ", ".join(list(anchor)[:4])
            raise ValueError(
                f"The anchor has no parameter {name!r}; its parameters are {some}, …. Pass those of the same model."
            )
        if value.shape != anchor[name].shape:
            raise ValueError(
                f"Parameter {name!r} has shape {tuple(value.shape)} but {tuple(anchor[name].shape)} at the anchor."
            )


def squared_norm(theta: Theta, anchor: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Squared Euclidean distance of parameters from the anchor's."""
    given = named_tensors(theta)
    parts = [
        (given[name] - value).square().sum() for name, value in anchor.items() if name in given
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())
