"""The part of `headwater verify` that holds an audit's change set against retraining, by the held-out loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.audit import AUDITS, from_program
from headwater.cli.common import Opened, finetuning, progress_bar, run_session, say
from headwater.cli.flags import RUN

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headwater.cli.verify import Verify
    from headwater.core.capture import Progress
    from headwater.core.examples import Examples
    from headwater.core.fit import Fit
    from headwater.training.changes import ChangeSet
    from headwater.training.retraining import Retrain
    from headwater.training.verify import Verification

MEASUREMENT = "held-out loss"


def verify_changes(
    command: "Verify",
    changes: "ChangeSet",
    *,
    quiet: bool = False,
    opened: Opened | None = None,
    progress: "Progress | None" = None,
) -> tuple["Verification", Path]:
    """Retrain under a change set and the like at random, and say what happened to the held-out loss; and its file.

    Args:
        command: What is to be done.
        changes: The change set.
        quiet: Show no progress.
        opened: The run's model and data with its record, where they are open already.
        progress: Called with (done, total, note), in place of a progress bar.
    """
    with progress_bar(quiet=quiet, to=progress) as bar:
        return _verify_changes(command, changes, opened, bar)


def _verify_changes(
    command: "Verify", changes: "ChangeSet", opened: Opened | None, bar: "Progress | None"
) -> tuple["Verification", Path]:
    from headwater.core.fingerprint import fingerprint_json
    from headwater.training.verify import Verification, verify

    fit, heldout, retrain, seed = _parts(command, changes, opened, bar)
    planned = changes.planned(fit.train.ids, seed=command.random_seed)
    made = fingerprint_json(
        [[c.name, sorted(c.weights.items()), sorted(c.labels.items())] for c in planned]
        + [fit.made_from, heldout.fingerprint(), command.seeds]
    )[:16]
    folder = command.run / "verify" / AUDITS
    place = command.changes or Path(
        "changes" if command.audit is None else f"{command.audit}.changes"
    )
    saved = folder / f"{place.name.removesuffix('.json')}-{made}.json"
    if saved.is_file():
        say(f"  read from {saved}")
        return Verification.load(saved), saved
    scores, relabelled = _predicted(fit, heldout, changes, bar)
    made_from = fingerprint_json([fit.made_from, heldout.fingerprint()])
    found = verify(
        retrain,
        scores,
        planned,
        relabelled=relabelled,
        seeds=[seed + i for i in range(command.seeds)],
        cache=folder / "measured" / made_from[:16],
        progress=bar,
    )
    found = replace(found, facts=found.facts | {"changes": changes.name, "passes": "retraining"})
    found.save(saved)
    say(f"  saved in {saved}")
    return found, saved


def _predicted(fit: "Fit", heldout: "Examples", changes: "ChangeSet", progress: Any) -> tuple:
    """Influence of every example on the mean held-out loss, and of the relabelled ones under their new labels."""
    import torch

    from headwater.core.scores import Scores
    from headwater.trace.influence import Influence
    from headwater.training.repeat import Relabelled

    number = {name: i for i, name in enumerate(fit.train.ids)}
    labels = {number[name]: label for name, label in changes.relabel.items() if name in number}
    control = Relabelled(fit.train, labels).subset(sorted(labels)) if labels else None
    scores = Influence(n_intervals=0).attribute(
        fit,
        heldout,
        measurement="loss",
        weights=torch.full((1, len(heldout)), 1 / len(heldout)),
        names=[MEASUREMENT],
        control=control,
        progress=progress,
    )
    if control is None or scores.control is None:
        return scores, None
    return scores, Scores(values=scores.control, query_ids=scores.query_ids, train_ids=control.ids)


def _parts(
    command: "Verify", changes: "ChangeSet", opened: Opened | None, bar: "Progress | None"
) -> tuple["Fit", "Examples", "Retrain", int]:
    """The fit, held-out examples, the training, and its seed."""
    if command.program is not None:
        return _of_program(command)
    if not (command.run / RUN).is_file() and (command.run / "fit").is_dir():
        raise FileNotFoundError(
            f"{command.run} has a fit and no {RUN}, so that its model is not known; name the function that the audit "
            "was given: --program file.py:function."
        )
    return _of_finetuning(command, changes, opened, bar)


def _loss_of(heldout: "Examples", task: Any, batches: Any) -> Callable[["nn.Module"], "Tensor"]:
    def measured(model: "nn.Module") -> "Tensor":
        from headwater.core.forward import evaluate

        return evaluate(model, heldout, task.loss, batches=batches).double().mean()[None]

    return measured


def _of_program(command: "Verify") -> tuple["Fit", "Examples", "Retrain", int]:
    from headwater.core.examples import as_examples
    from headwater.core.fit import load
    from headwater.training.repeat import RepeatedRun
    from headwater.training.run import Run
    from headwater.training.trajectory import Trajectory

    assert command.program is not None
    model, data, task, held = from_program(command.program, command.run)
    if held is None:
        raise ValueError(
            f"{command.program} gives no held-out examples to measure; let it return (model, data, task, heldout)."
        )
    fit, heldout = load(command.run / "fit", model, data, task), as_examples(held)
    record = Trajectory.load(command.trajectory or command.run)
    run = Run(model=model, task=task, train=fit.train, trajectory=record)
    measure = _loss_of(heldout, task, fit.batches(heldout))
    return fit, heldout, RepeatedRun(run=run, measure=measure), record.seed


def _of_finetuning(
    command: "Verify", changes: "ChangeSet", opened: Opened | None, bar: "Progress | None"
) -> tuple["Fit", "Examples", "Retrain", int]:
    from headwater.cli.common import read_examples, require_trained_on
    from headwater.cli.finetune import Finetune
    from headwater.cli.flags import DataFlags, restore
    from headwater.cli.verify import fine_tuner
    from headwater.core.fit import load
    from headwater.core.task import CausalLM
    from headwater.models.language import load_language_model

    changes.training_weights()  # refuses what cannot be trained
    session, record = opened or run_session(command.run)
    if session.heldout is None:
        raise ValueError(
            f"{command.run} was fitted without held-out examples, by which changes are judged; fit again with "
            "--heldout FILE."
        )
    tuning, _ = finetuning(
        Path(record["fit"]["model"]), "repeated", "headwater.training.verify.verify"
    )
    again = restore(Finetune, tuning | {"columns": restore(DataFlags, tuning["columns"])})
    base = load_language_model(again.model, dtype=again.dtype, base=again.base)
    examples = read_examples(again.data, again.columns, base)
    require_trained_on(session, tuning, examples.fingerprint())
    fit = load(command.run / "fit", session.language.model, session.train, CausalLM())
    measure = _loss_of(session.heldout, fit.task, fit.batches(session.heldout))
    retrain = fine_tuner(again, base, examples, command.run / "verify" / AUDITS, measure, bar)
    return fit, session.heldout, retrain, again.seed
