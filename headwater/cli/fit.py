"""`headwater fit`: the curvature of a language model over its training data, into a run folder."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from headwater.cli.common import (
    RUN,
    DataFlags,
    FollowFlags,
    ModelFlags,
    Session,
    emit_json,
    open_session,
    parse,
    progress_bar,
    say,
    to_json,
)


@dataclass(frozen=True, kw_only=True)
class CurvatureFlags:
    """The curvature; what is left out takes the method's own default.

    Args:
        curvature: Which form; auto takes the exact dual form where its rows fit, else EK-FAC.
        fisher: Labels drawn from the model, all labels weighted, or the given ones.
        draws: Draws an example, for labels drawn from the model.
        folds: Folds of the data kept apart for intervals; 1 keeps none.
        tolerance: Stop once the relative standard error of the second moments is below this.
        fisher_seed: Seed of the draws.
    """

    curvature: Literal["auto", "ekfac", "kfac", "dual", "diagonal", "identity"] = "auto"
    fisher: Literal["mc", "exact", "empirical"] | None = None
    draws: int | None = None
    folds: int | None = None
    tolerance: float | None = None
    fisher_seed: int | None = None

    def method(self) -> Any:
        """The method with the given options."""
        from headwater.core.curvature import METHODS

        given = {
            "fisher": self.fisher,
            "draws": self.draws,
            "folds": self.folds,
            "tolerance": self.tolerance,
            "seed": self.fisher_seed,
        }
        given = {k: v for k, v in given.items() if v is not None}
        kind = "ekfac" if self.curvature == "auto" and given else self.curvature
        if kind == "auto":
            return "auto"
        known = {f.name for f in fields(METHODS[kind])}  # type: ignore[arg-type]
        unknown = [k for k in given if k not in known]
        if unknown:
            raise ValueError(
                f"The {kind} curvature has no option {', '.join(unknown)}; leave it out."
            )
        return METHODS[kind](**given)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fit the curvature of a model over its training data; every later question reads it.

    A finished fit of the same inputs is found again; an interrupted one goes on where it stopped.

    Example: headwater fit path/to/model train.jsonl --out runs/mine --heldout heldout.jsonl

    Args:
        model: Model folder, GGUF file, or adapter folder.
        data: The training data: JSONL, CSV, Parquet or text file, or a folder of them.
        out: The run folder.
        heldout: Examples that were not trained on; scores are called significant against theirs.
        weight_decay: Weight decay of the training run, where the model folder does not record it.
        json: Print the result as JSON.
    """

    model: tyro.conf.Positional[Path]
    data: tyro.conf.Positional[Path]
    out: Path
    heldout: Path | None = None
    weight_decay: float | None = None
    kind: Annotated[CurvatureFlags, tyro.conf.arg(name="")] = field(default_factory=CurvatureFlags)
    columns: Annotated[DataFlags, tyro.conf.arg(name="")] = field(default_factory=DataFlags)
    weights: Annotated[ModelFlags, tyro.conf.arg(name="")] = field(default_factory=ModelFlags)
    follow: Annotated[FollowFlags, tyro.conf.arg(name="")] = field(default_factory=FollowFlags)
    json: bool = False


def run(words: list[str]) -> int:
    command = parse(Fit, words, prog="fit")
    session = open_session(
        command.model,
        command.data,
        command.columns,
        choose=command.weights,
        follow=command.follow,
        heldout=command.heldout,
    )
    fitted = fit_session(session, command, quiet=command.json)
    if command.json:
        emit_json(fitted.facts | {"coverage": fitted.followed.coverage, "out": str(command.out)})
        return 0
    say(str(fitted))
    for name, value in fitted.curvature.facts.items():
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
    from headwater.core.files import read_json, write_json
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
    old = read_json(command.out / RUN) if (command.out / RUN).is_file() else {}
    cost, seconds = old.get("cost", {}), fitted.facts["seconds"]
    if cost.get("fit_seconds") != seconds:  # else the fit was found finished
        cost = {"pass_seconds": _pass_seconds(fitted), "fit_seconds": seconds}
    write_json(
        command.out / RUN,
        {"fit": to_json(command), "cost": cost, "traces": old.get("traces", {})},
    )
    return fitted


def _pass_seconds(fitted: Any) -> float:
    """Seconds of an ordinary forward and backward pass over the training data, from two batches."""
    from headwater.core.cost import plain_pass_seconds

    batches = fitted.batches(fitted.train)
    return plain_pass_seconds(fitted.model, fitted.task, fitted.train, batches, n=2)
