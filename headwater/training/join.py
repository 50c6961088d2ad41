"""Several recorded runs, each begun where the one before it ended, as one record of several stages.

    whole = join(["runs/pretrain", "runs/finetune"], "runs/whole", names=["pretrain", "fine-tune"])

SOURCE, exact unrolling and the timeline then follow a query through all of training.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from headwater.core.files import ArtifactMismatch
from headwater.core.fingerprint import fingerprint_json
from headwater.training.trajectory import (
    FILE,
    CheckpointRecord,
    StageRecord,
    Trajectory,
    checkpoint_at,
)

_SAME = 1e-6  # of the parameters' norm: between the end of a run and the beginning of the next


def join(
    records: Sequence[Trajectory | str | Path],
    folder: str | Path,
    *,
    names: Sequence[str],
    tolerance: float = _SAME,
) -> Trajectory:
    """One record of runs that were made one after another, in a folder of its own.

    Steps, examples, losses and checkpoints follow one another; the optimizer starts afresh at each run. Checkpoints
    are linked into the folder, or copied where the disk has no links. An id that two runs share is one example.

    Args:
        records: The runs or their folders, first to last, from `record`, `train_model` or `finetune`.
        folder: Where the record goes; the same record is found there again.
        names: What to call each run.
        tolerance: Largest distance between the end of a run and the beginning of the next, over the parameters' norm.

    Returns:
        The record.

    Raises:
        ValueError: A run does not begin where the one before it ended, or trained other parameters.
        ArtifactMismatch: The folder holds another record.
    """
    runs = [r if isinstance(r, Trajectory) else Trajectory.load(r) for r in records]
    if not runs or len(names) != len(runs) or len(set(names)) != len(names):
        raise ValueError(
            f"Expected one run or more, and a name of its own for each; got {len(runs)} runs and the names "
            f"{list(names)}."
        )
    for k in range(1, len(runs)):
        _require_follows(runs[k - 1], runs[k], names[k - 1], names[k], tolerance)
    folder, joined = Path(folder), _joined(runs, names)
    if (folder / FILE).is_file():
        there = Trajectory.load(folder)
        if _content(there) != _content(joined):
            raise ArtifactMismatch(
                f"{folder} holds the record of another run; choose another folder."
            )
        return there
    kept = [(run, each) for k, run in enumerate(runs) for each in _own(run, k)]
    for (run, old), new in zip(kept, joined.checkpoints, strict=True):
        for source, name in ((old.path, new.path), (old.optimizer_path, new.optimizer_path)):
            if source is not None and name is not None:
                _link(run.file(source), folder / name)
    joined.save(folder)  # last: a folder that has it is complete
    return joined


def _steps(runs: Sequence[Trajectory]) -> int:
    return sum(run.steps for run in runs)


def _own(run: Trajectory, k: int) -> list[CheckpointRecord]:
    """The checkpoints of run number k: its first parameters are the last ones of the run before."""
    return run.checkpoints[min(k, 1) :]


def _content(record: Trajectory) -> str:
    """What a record says, by which equal ones are known; losses that are not numbers are equal too."""
    return fingerprint_json({k: v for k, v in asdict(record).items() if k != "folder"})


def _joined(runs: Sequence[Trajectory], names: Sequence[str]) -> Trajectory:
    stages: list[StageRecord] = []
    checkpoints: list[CheckpointRecord] = []
    for k, (run, name) in enumerate(zip(runs, names, strict=True)):
        offset, moved_before = _steps(runs[:k]), sum(sum(each.lr) for each in runs[:k])
        for number, stage in enumerate(run.stages, start=1):
            own = name if len(run.stages) == 1 else f"{name}: {stage.name or number}"
            start, stop = stage.start + offset, stage.stop + offset
            stages.append(replace(stage, name=own, start=start, stop=stop))
        checkpoints += [
            checkpoint_at(
                kept.step + offset,
                lr_sum=moved_before + kept.lr_sum,
                moments=kept.optimizer_path is not None,
            )
            for kept in _own(run, k)
        ]
    last, known = runs[-1], {key for run in runs for key in run.made_from}
    made_from = {key: fingerprint_json([r.made_from.get(key) for r in runs]) for key in known}
    if "model" in runs[0].made_from:
        made_from["model"] = runs[0].made_from["model"]
    return replace(
        last,
        lr=[rate for run in runs for rate in run.lr],
        batches=[batch for run in runs for batch in run.batches],
        normalizers=[n for run in runs for n in run.normalizers],
        losses=[value for run in runs for value in run.losses],
        seed=runs[0].seed,
        distance=_moved(runs[0], last),
        made_from=made_from,
        stages=stages,
        checkpoints=checkpoints,
        folder=None,
    )


def _moved(first: Trajectory, last: Trajectory) -> float | None:
    """Squared distance between the beginning and the end of everything; None where the beginning was not kept."""
    if not first.checkpoints or first.checkpoints[0].step or last.checkpoints[-1].step < last.steps:
        return None
    start, end = first.load_checkpoint(0), last.load_checkpoint(-1)
    return _distance(start, end)


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((b[n].double() - value.double()).square().sum()) for n, value in a.items())


def _require_follows(
    before: Trajectory, after: Trajectory, first: str, second: str, tolerance: float
) -> None:
    """Refuse a run that does not go on from where the one before it ended."""
    if not before.checkpoints or before.checkpoints[-1].step != before.steps:
        raise ValueError(
            f"The run {first!r} kept no parameters at its end, step {before.steps}; record it with checkpoints."
        )
    if not after.checkpoints or after.checkpoints[0].step:
        raise ValueError(
            f"The run {second!r} kept no initial parameters; record it with checkpoints."
        )
    end, start = before.load_checkpoint(-1), after.load_checkpoint(0)
    for one, other, has, lacks in ((start, end, second, first), (end, start, first, second)):
        extra = sorted(n for n in one if n not in other or one[n].shape != other[n].shape)
        if extra:
            raise ValueError(
                f"The run {has!r} trained {len(extra)} parameters that {lacks!r} did not, or in another shape: "
                f"{', '.join(extra[:3])}{', …' if len(extra) > 3 else ''}. Stages of one record train the same "
                "parameters; where adapters follow on whole weights, merge them, or trace the runs one by one."
            )
    norm = sum(float(value.double().square().sum()) for value in end.values()) ** 0.5
    gap = _distance(end, start) ** 0.5
    if not gap <= tolerance * norm:
        raise ValueError(
            f"The run {second!r} begins {gap / max(norm, 1e-30):.2g} of the parameters' norm away from where {first!r} "
            f"ended (at most {tolerance:g} is taken for the same); give the runs in the order in which they were made."
        )


def _link(source: Path, target: Path) -> None:
    """The same file under another name: a link where the disk has links, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
    partial.unlink(missing_ok=True)  # which a link to what is there already outlives
