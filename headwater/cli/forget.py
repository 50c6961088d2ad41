"""`headwater forget`: edit a model's weights, see what it costs before, and take it back to the last bit."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from headwater.cli.common import Session, emit_json, run_session, say
from headwater.cli.flags import Actions, ModelFlags, require, run_action

if TYPE_CHECKING:
    from headwater.forget import WeightEdit
    from headwater.models.language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class TryFlags:
    """What is tried before and after the edit.

    Args:
        tried: Texts that are tried, of the training data and of the held-out ones where the run has them; 0 tries none.
        prefix: Tokens of a training text that the model is given, to see whether it recites what follows.
        suffix: Tokens that it is to say.
    """

    tried: int = 20
    prefix: int = 32
    suffix: int = 32

    def check(self) -> None:
        """Refuse a recitation of nothing."""
        require("--tried", self.tried, "0 or more", self.tried >= 0)
        require("--prefix", self.prefix, "at least 1 token", self.prefix >= 1)
        require("--suffix", self.suffix, "at least 1 token", self.suffix >= 1)


@dataclass(frozen=True, kw_only=True)
class CurvatureEdit:
    """Remove the directions of weights that hold little of the loss's curvature: those that recite.

    Nothing is read but the run's fit; it should be of given labels (`--curvature ekfac --fisher empirical`). The edit
    is a difference of weights, kept apart from the model, which stays as it is.

    Example: headwater forget curvature-edit runs/mine --keep-mass 0.6 --layers "*.mlp.up_proj" --out runs/edit

    Args:
        run: The run folder of `headwater fit`.
        out: Folder of the edit; needed unless --dry-run.
        keep_mass: Share of the curvature's mass that is kept, in (0, 1].
        layers: Patterns of names of linear and convolutional layers; every one that the fit follows, when left out.
        ranking: By mass, which is the paper's; corrected and rectangular are variants, random is the control.
        seed: Seed of the control.
        write_model: Folder for the edited model, which must not exist yet.
        dry_run: Write nothing; say what would be done, and what it does to texts.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None
    keep_mass: float = 0.6
    layers: tuple[str, ...] = ()
    ranking: Literal["mass", "corrected", "rectangular", "random"] = "mass"
    seed: int = 0
    write_model: Path | None = None
    dry_run: bool = False
    trying: Annotated[TryFlags, tyro.conf.arg(name="")] = field(default_factory=TryFlags)
    json: bool = False

    def check(self) -> None:
        """Refuse an edit that goes nowhere, or over something."""
        keep = self.keep_mass
        require("--keep-mass", keep, "above 0 and at most 1", 0 < keep <= 1)
        if self.dry_run and (self.out or self.write_model):
            raise ValueError(
                "--dry-run writes nothing; leave --out and --write-model out, or --dry-run."
            )
        if not (self.dry_run or self.out):
            raise ValueError("Expected --out FOLDER for the edit, or --dry-run.")
        _require_free(self.write_model, "--write-model")
        if self.write_model and self.out and self.write_model.resolve() == self.out.resolve():
            raise ValueError(
                "--out takes the edit and --write-model the edited model; give each a folder of its own."
            )


@dataclass(frozen=True, kw_only=True)
class _OnModel:
    """What applying and undoing have in common."""

    model: tyro.conf.Positional[Path]
    edit: tyro.conf.Positional[Path]
    out: Path
    weights: Annotated[ModelFlags, tyro.conf.arg(name="")] = field(default_factory=ModelFlags)
    json: bool = False

    def check(self) -> None:
        """Refuse a folder that holds something."""
        _require_free(self.out, "--out")


@dataclass(frozen=True, kw_only=True)
class Apply(_OnModel):
    """Write a model with a saved edit; it must have the weights that the edit was made for.

    Example: headwater forget apply path/to/model runs/edit --out path/to/edited

    Args:
        model: Folder of the model.
        edit: Folder of the edit.
        out: Folder for the edited model, which must not exist yet.
        json: Print the result as JSON.
    """


@dataclass(frozen=True, kw_only=True)
class Undo(_OnModel):
    """Write an edited model as it was before, to the last bit.

    Example: headwater forget undo path/to/edited runs/edit --out path/to/restored

    Args:
        model: Folder of the edited model.
        edit: Folder of the edit.
        out: Folder for the restored model, which must not exist yet.
        json: Print the result as JSON.
    """


def run(words: list[str]) -> int:
    return run_action("forget", words, ACTIONS, example="curvature-edit runs/mine --dry-run")


