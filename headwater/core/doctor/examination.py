"""The examination: all checks, from the loss to the size of the data, in one diagnosis."""

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from headwater.core.capture import Progress
from headwater.core.doctor.checks import (
    coverage,
    modes,
    rank_and_memory,
    scored_tokens,
    sharing,
    weights,
    zero_gradients,
)
from headwater.core.doctor.diagnosis import Check, Diagnosis
from headwater.core.doctor.exam import Exam
from headwater.core.doctor.gradients import compare
from headwater.core.examples import Examples, as_examples
from headwater.core.follow import follow
from headwater.core.task import Task


def examine(
    model: nn.Module,
    train: Any,
    task: Task,
    *,
    layers: str | Sequence[str] = "trainable",
    skip: Sequence[str] = (),
    n: int = 4,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Prove on a few examples that the gradients of every followed layer are right.

    Each layer's per-example gradients are compared with plain autograd on the model's own
    parameters, one example at a time and in one batch. Whether the loss or the gradients depend on
    batching, padding, what stands under the mask, or chance is found out, and what the followed
    layers cover is told. The model's modes, gradients and parameters are left as they were.

    Args:
        model: The model.
        train: Its training data, as for `headwater.fit`.
        task: What it was trained for.
        layers: Which parameters to follow.
        skip: Patterns of parameters or modules to leave out.
        n: Examples to compare on, spread over the lengths.
        tolerance: Largest relative error of a layer's gradients; by the model's precision when left
            out.
        progress: Called with (done, total, note).

    Returns:
        The diagnosis; `ok` says whether the numbers can be trusted.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> data = (torch.randn(20, 3), torch.randint(2, (20,)))
        >>> from headwater.core.task import Classification
        >>> examine(model, data, Classification()).ok
        True
    """
    started = time.perf_counter()
    examples = as_examples(train)
    exam = Exam(model, task, examples, _chosen(examples, n), tolerance, progress)
    checks = [weights(model), *modes(model), *exam.loss_checks()]
    facts: dict[str, Any] = {"examples": [examples.ids[i] for i in exam.indices]}
    if any(
        check.status == "fail" and check.name in ("loss", "repeats", "alone") for check in checks
    ):
        detail = "not compared, because the loss itself is not in order"
        return Diagnosis((*checks, Check("gradients", "warn", detail)), facts=facts)
    try:
        followed = follow(model, task, exam.batch, layers=layers, skip=skip)
    except Exception as error:  # whatever a user's model raises is the finding
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Diagnosis((*checks, Check("coverage", "fail", said)), facts=facts)
    checks += [coverage(model, followed), *sharing(followed)]
    compared = compare(exam, followed)
    checks += compared.checks()
    checks += [*zero_gradients(model, compared), *scored_tokens(task, examples)]
    checks += rank_and_memory(exam, followed, compared)
    facts |= {
        "dtype": str(exam.dtype).removeprefix("torch."),
        "tolerance": exam.tolerance,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "positions_per_example": compared.positions,
        "relative_error": max(compared.worst().values(), default=0.0),
        "seconds": time.perf_counter() - started,
    }
    return Diagnosis(
        tuple(checks),
        compared.layer_checks(facts["n_parameters"]),
        followed.coverage,
        followed.left_out,
        followed.tied,
        followed.reused,
        facts,
    )


def _chosen(examples: Examples, n: int) -> list[int]:
    """A few examples spread over the lengths, the very longest not among them."""
    total = len(examples)
    order = sorted(range(total), key=lambda i: (examples.lengths or [0] * total)[i])
    n = min(n, total)
    return [order[(2 * j + 1) * total // (2 * n)] for j in range(n)]
