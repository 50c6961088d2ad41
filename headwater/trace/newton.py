r"""Newton's step in place of the first-order one: what leaving out would do in the linearized model.

An influence is a derivative at the model trained on everything. There each example pulls with the loss that is left
*after* it was learned, and retraining without it is a step, not a derivative. In the linearized model both can be had
exactly. For a subset S of size n let

$$H_S = \tfrac1n V_S^\top V_S + \rho I, \qquad
\Delta_S = H_S^{-1}\Big(\tfrac1N \sum_j \nabla\ell_j - \tfrac1n \sum_{j \in S} \nabla\ell_j\Big), \qquad
\tilde g_i = \nabla\ell_i + V_i^\top V_i \Delta_S ,$$

with the rows V of the Gauss–Newton root (`Dual`): the parameters move by $\Delta_S$ when trained on S, and $\tilde g_i$
is an example's gradient there. Its presence beside the others changes a measurement by

$$\tau_S(q, i) = -\tfrac1n \nabla f_q^\top \big(H_S \pm \tfrac1n V_i^\top V_i\big)^{-1} \tilde g_i ,$$

plus where i is not in S, minus where it is. With S all examples this is approximate leave-one-out (Beirami et al.
2017, arXiv:1711.05420; Rad and Maleki 2020, arXiv:1801.10243). The mean over random halves is the Data Banzhaf
value (Wang and Jia 2023, arXiv:2205.15466) of the linearized model: the coefficients of the sum that comes closest to
its outcomes over all subsets, which is what retraining on random halves measures.

Everything is computed from inner products: with $A = \rho n I + V_S V_S^\top$,
$x^\top H_S^{-1} y = \frac1\rho \big(x^\top y - (V_S x)^\top A^{-1} (V_S y)\big)$.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from headwater.core.capture import Progress, sweep
from headwater.core.cost import available_memory_bytes
from headwater.core.curvature import DualCurvature, Preconditioned
from headwater.core.damping import Damping
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.gradients import Gradients
from headwater.core.scores import Scores
from headwater.core.scoring import PairScores
from headwater.core.target import Loss
from headwater.core.task import Measurement
from headwater.numerics.ranks import spearman
from headwater.trace.base import Attributor, to_scores
from headwater.trace.influence import query_gradients

_AT_ONCE = 2048  # rows of the root that are solved for together


@dataclass(frozen=True)
class Linearized:
    """What is known of a linearized model: inner products of its gradients.

    Attributes:
        gram: Of the Gauss–Newton root's rows with each other.
        row_loss: Of the rows with the losses' gradients.
        row_query: Of the rows with the queries' gradients.
        loss_query: Of the losses' gradients with the queries'.
        owner: Training example of each row, ascending.
    """

    gram: Float[Tensor, "row row"]
    row_loss: Float[Tensor, "row train"]
    row_query: Float[Tensor, "row asked"]
    loss_query: Float[Tensor, "train asked"]
    owner: Int64[Tensor, " row"]


def subset_effects(
    model: Linearized, chosen: Bool[Tensor, " train"], rho: float
) -> Float[Tensor, "asked train"]:
    r"""$\tau_S(q, i)$ of every example, for one subset S.

    Args:
        model: The linearized model.
        chosen: Which examples are in S.
        rho: The damping.
    """
    n, n_train = int(chosen.sum()), len(chosen)
    inside = chosen[model.owner].nonzero().squeeze(1)
    place = torch.full_like(model.owner, -1)
    place[inside] = torch.arange(len(inside))
    inverse = model.gram[inside[:, None], inside]
    inverse.diagonal().add_(rho * n)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))

    pull = (1 / n_train - chosen.double() / n).to(model.row_loss)
    seen = model.row_loss @ pull
    solved_seen = torch.zeros_like(seen)
    solved_seen[inside] = inverse @ seen[inside]
    moved = (seen - model.gram @ solved_seen) / rho
    solved_query = inverse @ model.row_query[inside]
    row_loss = model.row_loss[inside]
    effects = torch.empty_like(model.loss_query.mT)
    for some, rows, member in _parts(model.owner, chosen):
        b, c = rows.shape
        towards = model.gram[rows.flatten()][:, inside]  # V_i V_Sᵀ
        if member:  # V_S V_Sᵀ = A - ρnI
            solved = -rho * n * inverse[place[rows.flatten()]]
            solved[torch.arange(b * c), place[rows.flatten()]] += 1
        else:
            solved = towards @ inverse
        towards, solved = towards.unflatten(0, (b, c)), solved.unflatten(0, (b, c))
        # Inner products under the inverse of H_S, for each example: its rows, its loss, the queries.
        own = model.gram[rows[:, :, None], rows[:, None, :]] - solved @ towards.mT
        loss = (
            model.row_loss[rows, some[:, None]]
            - (solved @ row_loss[:, some].mT[:, :, None])[..., 0]
        )
        query = model.row_query[rows] - towards @ solved_query
        direct = (model.loss_query[some] - row_loss[:, some].mT @ solved_query) / rho
        own, loss, query, shift = own / rho, loss / rho, query / rho, moved[rows]
        loss = loss + (own @ shift[..., None])[..., 0]  # of the gradient at the subset's parameters
        # (H ± VᵀV/n)⁻¹ = H⁻¹ ∓ H⁻¹Vᵀ (nI ± V H⁻¹ Vᵀ)⁻¹ V H⁻¹
        sign = -1 if member else 1
        middle = sign * own
        middle.diagonal(dim1=1, dim2=2).add_(n)
        corrected = shift - sign * torch.linalg.solve(middle, loss[..., None])[..., 0]
        effects[:, some] = -(direct + (corrected[:, None] @ query)[:, 0]).mT / n
    return effects


def _parts(owner: Tensor, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Examples with as many rows each, those rows, and whether the examples are in the subset."""
    counts = owner.bincount(minlength=len(chosen))
    first = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        for member in (True, False):
            some = ((counts == count) & (chosen == member)).nonzero().squeeze(1)
            for part in torch.split(some, max(1, _AT_ONCE // max(count, 1))):
                if len(part):
                    yield part, first[part, None] + torch.arange(count), member


def random_subsets(
    n_train: int, share: float, n: int, seed: int
) -> Iterator[Bool[Tensor, " train"]]:
    """Random subsets with this share of the examples; halves come in pairs, one the other's complement."""
    if share == 1:
        yield torch.ones(n_train, dtype=torch.bool)
        return
    generator = torch.Generator().manual_seed(seed)
    size = round(share * n_train)
    order = torch.empty(0)
    for number in range(n):
        paired = number % 2 == 1 and 2 * size == n_train
        order = order.flip(0) if paired else torch.randperm(n_train, generator=generator)
        chosen = torch.zeros(n_train, dtype=torch.bool)
        chosen[order[:size]] = True
        yield chosen


@dataclass(frozen=True, kw_only=True)
class Newton(Attributor):
    """Newton's step for leaving examples out, at the whole data or averaged over random subsets.

    Args:
        share: Share of the examples in each subset: 1/2 asks for the mean effect beside random halves, 1 for the
            effect of leaving one out of all.
        subsets: How many subsets to average over; with a share of 1 there is one.
        damping: A number (absolute), "0.1 relative" (to the mean eigenvalue), "weight_decay", or "auto".
        seed: Seed of the subsets.
    """

    paper: ClassVar[str] = "arXiv:2205.15466"

    share: float = 0.5
    subsets: int = 32
    damping: str | float | Damping = "auto"
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie above 0 and not above 1; got {self.share}.")
        if self.subsets < 1:
            raise ValueError(f"subsets must be 1 or more; got {self.subsets}.")

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example.

        Args:
            fit: The fitted model, with curvature="dual".
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those groups.
            progress: Called with (done, total, note).

        Raises:
            ValueError: The fit has no rows of the Gauss–Newton root for each example, or the subsets hold no or
                every example.
        """
        examples = as_examples(queries)
        curvature, n_train = _rows(fit)[0], len(fit.train)
        size = round(self.share * n_train)
        if not 0 < size < n_train and self.share != 1:
            raise ValueError(
                f"A share of {self.share} of {n_train} examples is {size}; choose one that leaves some in and some out."
            )
        gradients = query_gradients(fit, examples, measurement, weights, progress)
        model = linearized(fit, gradients, progress, share=self.share)
        damping = fit.damping(self.damping)
        rho = damping.absolute(curvature.mean_eigenvalue)
        halves = [torch.zeros(len(gradients), n_train, dtype=torch.float64) for _ in range(2)]
        subsets = random_subsets(n_train, self.share, self.subsets, self.seed)
        total = 1 if self.share == 1 else self.subsets
        for number, chosen in enumerate(subsets):
            halves[number // 2 % 2] += subset_effects(model, chosen, rho)
            if progress is not None:
                progress(number + 1, total, "subsets")
        facts: dict[str, Any] = {
            "curvature": {"kind": curvature.kind} | curvature.facts,
            "damping": vars(damping),
            "damping_ratio": rho / max(curvature.mean_eigenvalue, 1e-30),
        }
        if total >= 4:
            facts["agreement_of_halves"] = float(spearman(*halves).nanmean())
        return to_scores(
            self,
            fit,
            examples,
            (halves[0] + halves[1]) / total,
            measurement=measurement,
            weights=weights,
            names=names,
            unit="nats",
            facts=facts,
        )


def _rows(fit: Fit) -> tuple[DualCurvature, Int64[Tensor, " row"]]:
    """The fit's curvature, if it has rows whose examples are known, and those."""
    curvature, remedy = fit.curvature, "Fit with curvature='dual'."
    if not isinstance(curvature, DualCurvature):
        kind = fit.facts["options"]["curvature"]["kind"]
        raise ValueError(
            f"Newton's step needs the rows of the Gauss–Newton root; the fit's curvature is {kind!r}. {remedy}"
        )
    if curvature.owners is None or curvature.n_examples != len(fit.train):
        raise ValueError(f"The fit does not tell which example each of its rows is of. {remedy}")
    return curvature, curvature.owners


def linearized(
    fit: Fit, queries: Gradients, progress: Progress | None = None, *, share: float = 1
) -> Linearized:
    """The inner products, by one sweep over the training data.

    Args:
        fit: The fitted model.
        queries: Gradients of what is asked.
        progress: Called with (done, total, note).
        share: Share of the examples in the subsets to come, which memory has to suffice for.

    Raises:
        MemoryError: They do not fit.
    """
    curvature, owner = _rows(fit)
    n_rows, n_train = len(curvature.rows), len(fit.train)
    inside = (
        share * n_rows
    )  # a matrix over these and its inverse, beside products with every example
    need, free = 8 * (2.2 * inside**2 + 2.5 * n_rows * n_train), available_memory_bytes()
    if need > free:
        raise MemoryError(
            f"Newton's step over {n_rows:,} rows and {n_train:,} examples takes {need / 1e9:.1f} GB; {free / 1e9:.1f} "
            "GB are free. Raise `cut` of Dual, or use Influence."
        )
    both = [PairScores(Preconditioned(x), n_train) for x in (curvature.rows, queries)]
    batches = fit.batches(fit.train)
    sweep(
        fit.capture(), fit.train, both, Loss(), batches=batches, progress=progress, note="products"
    )
    row_loss, query_loss = (pairs.finish() for pairs in both)
    return Linearized(
        gram=curvature.gram,
        row_loss=row_loss,
        row_query=curvature.rows.inner(queries).double().cpu(),
        loss_query=query_loss.mT,
        owner=owner.cpu(),
    )
