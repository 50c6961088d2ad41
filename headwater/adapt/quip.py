r"""QuIP: weights of 2, 3 or 4 bits by adaptive rounding and incoherence.

Chee, Cai, Kuleshov and De Sa (2023), "QuIP: 2-Bit Quantization of Large Language Models with Guarantees", NeurIPS,
arXiv:2307.13304. A layer's weight W is rounded so that its outputs change little, which takes nothing but the second
moment H of its inputs: the activation covariance A of a K-FAC or EK-FAC fit. Before, both are turned by random
orthogonal matrices, $\tilde W = U W D V^\top$ and $\tilde H = V D^{-1} H D^{-1} V^\top$, so that no entry stands out;
what is stored are the integers of $\tilde W$, one scale, D, and two seeds.

Without incoherence, LDLQ is OPTQ (Frantar et al. 2022, arXiv:2210.17323) with a scale and zero for each output.
"""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from headwater.adapt.base import Quantizer, weight_of
from headwater.core.quantized import QuantizedLinear
from headwater.numerics import noise
from headwater.numerics.incoherence import Turned, mu_hessian, mu_weight, turn, turn_safely
from headwater.numerics.rounding import (
    Grid,
    checked_moment,
    dampen,
    greedy_alone,
    ldl,
    ldlq,
    ldlq_rg,
    proxy_loss,
    quantize,
    row_grids,
    symmetric_grid,
)

Rounding = Literal["nearest", "ldlq", "ldlq_rg", "greedy"]
Rescale = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Rounded:
    """A rounded weight and how well it does.

    Attributes:
        codes: Integers of the grid (out, in).
        grid: The grid.
        rescale: D, of a weight that was turned.
        weight: The rounded weight in the layer's own coordinates.
        facts: proxy, relative_proxy, mu_W, mu_H and trace_ratio (tr D / tr H), before and after turning.
    """

    codes: UInt8[Tensor, "out in"]
    grid: Grid
    rescale: Float[Tensor, " in"] | None
    weight: Float[Tensor, "out in"]
    facts: dict[str, float]


def round_weight(
    W: Float[Tensor, "out in"],
    H: Float[Tensor, "rows columns"],
    *,
    bits: int,
    rounding: Rounding = "ldlq_rg",
    seeds: tuple[int, int] | None = None,
    rescale: Rescale = "auto",
    stochastic: torch.Generator | None = None,
    passes: int = 9,
    damping: float = 0.01,
    measure: bool = False,
) -> Rounded:
    """One layer: turn, put on the grid, round, and turn back.

    Args:
        W: The weight, in float32 or float64, which the work is done in.
        H: The second moment of its inputs, undamped.
        bits: Bits a weight.
        rounding: How the integers are chosen.
        seeds: Seeds of U and V; None leaves the weight as it is, with a grid for each row.
        rescale: Whether D balances inputs before; "auto" leaves it out where it makes weights stand out.
        stochastic: Generator of unbiased rounding, for "nearest" and "ldlq".
        passes: Most greedy passes.
        damping: Share of the mean diagonal that is added to H.
        measure: Decompose H for mu_H, before and after, and factor H as it was for its trace ratio.

    Raises:
        ValueError: H does not fit or is no second moment.
    """
    H = checked_moment(H.double(), W.shape[1])
    top = 2**bits - 1
    facts = {"mu_W": mu_weight(W)}
    turned = None if seeds is None else _turned(W, H, seeds, rescale)
    work, moment = (W, H) if turned is None else (turned.W, turned.H)
    work, moment = dampen(work, moment, damping)
    grid = row_grids(work, bits) if turned is None else symmetric_grid(work, bits)
    units = grid.units(work)
    # in the type of the weight; factors are taken in float64
    if rounding == "nearest":
        found = quantize(units, top, stochastic)
    elif rounding == "ldlq":
        found = ldlq(units, ldl(moment)[0].to(units), top=top, generator=stochastic)
    elif rounding == "ldlq_rg":
        found = ldlq_rg(units, moment, top=top, passes=passes)
    else:
        found = greedy_alone(units, moment, top=top, passes=passes)
    weight = grid.weights(found)
    weight = weight if turned is None else turned.back(weight)
    facts["mu_W_turned"] = mu_weight(work) if turned is not None else facts["mu_W"]
    facts["proxy"] = proxy_loss(weight, W, H.to(W))
    size = proxy_loss(torch.zeros_like(W), W, H.to(W))
    facts["relative_proxy"] = facts["proxy"] / size if size > 0 else 0.0
    facts["weight_error"] = float((weight - W).square().sum() / W.square().sum().clamp(min=1e-30))
    if measure:
        facts["mu_H"] = mu_hessian(H)
        facts["mu_H_turned"] = mu_hessian(moment) if turned is not None else facts["mu_H"]
        plain = moment if turned is None else dampen(W, H, damping)[1]
        facts["trace_ratio"] = _trace_ratio(plain)
        facts["trace_ratio_turned"] = (
            _trace_ratio(moment) if turned is not None else facts["trace_ratio"]
        )
    return Rounded(
        codes=found.to(torch.uint8),
        grid=grid,
        rescale=None if turned is None else turned.rescale.to(W),
        weight=weight,
        facts=facts,
    )


