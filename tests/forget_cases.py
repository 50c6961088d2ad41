"""A small fit that the tests of edits share."""

import torch

import headwater
from headwater.core.curvature import EKFAC, CurvatureMethod
from headwater.core.fit import Fit
from headwater.core.task import Classification
from tests.cases import mlp, mlp_data


def fitted(seed: int = 0, method: CurvatureMethod | str | None = None) -> Fit:
    """A perceptron on noise, with factors of the given labels."""
    torch.manual_seed(seed)
    return headwater.fit(
        mlp(), mlp_data(40), Classification(), curvature=method or EKFAC(fisher="empirical")
    )


def matrix(out: int, in_: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, in_, generator=generator, dtype=torch.float64)
