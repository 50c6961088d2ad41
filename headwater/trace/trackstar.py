r"""TrackStar: unit-length projected gradients, corrected by the optimizer and whitened layer by layer.

Chang, Rajagopal, Bolukbasi, Dixon and Tenney (2024), "Scalable Influence and Fact Tracing for Large Language Model
Pretraining", arXiv:2410.17413. With V the optimizer's running mean of squared gradients, a two-sided projection P
(LoGra, arXiv:2405.13954) and a mixed autocorrelation of each layer,
$R = \lambda R_\text{eval} + (1 - \lambda) R_\text{train}$,

$$\phi(z) = \frac{R^{-1/2} P V^{-1/2} \nabla\ell(z)}{\lVert R^{-1/2} P V^{-1/2} \nabla\ell(z) \rVert},
\qquad \tau(q, n) = \phi(q)^\top \phi(n).$$
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.gradients import Block, Factored, dense
from headwater.core.layers import Layer
from headwater.core.projection import TwoSided, project_examples, project_gradients
from headwater.core.scores import Scores
from headwater.core.target import Loss
from headwater.core.task import Measurement
from headwater.numerics import spectral
from headwater.trace.base import Attributor, to_scores
from headwater.trace.influence import query_gradients
from headwater.trace.moments import Moments, moment_of


def factored_scale(
    square: Float[Tensor, "*groups out in"],
) -> tuple[Float[Tensor, "*groups out"], Float[Tensor, "*groups in"]]:
    r"""$1/\sqrt{r_i}$ and $1/\sqrt{c_j}$ with $V_{ij} \approx r_i c_j$, Adafactor's estimate; zero where V is.

    Example:
        >>> r, c = torch.tensor([1.0, 4.0]), torch.tensor([9.0, 1.0])
        >>> out, in_ = factored_scale(torch.outer(r, c))
        >>> bool(torch.allclose(torch.outer(out, in_).float(), torch.outer(r, c).rsqrt()))
        True
    """
    square = square.double()
    row, column = square.mean(-1), square.mean(-2)
    mean = row.mean(-1, keepdim=True)
    return tuple(  # type: ignore[return-value]
        torch.where(x > 0, (x / scale).clamp(min=torch.finfo(x.dtype).tiny).rsqrt(), 0.0)
        for x, scale in ((row, torch.ones_like(mean)), (column, mean))
    )


def whitened(
    rows: Float[Tensor, "n k"], second_moment: Float[Tensor, "k k"], damping: float
) -> Float[Tensor, "n k"]:
    r"""$(R + \rho I)^{-1/2} \phi$, with ρ in units of the mean eigenvalue of R."""
    values, vectors = spectral.eigh(second_moment)
    mean = values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    return (rows.double() @ vectors * (values + damping * mean).rsqrt()) @ vectors.mT


def unit(rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Rows of length one; a row of zeros stays."""
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms.clamp(min=torch.finfo(rows.dtype).tiny), 0.0)


@dataclass(frozen=True, kw_only=True)
class TrackStar(Attributor):
    """Cosine of whitened, projected, optimizer-corrected gradients.

    Args:
        rank: Numbers kept on each side of a layer's gradient.
        mixing: Weight of the queries' own autocorrelation beside the training data's, which plays down what all
            queries share. The paper takes 0.9 and more over thousands of queries; few queries need 0.
        damping: Added to the autocorrelation, in units of its mean eigenvalue.
        seed: Seed of the projection.
    """

    paper: ClassVar[str] = "arXiv:2410.17413"

    rank: int = 16
    mixing: float = 0.0
    damping: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        if not (0 <= self.mixing <= 1 and self.damping > 0):
            raise ValueError(
                f"mixing must lie between 0 and 1 and damping be positive; got {self.mixing} and {self.damping}."
            )

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        moments: Moments | None = None,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example.

        Args:
            fit: The fitted model; its curvature is not used.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            moments: The optimizer's moments, of which `square` is used; gradients stay as they are when left out.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            progress: Called with (done, total, note).

        Raises:
            ValueError: Moments are given that lack a followed layer.
        """
        examples = as_examples(queries)
        correct = None if moments is None else _Corrected(fit, moments)
        projection = TwoSided(self.rank, seed=self.seed)
        gradients = query_gradients(fit, examples, measurement, weights, progress)
        asked = project_gradients(gradients, fit.followed, projection, transform=correct)
        train = project_examples(
            fit.capture(),
            fit.train,
            projection,
            Loss(),
            batches=fit.batches(fit.train),
            transform=correct,
            progress=progress,
        )
        for name, rows in train.items():
            mixed = sum(
                share * x.double().mT @ x.double() / len(x)
                for share, x in ((self.mixing, asked[name]), (1 - self.mixing, rows))
            )
            asked[name], train[name] = (
                whitened(x, torch.as_tensor(mixed), self.damping) for x in (asked[name], rows)
            )
        phi_q, phi_n = (unit(torch.cat(list(x.values()), dim=1)) for x in (asked, train))
        return to_scores(
            self,
            fit,
            examples,
            -phi_q @ phi_n.mT,
            measurement=measurement,
            weights=weights,
            names=names,
            facts={
                "papers": [self.paper, "arXiv:2405.13954"],
                "second_moment": "none" if moments is None else "factored",
            },
        )


class _Corrected:
    """Gradients divided by the root of a factored second moment; factored ones stay factored."""

    def __init__(self, fit: Fit, moments: Moments):
        self.scales = {
            layer.name: factored_scale(moment_of(layer, moments, "square"))
            for layer in fit.followed
        }

    def __call__(self, layer: Layer, block: Block) -> Block:
        out, in_ = (x.to(block.device, block.dtype) for x in self.scales[layer.name])
        if isinstance(block, Factored):
            return Factored(block.a * in_[..., None, None, :], block.g * out[..., None, None, :])
        return dense(block) * out[..., :, None] * in_[..., None, :]