def _turned(W: Tensor, H: Tensor, seeds: tuple[int, int], rescale: Rescale) -> Turned:
    if rescale == "auto":
        return turn_safely(W, H, seeds)
    return turn(W, H, seeds, rescale=rescale == "always")


def _trace_ratio(H: Float[Tensor, "in in"]) -> float:
    """tr(D) / tr(H): what LDLQ's expected loss is of that of plain rounding, where nothing is cut off."""
    return float(ldl(H)[1].sum() / H.trace())


@dataclass(frozen=True, kw_only=True)
class QuIP(Quantizer):
    """Quantize the linear layers of a model's blocks.

    Args:
        bits: Bits a weight: 2, 3 or 4.
        rounding: "nearest"; "ldlq", every column corrected for the errors of those before it; "ldlq_rg", that in an
            order by the size of the inputs with greedy passes after it; "greedy", these passes alone.
        incoherence: Turn weights and inputs by random orthogonal matrices first, with one scale a layer. Without it
            every row has a scale and a zero.
        rescale: Whether the diagonal D balances inputs before they are turned: "always" as in the paper, "never", or
            "auto", which leaves it out in layers where it would make weights stand out (one input far larger than all
            others); the grid would cut those off.
        stochastic: Round at random without bias, with "nearest" or "ldlq".
        passes: Most greedy passes.
        damping: Share of the mean of diag(H) that is added to H.
        layers: Patterns of module names; the linear layers of the blocks when left out. Weights that are tied to
            another module are never taken.
        measure: Report mu_H and tr(D)/tr(H) too, which takes eigendecompositions and about doubles the time.
        seed: Seed of the random matrices and of stochastic rounding.
    """

    paper: ClassVar[str] = "arXiv:2307.13304"

    bits: int = 2
    rounding: Rounding = "ldlq_rg"
    incoherence: bool = True
    rescale: Rescale = "auto"
    stochastic: bool = False
    passes: int = 9
    damping: float = 0.01
    measure: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits must be 2, 3 or 4; got {self.bits}.")
        if self.rounding not in get_args(Rounding):
            offered = ", ".join(get_args(Rounding))
            raise ValueError(f"Expected a rounding among {offered}; got {self.rounding!r}.")
        if self.stochastic and self.rounding not in ("nearest", "ldlq"):
            raise ValueError(
                f"Stochastic rounding goes with 'nearest' and 'ldlq'; {self.rounding!r} has greedy passes, which "
                "choose the nearest."
            )
        if not self.damping > 0 or self.passes < 0:
            raise ValueError(
                f"Expected a positive damping and passes of 0 or more; got {self.damping} and {self.passes}."
            )

    def layer(
        self,
        name: str,
        module: nn.Module,
        H: Float[Tensor, "in in"],
    ) -> tuple[QuantizedLinear, dict[str, Any]]:
        started = time.monotonic()
        weight = weight_of(module)
        W = weight.to(torch.promote_types(weight.dtype, torch.float32))
        drawn = noise.bits(noise.keys([name]).repeat(2), torch.arange(2), self.seed)
        seeds = (drawn & ((1 << 31) - 1)).tolist()
        generator = torch.Generator().manual_seed(seeds[0]) if self.stochastic else None
        try:
            found = round_weight(
                W,
                H.to(W.device),
                bits=self.bits,
                rounding=self.rounding,
                seeds=tuple(seeds) if self.incoherence else None,
                rescale=self.rescale,
                stochastic=generator,
                passes=self.passes,
                damping=self.damping,
                measure=self.measure,
            )
        except ValueError as error:
            raise ValueError(f"Layer {name!r} cannot be quantized: {error}") from error
        kind = torch.float32  # what scales are kept in
        layer = QuantizedLinear(
            found.codes,
            bits=self.bits,
            shape=(W.shape[0], W.shape[1]),
            scale=found.grid.scale.to(kind),
            zero=found.grid.zero.to(kind),
            rescale=None if found.rescale is None else found.rescale.to(kind),
            seeds=torch.tensor(seeds, device=W.device) if self.incoherence else None,
            bias=module.bias,  # type: ignore[arg-type]
        )
        row = {
            "layer": name,
            "bits": self.bits,
            "method": self.rounding + (", incoherent" if self.incoherence else ""),
            "weights": W.numel(),
            "bits_per_weight": layer.bits_per_weight(),
            **found.facts,
            "seconds": time.monotonic() - started,
        }
        return layer, row
