r"""The exact damped Gauss–Newton matrix, inverted in the space of examples.

With one row $v_r = \sqrt{w_r}\,\nabla\ell_r$ for each kept label of each example, the Gauss–Newton matrix is
$C = \frac1N V^\top V$, and by the Woodbury identity any function of it acts as

$$f(C)\,x = f(0)\,x + V^\top M V x, \qquad
M = \tfrac1N\, U \operatorname{diag}\!\Big(\tfrac{f(s) - f(0)}{s}\Big) U^\top,$$

where $\frac1N V V^\top = U \operatorname{diag}(s) U^\top$. For the damped inverse this is one Cholesky factorization,
$M = -\frac1\rho\,(\rho N I + V V^\top)^{-1}$. The parameters are never multiplied with each other: with one position
an example the Gram matrix $V V^\top$ is a sum over layers of products of small Gram matrices. No Kronecker
approximation is made and layers are not taken as independent. The kernel form is known from natural-gradient work
(Ren and Goldfarb 2019, arXiv:1906.02353).
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import sweep
from headwater.core.cost import available_memory_bytes
from headwater.core.curvature.base import (
    Curvature,
    CurvatureMethod,
    FitContext,
    Preconditioned,
    SpectralFunction,
)
from headwater.core.curvature.moments import LostTrace
from headwater.core.damping import Inverse
from headwater.core.gradients import (
    Block,
    CollectGradients,
    Factored,
    Gradients,
    combined,
    dense,
    inner,
)
from headwater.core.target import Fisher, fisher_target
from headwater.numerics import spectral


def gram_eigen(
    gram: Float[Tensor, "row row"], n: float
) -> tuple[Float[Tensor, " rank"], Float[Tensor, "row rank"]]:
    r"""Eigenvalues s and eigenvectors U of $\frac1N V V^\top$.

    Eigenvalues below 1e-10 of the largest are dropped: their directions are the null space but for rounding.
    """
    s, U = spectral.eigh(gram / n)
    keep = s > 1e-10 * s[-1]
    return s[keep], U[:, keep]


def gram_middle(
    eigen: tuple[Tensor, Tensor], n: float, function: SpectralFunction, mean: float
) -> tuple[Float[Tensor, "row row"], float]:
    r"""The matrix M and $f(0)$ of $f(C) = f(0) I + V^\top M V$."""
    s, U = eigen
    f0 = float(function(s.new_zeros(1), mean))
    return (U * ((function(s, mean) - f0) / s / n)) @ U.mT, f0


class _Combined(Preconditioned):
    r"""$f(0)\,q + \sum_r c_r v_r$, left as a combination of rows: cheaper than its sum for many queries."""

    layers_add_up = False

    def __init__(self, base: Gradients, f0: float, coefficients: Tensor, rows: Gradients):
        self.base, self.f0, self.coefficients, self.rows = base, f0, coefficients, rows
        self.n = len(base)
        self._pending: Tensor | None = None

    def layer(self, name: str, block: Block) -> Tensor:
        part = inner(self.rows.blocks[name], block)
        self._pending = part if self._pending is None else self._pending.add_(part)
        return self.f0 * inner(self.base.blocks[name], block)

    def finish_batch(self) -> Tensor | None:
        pending, self._pending = self._pending, None
        return None if pending is None else self.coefficients.to(pending) @ pending

    def dense(self) -> Gradients:
        return _combination(self.base, self.f0, self.coefficients, self.rows)


def _combination(base: Gradients, f0: float, coefficients: Tensor, rows: Gradients) -> Gradients:
    return Gradients(
        {
            name: combined(block, coefficients).add_(dense(base.blocks[name]), alpha=f0)
            for name, block in rows.blocks.items()
        }
    )


class DualCurvature(Curvature):
    r"""The exact Gauss–Newton matrix through the rows of its square root.

    Args:
        rows: Weighted gradients $v_r$ of the kept labels.
        folds: Fold of each row.
        n_folds: Examples of each fold.
        facts: Numbers worth telling.
        gram: $V V^\top$, computed when left out.
        owners: Training example of each row; None where it is not known.
    """

    kind: ClassVar[str] = "dual"

    def __init__(
        self,
        rows: Gradients,
        folds: Tensor,
        n_folds: Tensor,
        facts: dict[str, Any] | None = None,
        gram: Float[Tensor, "row row"] | None = None,
        owners: Tensor | None = None,
    ):
        self.rows, self.folds, self.n_folds = rows, folds, n_folds.double()
        self.owners = owners
        self.n_examples = float(n_folds.sum())
        self.gram = gram_matrix(rows) if gram is None else gram
        self.n_parameters = sum(_numel(block) for block in rows.blocks.values())
        self.facts = facts or {}
        self._spectrum: Tensor | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._solved: tuple[SpectralFunction, tuple[Tensor, float, bool]] | None = None

    @property
    def mean_eigenvalue(self) -> float:
        return float(self.gram.diagonal().sum()) / self.n_examples / self.n_parameters

    def spectra(self) -> dict[str, Tensor]:
        if self._spectrum is None:
            known = None if self._eigen is None else self._eigen[0]
            s = spectral.eigvalsh(self.gram / self.n_examples) if known is None else known
            s = s[-self.n_parameters :]
            self._spectrum = torch.cat([s.new_zeros(self.n_parameters - len(s)), s])
        return {"all layers": self._spectrum}

    def _middle(self, function: SpectralFunction) -> tuple[Tensor, float, bool]:
        """M and f(0), as a Cholesky factor where f is the damped inverse; kept for the next queries."""
        if self._solved is None or self._solved[0] != function:
            self._solved = None  # frees the old one first
            self._solved = function, self._solve(function)
        return self._solved[1]

    def _solve(self, function: SpectralFunction) -> tuple[Tensor, float, bool]:
        mean, n = self.mean_eigenvalue, self.n_examples
        if isinstance(function, Inverse):
            rho = function.damping.absolute(mean)
            system = self.gram.clone()
            system.diagonal().add_(rho * n)
            factor, info = torch.linalg.cholesky_ex(system)
            if int(info) == 0:
                ends = factor.diagonal().max() / factor.diagonal().min()
                self.facts["condition"] = float(ends**2)
                return factor, 1 / rho, True
            warnings.warn(
                "The Gram matrix plus damping is not numerically positive; its eigenvalues are taken instead. "
                "Raise the damping, or fit the model in float64.",
                stacklevel=2,
            )
        if self._eigen is None:  # kept, as those who ask for one function ask for others
            self._eigen = gram_eigen(self.gram, n)
        return *gram_middle(self._eigen, n, function, mean), False

    def _coefficients(self, queries: Gradients, function: SpectralFunction) -> tuple[Tensor, float]:
        """M V q for each query (query, row), and f(0)."""
        seen = self.rows.inner(queries).to(self.gram)
        middle, f0, is_factor = self._middle(function)
        solved = torch.cholesky_solve(seen, middle) * -f0 if is_factor else middle @ seen
        return solved.mT, f0

    def quadratic(self, gradients: Gradients, function: SpectralFunction) -> Tensor:
        seen = self.rows.inner(gradients).to(self.gram)
        middle, f0, is_factor = self._middle(function)
        if is_factor:
            own = -f0 * torch.linalg.solve_triangular(middle, seen, upper=False).square().sum(0)
        else:
            own = (seen * (middle @ seen)).sum(0)
        return own + f0 * gradients.norms().square().to(own)

    def apply(self, gradients: Gradients, function: SpectralFunction) -> Gradients:
        coefficients, f0 = self._coefficients(gradients, function)
        return _combination(gradients, f0, coefficients, self.rows)

    def prepare(
        self,
        queries: Gradients,
        function: SpectralFunction,
        n_rows: int,
        *,
        terms: int | None = None,
    ) -> Preconditioned:
        coefficients, f0 = self._coefficients(queries, function)
        n_queries, n_root = len(queries), len(self.rows)
        sides = sum(_sides(block) for block in self.rows.blocks.values())
        summed_once = n_queries * self.n_parameters * (n_root + n_rows)
        if summed_once <= n_rows * n_root * (sides + n_queries):
            return Preconditioned(_combination(queries, f0, coefficients, self.rows))
        return _Combined(queries, f0, coefficients, self.rows)

    @property
    def n_replicates(self) -> int:
        return len(self.n_folds) if int((self.n_folds > 0).sum()) > 1 else 0

    def replicates(self) -> list["DualCurvature"]:
        found = []
        for k in range(self.n_replicates):
            keep = (self.folds != k).nonzero().squeeze(1)
            n = self.n_folds[torch.arange(len(self.n_folds)) != k]
            gram = self.gram[keep][:, keep]
            owners = None if self.owners is None else self.owners[keep]
            found.append(
                DualCurvature(self.rows[keep], self.folds[keep], n, gram=gram, owners=owners)
            )
        return found

    def tensors(self) -> dict[str, Tensor]:
        state = {"folds": self.folds, "n_folds": self.n_folds, "gram": self.gram}
        if self.owners is not None:
            state["owners"] = self.owners
        for name, block in self.rows.blocks.items():
            if isinstance(block, Factored):
                state |= {f"a:{name}": block.a, f"g:{name}": block.g}
            else:
                state[f"d:{name}"] = block
        return state

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "DualCurvature":
        blocks: dict[str, Block] = {k[2:]: v for k, v in tensors.items() if k.startswith("d:")}
        for k, v in tensors.items():
            if k.startswith("a:"):
                blocks[k[2:]] = Factored(v, tensors[f"g:{k[2:]}"])
        given = (
            tensors["folds"],
            tensors["n_folds"],
            facts,
            tensors["gram"],
            tensors.get("owners"),
        )
        return cls(Gradients(blocks), *given)


def gram_matrix(rows: Gradients) -> Float[Tensor, "row row"]:
    """Inner products of all pairs of rows, float64."""
    n = len(rows)
    total = torch.zeros(n, n, dtype=torch.float64)
    step = max(1, (1 << 25) // n)
    for start in range(0, n, step):  # the upper triangle, in strips
        part = slice(start, start + step)
        for block in rows.blocks.values():
            total[part, start:] += inner(block[part], block[start:]).double().cpu()
        total[start:, part] = total[part, start:].mT.clone()
    return total


def _numel(block: Block) -> int:
    return dense(block[:1])[0].numel()


def _sides(block: Block) -> int:
    """Multiplications that the inner product of two gradients takes."""
    return (
        (block.a.shape[-1] + block.g.shape[-1]) * block.pos**2
        if isinstance(block, Factored)
        else block[0].numel()
    )


_DECOMPOSED = 4  # matrices of the Gram matrix's size: itself, eigenvectors, and what eigh works in


@dataclass(frozen=True, kw_only=True)
class Dual(CurvatureMethod):
    """The exact damped Gauss–Newton matrix in example space.

    Args:
        fisher: "exact" keeps every label of probability at least `cut`; "mc" draws labels (for large vocabularies).
        draws: Draws an example for "mc".
        cut: Least probability of a label that is kept; what is lost of the trace is reported.
        folds: Folds of the data, for intervals.
        max_rows: Refuse more rows than this: the Gram matrix takes 8 rows² bytes, twice.
        seed: Seed of the draws.

    Raises:
        ValueError: There are more rows than `max_rows`.
        MemoryError: Their Gram matrix and its eigenvectors do not fit into memory.
    """

    kind: ClassVar[str] = "dual"

    fisher: Fisher = "exact"
    draws: int = 1
    cut: float = 1e-3
    folds: int = 5
    max_rows: int = 20_000
    seed: int = 0

    def fit(self, context: FitContext) -> DualCurvature:
        target = fisher_target(self.fisher, draws=self.draws, cut=self.cut, seed=self.seed)
        collect = CollectGradients(context.capture.layers.values())
        lost = LostTrace(target)
        for number, capture in enumerate(context.captures):
            sweep(
                capture,
                context.examples,
                [collect, lost],
                target,
                batches=context.batches,
                checkpoint=context.checkpoint("rows", number),
                progress=context.progress,
                note="rows of the Gauss–Newton root",
                stop=lambda: self._refuse(collect),
            )
        rows, owners, folds = collect.finish()
        n_folds = torch.zeros(self.folds, dtype=torch.float64)
        for plan in context.batches:
            n_folds[plan.fold] += len(plan.indices) * len(context.captures)
        facts: dict[str, Any] = {"rows": len(rows)}
        if lost.share is not None:
            facts["lost_trace"] = lost.share
        return DualCurvature(rows, folds, n_folds, facts, owners=owners)

    def _refuse(self, collect: CollectGradients) -> bool:
        n, remedy = (
            collect.n_rows,
            f"Raise `cut` (now {self.cut}), draw labels with fisher='mc', or use EKFAC().",
        )
        if n > self.max_rows:
            raise ValueError(
                f"The dual curvature has more than max_rows={self.max_rows:,} rows ({n:,} so far), and its Gram matrix "
                f"takes {8 * n**2 / 1e9:.1f} GB twice over. {remedy}"
            )
        need, free = _DECOMPOSED * 8 * n**2, available_memory_bytes()
        if need > free:
            raise MemoryError(
                f"The dual curvature has {n:,} rows so far; decomposing their Gram matrix takes {need / 1e9:.1f} GB, "
                f"and {free / 1e9:.1f} GB are free. {remedy}"
            )
        return False