def _curvature_edit(command: CurvatureEdit) -> int:
    from headwater import forget
    from headwater.core.fit import load
    from headwater.core.task import CausalLM

    session, _ = run_session(command.run)
    fitted = load(command.run / "fit", session.language.model, session.train, CausalLM())
    editor = forget.CurvatureEdit(
        keep_mass=command.keep_mass,
        layers=command.layers or ("*",),
        ranking=command.ranking,
        seed=command.seed,
    )
    edit = editor.edit(fitted)
    model = session.language.model
    before = _tried(session, command.trying)
    edit.apply(model)
    after = _tried(session, command.trying, told=True)
    if command.out is not None:
        edit.save(command.out)
    if command.write_model is not None:
        _write(session.language, command.write_model)
    if command.json:
        emit_json({"table": edit.table(), "facts": edit.facts, "before": before, "after": after})
        return 0
    _show(edit, before, after)
    if command.dry_run:
        say("Nothing was written (--dry-run).")
        return 0
    say(f"The edit is in {command.out}; the model of the run is as it was.")
    following = f"headwater forget apply MODEL {command.out} --out FOLDER"
    if command.write_model is not None:
        say(f"The edited model is in {command.write_model}.")
        following = f"headwater forget undo {command.write_model} {command.out} --out FOLDER"
    say(f"Next: {following}")
    return 0


def _show(edit: "WeightEdit", before: dict[str, float], after: dict[str, float]) -> None:
    say(str(edit))
    if edit.facts["fisher"] != "empirical":
        say(
            "  the factors come from labels drawn from the model; the paper's come from the given ones: fit with "
            "--curvature ekfac --fisher empirical"
        )
    width = max(len(row["layer"]) for row in edit.rows)
    say(f"  {'layer':{width}}  pairs kept   mass   change  predicted, nats a text")
    for row in edit.rows:
        kept, change = 100 * row["kept"] / row["pairs"], 100 * row["change"]
        told = f"{kept:8.1f} %  {row['mass']:.3f}  {change:5.1f} %  {row['predicted_increase']:.3g}"
        say(f"  {row['layer']:{width}}  {told}")
    for name, value in before.items():
        say(f"  {name}: {value:.4g} → {after[name]:.4g}")


def _tried(session: Session, flags: TryFlags, *, told: bool = False) -> dict[str, float]:
    """Perplexity and recitation of a few texts, as the model stands; what cannot be tried is told once."""
    from headwater.audit.memorization import perplexity, recited_examples
    from headwater.core.task import CausalLM

    if not flags.tried:
        return {}
    model, found = session.language.model, {}
    sets = {"training texts": session.train, "held-out texts": session.heldout}
    for name, examples in sets.items():
        if examples is not None:
            some = examples.subset(range(min(flags.tried, len(examples))))
            found[f"perplexity of {len(some)} {name}"] = perplexity(model, CausalLM(), some)
    needed = flags.prefix + flags.suffix
    lengths = session.train.lengths or []
    long = [i for i, length in enumerate(lengths) if length >= needed][: flags.tried]
    if long:
        said = recited_examples(
            model, session.train.subset(long), prefix=flags.prefix, suffix=flags.suffix
        )
        found[f"recited to the last token, of {len(long)} training texts"] = said.strict.value
        found["recited but for a quarter of the tokens"] = said.loose.value
    elif not told:
        say(f"  no training text has {needed} tokens, so recitation was not tried; see --prefix")
    return found


def _apply(command: Apply) -> int:
    return _changed(command, "apply")


def _undo(command: Undo) -> int:
    return _changed(command, "undo")


def _changed(command: _OnModel, verb: Literal["apply", "undo"]) -> int:
    from headwater.forget import WeightEdit
    from headwater.models.language import load_language_model

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    edit = WeightEdit.load(command.edit)
    weights = command.weights
    language = load_language_model(command.model, dtype=weights.dtype, base=weights.base)
    getattr(edit, verb)(language.model)
    _write(language, command.out)
    if command.json:
        emit_json({"out": str(command.out), "facts": edit.facts})
    else:
        say(f"{str(edit).split(':')[0]}) {'applied' if verb == 'apply' else 'undone'}.")
        say(f"The model is in {command.out}.")
    return 0


ACTIONS: Actions = {
    "curvature-edit": (CurvatureEdit, _curvature_edit),
    "apply": (Apply, _apply),
    "undo": (Undo, _undo),
}


def _require_free(folder: Path | None, flag: str) -> None:
    if folder is not None and folder.exists():
        raise ValueError(f"{flag} {folder} exists already; choose another folder, or move it away.")


def _write(language: "LanguageModel", out: Path) -> None:
    """A model folder that is whole once it is there."""
    from headwater.core.replacing import whole_folder
    from headwater.models.language import quiet

    with whole_folder(out) as partial, quiet():
        language.model.save_pretrained(partial)  # type: ignore[operator]
        language.tokenizer.save_pretrained(partial)
