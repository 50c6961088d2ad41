"""`headwater fit`: the curvature of a language model over its training data, into a run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.cli.common import Session, emit_json, open_session, progress_bar, say, update_record
from headwater.cli.flags import RUN, FitInputs, parse, require, to_json


@dataclass(frozen=True, kw_only=True)
class Fit(FitInputs):
    """Fit the curvature of a model over its training data; every later question reads it.

    A finished fit of the same inputs is found again; an interrupted one goes on where it stopped.

    Example: headwater fit path/to/model train.jsonl --out runs/mine --heldout heldout.jsonl

    Args:
        out: The run folder.
        heldout: Examples that were not trained on; scores are called significant against theirs.
        weight_decay: Weight decay of the training run, where the model folder does not record it.
    """

    out: Path
    heldout: Path | None = None
    weight_decay: float | None = None

    def check(self) -> None:
        """Refuse a decay that would drive weights away from zero."""
        decay = self.weight_decay
        require("--weight-decay", decay, "0 or more", decay is None or decay >= 0)


def run(words: list[str]) -> int:
    command = parse(Fit, words, prog="fit")
    session = open_session(command, heldout=command.heldout)
    fitted = fit_session(session, command, quiet=command.json)
    if command.json:
        emit_json(fitted.facts | {"coverage": fitted.followed.coverage, "out": str(command.out)})
        return 0
    say(str(fitted))
    for name, value in fitted.curvature.facts.items():
        if isinstance(value, dict):  # a number for each layer, which the manifest keeps
            continue
        say(
            f"  {name.replace('_', ' ')}: {value:.3g}"
            if isinstance(value, float)
            else f"  {name}: {value}"
        )
    from headwater.core.files import read_json

    damping = fitted.damping()
    say(
        f"  damping {damping.value:.3g} ({damping.unit}, {damping.source}), "
        f"{fitted.damping_ratio(damping):.3g} times the mean eigenvalue"
    )
    cost = read_json(command.out / RUN)["cost"]
    say(f"  cost {cost['fit_seconds'] / cost['pass_seconds']:.2g} plain passes over the data")
    say(f'Saved in {command.out}. Next: headwater trace {command.out} --prompt "…"')
    return 0


def fit_session(session: Session, command: Fit, *, quiet: bool = False) -> Any:
    """Fit, write the run's record, and return the fit."""
    from headwater.core.distributed import current
    from headwater.core.fit import fit
    from headwater.core.task import CausalLM

    record = dict(session.record)
    if command.weight_decay is not None:
        record["weight_decay"] = command.weight_decay
    command.out.mkdir(parents=True, exist_ok=True)
    with progress_bar(quiet=quiet) as progress:
        fitted = fit(
            session.language.model,
            session.train,
            CausalLM(),
            curvature=command.kind.method(),
            layers=session.layers,
            skip=session.skip,
            folder=command.out / "fit",
            batch_tokens=command.follow.batch_tokens,
            progress=progress,
            **record,
        )
    current().first(lambda: _record(fitted, command))
    return fitted


def _record(fitted: Any, command: Fit) -> None:
    """Write down what was asked and what it cost."""
    from headwater.core.files import read_json

    old = read_json(command.out / RUN) if (command.out / RUN).is_file() else {}
    cost, seconds = old.get("cost", {}), fitted.facts["seconds"]
    if cost.get("fit_seconds") != seconds:  # else the fit was found finished
        cost = {"pass_seconds": _pass_seconds(fitted), "fit_seconds": seconds}
    asked = {"fit": to_json(command), "cost": cost}
    update_record(command.out, lambda record: {"traces": {}} | record | asked)


def _pass_seconds(fitted: Any) -> float:
    """Seconds of an ordinary forward and backward pass over the training data, from two batches."""
    from headwater.core.cost import plain_pass_seconds

    batches = fitted.batches(fitted.train)
    return plain_pass_seconds(fitted.model, fitted.task, fitted.train, batches, n=2)
