"""`headwater audit drift`: how far checkpoints have moved from a fitted model in what they compute."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from headwater.cli.audit import opened, trajectories
from headwater.cli.common import emit_json, progress_bar, say
from headwater.cli.flags import parse, require
from headwater.cli.question import check_name

if TYPE_CHECKING:
    from headwater.adapt import Drift as Result

DRIFTS = "drifts"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Tell how far the checkpoints of a run have moved from the fitted model in what they compute.

    For networks of linear layers, convolutions and ReLUs. What is kept of the data, means, covariances and how often
    each unit is on, is written into the run folder; `headwater.core.function_space.load_distance` reads it.

    Example: headwater audit drift runs/digits --program examples/audit_digits.py:parts --trajectory runs/later

    Args:
        run: A folder with a fit in its subfolder fit.
        program: file.py:function, which is run with the folder, and returns (model, data, task).
        trajectory: Folder of the recorded run whose checkpoints are compared, such as a later training of the same
            model; the run that made the model, where it is found, when left out.
        by: Metadata column of groups with statistics of their own, such as the label; better where there are classes.
        rho: What is averaged: kl (nats), softmax or squared; by the task when left out.
        samples: Inputs that are drawn.
        seed: Seed of the draws.
        name: Name of the result in the run folder.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    program: str | None = None
    trajectory: Path | None = None
    by: str | None = None
    rho: Literal["kl", "softmax", "squared"] | None = None
    samples: int = 200
    seed: int = 0
    name: str = "drift"
    json: bool = False

    def check(self) -> None:
        """Refuse what tells nothing."""
        require("--samples", self.samples, "at least 1", self.samples >= 1)
        require("--seed", self.seed, "0 or more", self.seed >= 0)
        check_name(self.name, "result")


def run(words: list[str]) -> int:
    command = parse(Drift, words, prog="audit drift")
    found, kept, numbers = _drift(command)
    if command.json:
        emit_json({"rho": found.rho, "numbers_kept": numbers} | found.table())
        return 0
    print(found)
    say(f"The table is {kept}.csv; what was kept of the data, {numbers:,} numbers, is in {kept}.")
    return 0


def _drift(command: Drift) -> tuple["Result", Path, int]:
    from headwater.adapt import drift
    from headwater.core.files import write_bytes
    from headwater.core.function_space import function_space_distance
    from headwater.data.text import csv_bytes

    fit, beside, _ = opened(command.run, command.program)
    if command.by is not None and command.by not in fit.train.metadata:
        columns = ", ".join(fit.train.metadata) or "none"
        raise ValueError(f"There is no metadata column {command.by!r}; there are: {columns}.")
    runs = trajectories(command.trajectory, beside)
    if not runs or not runs[0].checkpoints:
        raise ValueError(
            "There are no checkpoints to compare: name the folder of a recorded run with --trajectory; see "
            "docs/how-to/own-model.md."
        )
    kept = command.run / DRIFTS / command.name
    with progress_bar(quiet=command.json) as progress:
        distance = function_space_distance(
            fit,
            by=command.by,
            rho=command.rho,
            n_samples=command.samples,
            seed=command.seed,
            progress=progress,
        )
    distance.save(kept)
    steps = {
        f"step {c.step}": runs[0].load_checkpoint(i) for i, c in enumerate(runs[0].checkpoints)
    }
    found = drift(distance, steps)
    write_bytes(kept.with_name(f"{command.name}.csv"), csv_bytes(found.table()))
    return found, kept, distance.n_numbers
