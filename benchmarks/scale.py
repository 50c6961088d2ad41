"""Bytes, passes and hours for corpora and models that no machine here can hold.

    python benchmarks/scale.py              # the tables of docs/benchmarks/scale.md
    python benchmarks/scale.py --measured   # this machine's constants

What is measured is measured on a small GPT; the rest is a count of multiplications, times how far the count was from
the measurement there. The hours of a GPU rest on an assumed utilisation, and no GPU has run this.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from workloads import _text_examples

import headwater
from headwater.core.capture import Capture, evaluation_mode, plan_batches
from headwater.core.cost import weight_gradients
from headwater.core.curvature import EKFAC
from headwater.core.examples import Examples
from headwater.core.follow import follow
from headwater.core.projection import TwoSided, project_examples
from headwater.core.target import Loss
from headwater.core.task import CausalLM
from headwater.models.gpt import GPT

TOKENS = (1e9, 1e10, 1e11)
LENGTH = 1024  # tokens an example
RANK = 16  # of the index, on each side of each matrix
FOLDS = 5
MAX_FACTOR = 8192

# Measured by --measured on one thread of an x86-64 core with AVX-512, CPU time, least of three.
RATE = 2711.0  # tokens a second of a plain pass of the small GPT
INDEX = 0.90  # plain passes that rows of 16 by 16 take there
# Measured with bfloat16 products on two threads, docs/benchmarks/cost.md: plain passes of a fit with one basis.
FIT = 2.58

# Assumed, not measured: an H100 with bfloat16 products at two fifths of its peak; eigendecompositions at 1 TFLOP/s.
GPU, EIGEN = 0.4 * 989e12, 1e12


@dataclass(frozen=True)
class Model:
    """The matrices of a Llama-like decoder; embeddings and heads are left out.

    Attributes:
        name: For the tables.
        dim: Width of the residual stream.
        blocks: How many.
        kv: Width of keys and of values.
        hidden: Width inside the feed-forward part.
        gated: Whether that has a gate; the small GPT has none.
    """

    name: str
    dim: int
    blocks: int
    kv: int
    hidden: int
    gated: bool = True

    @property
    def matrices(self) -> list[tuple[int, int, bool]]:
        """(out, in, whether the input is another matrix's as well) of one block."""
        d, k, h = self.dim, self.kv, self.hidden
        attention = [(d, d, False), (k, d, True), (k, d, True), (d, d, False)]
        return [*attention, (h, d, False), *[(h, d, True)] * self.gated, (d, h, False)]

    @property
    def parameters(self) -> int:
        return self.blocks * sum(out * in_ for out, in_, _ in self.matrices)

    @property
    def factors(self) -> int:
        """Numbers in the second moments, sides above MAX_FACTOR as diagonals."""
        each = sum(_factor(out) + _factor(in_) * (not shared) for out, in_, shared in self.matrices)
        return self.blocks * each

    @property
    def pass_multiplications(self) -> float:
        """Of a plain pass, for each token: forward, to activations, to weights."""
        return 3.0 * self.parameters

    @property
    def moments_multiplications(self) -> float:
        """Forward, back to activations, and the upper triangles of the second moments."""
        return 2.0 * self.parameters + self.factors / 2

    @property
    def eigenvalue_multiplications(self) -> float:
        """Forward, back to activations, and every example's gradient, whose tokens or matrix are rotated."""
        total = 2.0 * self.parameters
        for out, in_, shared in self.matrices:
            sides = [
                side for side in (out, in_) if side <= MAX_FACTOR
            ]  # longer ones keep their basis
            matrix = out * in_ * sum(sides) / LENGTH
            tokens = sum(side**2 for side in sides) - (in_**2 if shared and in_ in sides else 0)
            total += self.blocks * (out * in_ + min(tokens, matrix))
        return total

    @property
    def fit_passes(self) -> float:
        """An EK-FAC fit over all data, by count, in plain passes."""
        both = self.moments_multiplications + self.eigenvalue_multiplications
        return both / self.pass_multiplications

    @property
    def row(self) -> int:
        """Numbers of an example's row in the index."""
        return self.blocks * len(self.matrices) * RANK**2

    @property
    def eigh(self) -> float:
        """Multiplications of the eigendecompositions, about 9 n³ each."""
        sides = [s for out, in_, sh in self.matrices for s in ([out] if sh else [out, in_])]
        return self.blocks * sum(9.0 * s**3 for s in sides if s <= MAX_FACTOR)


def _factor(side: int) -> int:
    return side**2 if side <= MAX_FACTOR else side


SMALL = Model("small GPT", 256, 4, 256, 1024, gated=False)
MODELS = (
    Model("0.1 B", 576, 30, 192, 1536),
    Model("1 B", 2048, 16, 512, 8192),
    Model("8 B", 4096, 32, 1024, 14336),
)


def calibration() -> float:
    """How many times as long as its multiplications say the small GPT's fit takes."""
    return FIT / SMALL.fit_passes


def amount(x: float) -> str:
    """Bytes for people."""
    unit, size = next((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if x >= s)
    return f"{x / size:,.0f} {unit}" if x >= 10 * size else f"{x / size:.1f} {unit}"


def hours(x: float) -> str:
    """Hours for people."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def table(head: str, rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    print(head, "|" + "---|" * (head.count("|") - 1), sep="\n")
    print(*("| " + " | ".join(row) + " |" for row in rows), "", sep="\n")


def show() -> None:
    """The tables of docs/benchmarks/scale.md."""
    rows = []
    for m in MODELS:
        fit = m.fit_passes * calibration()
        sizes = (4 * m.factors, 4 * m.factors, 4 * m.parameters, 4 * FOLDS * m.parameters)
        eigen = 2 * m.eigh / EIGEN / 3600
        rows.append(
            [m.name, f"{m.parameters / 1e9:.2f} B", *map(amount, sizes), f"{fit:.1f}", hours(eigen)]
        )
    table(
        "| model | parameters followed | factors | bases | eigenvalues | with 5 folds | fit, passes | eigen, GPU h |",
        rows,
    )
    rows = []
    for m in MODELS:
        for n in TOKENS:
            numbers = m.row * n / LENGTH
            plain = 2 * m.pass_multiplications * n / GPU / 3600
            fit = plain * m.fit_passes * calibration()
            sizes = (2 * numbers, numbers)
            times = (plain, fit, fit / 8, fit / 64, plain * INDEX)
            rows.append([m.name, f"{n / 1e9:,.0f} B", *map(amount, sizes), *map(hours, times)])
    table(
        "| model | tokens | index, 16 bits | 8 bits | plain pass, GPU h | fit, GPU h | on 8 GPUs, h | on 64, h | "
        "index build, GPU h |",
        rows,
    )
    rows = []
    for m in MODELS:
        plain = 1e9 * m.pass_multiplications / (SMALL.pass_multiplications * RATE) / 3600
        rows.append([m.name, hours(plain), hours(plain * m.fit_passes * calibration())])
    table("| model | plain pass over 1 B tokens, core h | fit, core h |", rows)
    flops = 2 * SMALL.pass_multiplications * RATE
    print(
        f"{flops / 1e9:.0f} GFLOP/s on a core; a fit takes {calibration():.2f} times its multiplications"
    )


def least(work: Callable[[], object], repeats: int = 3) -> float:
    """Least CPU seconds."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def measure(n: int = 64) -> None:
    """Print this machine's constants."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, task = GPT(2048), CausalLM()
    data: Examples = _text_examples(torch.randint(2048, (n, 128)))
    capture = Capture(
        model, task, follow(model, task, data.batch([0, 1]), skip=["embed*", "position*"])
    )
    batches = plan_batches(data)

    def plain() -> None:
        with evaluation_mode(model), weight_gradients(model) as parameters, torch.enable_grad():
            for batch in batches:
                loss = task.loss(model, data.batch(batch.indices)).sum()
                torch.autograd.grad(loss, parameters, allow_unused=True)

    seconds = least(plain)
    options: dict[str, Any] = {"batches": batches}
    index = least(lambda: project_examples(capture, data, TwoSided(RANK), Loss(), **options))
    fit = least(
        lambda: headwater.fit(
            model, data, task, curvature=EKFAC(own_bases=False), skip=["embed*", "position*"]
        ),
        repeats=1,
    )
    print(
        f"RATE = {n * 128 / seconds:.0f}  INDEX = {index / seconds:.2f}  fit {fit / seconds:.2f}, with its checks"
    )


def main(*, measured: bool = False) -> None:
    """Print the tables.

    Args:
        measured: Measure this machine's constants instead.
    """
    measure() if measured else show()


if __name__ == "__main__":
    tyro.cli(main)
