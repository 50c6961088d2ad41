"""The plan: needs and stages put together."""

import time
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from shutil import disk_usage
from typing import Any

from torch import nn

from headwater.core.capture import Capture, plan_batches
from headwater.core.cost import available_memory_bytes, held_memory_bytes, positions
from headwater.core.curvature import CurvatureMethod
from headwater.core.curvature.choice import choose_curvature
from headwater.core.examples import as_examples, to_device
from headwater.core.follow import follow
from headwater.core.plan.clock import Clock
from headwater.core.plan.needs import Needs
from headwater.core.plan.summary import Plan, Stage, amount
from headwater.core.plan.work import Work, existing_folder
from headwater.core.task import Task


def plan(
    model: nn.Module,
    train: Any,
    task: Task,
    *,
    curvature: CurvatureMethod | str = "auto",
    layers: str | Sequence[str] = "trainable",
    skip: Sequence[str] = (),
    n_queries: int = 10,
    batch_size: int = 256,
    batch_tokens: int = 4096,
    folds: int | None = None,
    folder: str | Path | None = None,
) -> Plan:
    """Measure this machine for a few seconds, and predict what a fit and its first trace will take.

    Args:
        model: The model.
        train: Its training data, as for `headwater.fit`.
        task: What it was trained for.
        curvature: The curvature, its name, or "auto".
        layers: Which parameters to follow.
        skip: Patterns of parameters or modules to leave out.
        n_queries: Queries that will be asked.
        batch_size: Most examples in a batch.
        batch_tokens: Most positions in a batch, for data with lengths.
        folds: Folds of the data that intervals come from; the curvature's own number when left out.
        folder: Where the fit will be saved: its disk is measured too.

    Returns:
        The plan. Where memory or disk do not suffice, `ok` is false and `problems` say what to do.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> data = (torch.randn(20, 3), torch.randint(2, (20,)))
        >>> from headwater.core.task import Classification
        >>> plan(model, data, Classification(), curvature="ekfac").ok
        True
    """
    started = time.perf_counter()
    examples = as_examples(train)
    device = next(model.parameters()).device
    probe = to_device(examples.batch(range(min(2, len(examples)))), device)
    capture = Capture(model, task, follow(model, task, probe, layers=layers, skip=skip))
    method = choose_curvature(curvature, capture, examples)
    if folds is not None and hasattr(method, "folds"):
        method = replace(method, folds=folds)  # type: ignore[type-var]
    batches = plan_batches(
        examples, batch_size=batch_size, batch_tokens=batch_tokens, folds=method.folds
    )
    needs = Needs(capture, examples, batches, method, n_queries)
    held, available = held_memory_bytes(device), available_memory_bytes(device)
    problems, notes, smaller = needs.problems(available)
    free = None if folder is None else disk_usage(existing_folder(Path(folder))).free
    if free is not None and sum(needs.disk().values()) > free:
        problems.append(
            f"The run folder needs {amount(sum(needs.disk().values()))} of disk and {amount(free)} are free: "
            "name a folder on another disk, lower `folds`, or follow fewer layers."
        )
    stages: list[Stage] = []
    pass_seconds = inf
    if not problems:
        clock = Clock(capture, examples, batches)
        pass_seconds = clock.plain_pass()
        stages = Work(clock, method, needs, n_queries, folder).stages()
    if getattr(method, "tolerance", None) is not None:
        notes.append(
            "With `tolerance` the passes may end early: these times are the most they take."
        )
    return Plan(
        curvature=method.kind,
        n_examples=len(examples),
        n_queries=n_queries,
        pass_seconds=pass_seconds,
        stages=tuple(stages),
        memory={"held already": held} | needs.peak(),
        available_memory=available,
        disk=needs.disk(),
        available_disk=free,
        batch_size=max(1, int(batch_size * smaller)),
        batch_tokens=max(1, int(batch_tokens * smaller)),
        problems=tuple(problems),
        notes=tuple(notes),
        facts={
            "n_parameters": needs.n_parameters,
            "n_batches": len(batches),
            "n_positions": sum(positions(examples, b) for b in batches),
            "rows": needs.n_rows,
            "planning_seconds": time.perf_counter() - started,
        },
    )
