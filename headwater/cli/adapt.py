"""`headwater adapt`: make a run's model smaller, so that it still can be run and traced."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from headwater.cli.common import Session, emit_json, progress_bar, run_session, say
from headwater.cli.flags import require, run_action

if TYPE_CHECKING:
    from headwater.adapt import Quantized

_WORST = 5  # layers that are listed


@dataclass(frozen=True, kw_only=True)
class Quip:
    """Quantize the linear layers of a run's model to 2, 3 or 4 bits by QuIP.

    A killed run goes on where it stopped, layer by layer. The result is a model folder for every other command; the
    loss before and after is told, on the held-out data where the run has some.

    Example: headwater adapt quip runs/mine --bits 3 --out runs/small

    Args:
        run: The run folder of `headwater fit`.
        out: Where the quantized model goes.
        bits: Bits a weight: 2, 3 or 4.
        rounding: nearest; ldlq (without incoherence this is OPTQ); ldlq_rg, with greedy passes after it; greedy.
        incoherence: Turn weights by random orthogonal matrices before they are rounded.
        rescale: Balance inputs by a diagonal before; auto leaves it out where it would make weights stand out.
        statistics: Of the layers' inputs: those of the fit, which cost nothing; those of training examples run block by
            block, each block reading what the quantized ones before it return; auto takes the fit's where it has them.
        calibration: Examples to run block by block.
        layers: Patterns of the modules to quantize; the linear layers of the blocks when left out.
        measure: Report mu_H and tr(D)/tr(H) of each layer too; about twice the time.
        sample: Examples on which the loss before and after is told; 0 tells none.
        seed: Seed of the random matrices and of the choice of examples.
        json: Print the report as JSON, with a row for each layer.
    """

    run: tyro.conf.Positional[Path]
    out: Path
    bits: int = 2
    rounding: Literal["nearest", "ldlq", "ldlq_rg", "greedy"] = "ldlq_rg"
    incoherence: bool = True
    rescale: Literal["auto", "always", "never"] = "auto"
    statistics: Literal["auto", "fit", "blocks"] = "auto"
    calibration: int = 128
    layers: tuple[str, ...] = ()
    measure: bool = False
    sample: int = 64
    seed: int = 0
    json: bool = False

    def check(self) -> None:
        """Refuse what no model can be made with."""
        require("--bits", self.bits, "2, 3 or 4", self.bits in (2, 3, 4))
        require("--calibration", self.calibration, "at least 1", self.calibration >= 1)
        require("--sample", self.sample, "0 or more", self.sample >= 0)


def run(words: list[str]) -> int:
    return run_action(
        "adapt", words, {"quip": (Quip, _quip)}, example="quip runs/mine --bits 3 --out runs/small"
    )


def _quip(command: Quip) -> int:
    from headwater.adapt import QuIP
    from headwater.core.task import CausalLM
    from headwater.models.language import refuse_other_folder, save_quantized_language

    refuse_other_folder(command.out)
    session, _ = run_session(command.run)
    model, data = _source(command, session)
    method = QuIP(
        bits=command.bits,
        rounding=command.rounding,
        incoherence=command.incoherence,
        rescale=command.rescale,
        layers=command.layers,
        measure=command.measure,
        seed=command.seed,
    )
    unfinished = command.out.with_name(f".{command.out.name}.unfinished")
    with progress_bar(quiet=command.json) as progress:
        found = method.adapt(
            model,
            data,
            task=CausalLM(),
            folder=unfinished,
            progress=progress,
        )
        told = _losses(command, session, model, found, progress)
    facts = found.facts | {"losses": told, "run": str(command.run.resolve())}
    save_quantized_language(
        session.language,
        found.model,
        command.out,
        facts=facts,
        made_from=found.made_from,
        table=found.table(),
    )
    with suppress(OSError):  # empty by now
        unfinished.rmdir()
    if command.json:
        emit_json({"out": str(command.out), "layers": found.rows} | facts)
        return 0
    say(str(found))
    for what, (before, after) in told.items():
        say(f"  {what}: {before:.3f} nats a token before, {after:.3f} after")
    say("  layers whose outputs changed most, in % of their size:")
    for row in sorted(found.rows, key=lambda row: -row["relative_proxy"])[:_WORST]:
        say(f"    {100 * row['relative_proxy']:6.2f}  {row['layer']}")
    say(f"Saved in {command.out}. Next: headwater fit {command.out} data.jsonl --out …")
    return 0


def _source(command: Quip, session: Session) -> tuple[Any, Any]:
    """The model to quantize, and the fit or the examples that its statistics come from."""
    import torch

    from headwater.core.fit import load
    from headwater.core.task import CausalLM

    model: Any = session.language.model
    adapted = session.language.base_path is not None
    if adapted and command.statistics == "fit":
        raise ValueError(
            "The fit of an adapted model follows its adapter alone; pass --statistics blocks, which merges the adapter."
        )
    if command.statistics != "blocks" and not adapted:
        fitted = load(command.run / "fit", model, session.train, CausalLM())
        if command.statistics == "fit" or _has_statistics(fitted, command.layers):
            return model, fitted
        say(
            "  the fit lacks the inputs' second moments of some layers; examples are run block by block"
        )
    if adapted:
        model = model.merge_and_unload()
    generator = torch.Generator().manual_seed(command.seed)
    chosen = torch.randperm(len(session.train), generator=generator)[: command.calibration]
    return model, session.train.subset(sorted(chosen.tolist()))


def _has_statistics(fitted: Any, patterns: tuple[str, ...]) -> bool:
    """Whether a fit holds the activation covariance of every layer to quantize."""
    from headwater.adapt.base import chosen_layers
    from headwater.core.curvature import Layerwise

    if not isinstance(fitted.curvature, Layerwise):
        return False
    followed = {use.module: x.name for x in fitted.followed for use in x.uses}
    names = chosen_layers(fitted.model, patterns)
    return all(followed.get(name) in fitted.curvature.factor_eigenvalues for name in names)


def _losses(
    command: Quip, session: Session, model: Any, found: "Quantized", progress: Any
) -> dict[str, tuple[float, float]]:
    """Nats a scored token before and after, on a sample of the held-out or else the training data."""
    from headwater.core.capture import plan_batches
    from headwater.core.forward import evaluate
    from headwater.core.prediction import IGNORE
    from headwater.core.quantized import held_dense
    from headwater.core.task import CausalLM

    if command.sample == 0:
        return {}
    data = session.train if session.heldout is None else session.heldout
    what = "training data" if session.heldout is None else "held-out data"
    some = data.subset(range(min(command.sample, len(data))))
    scored = sum(int((some.batch([i])["labels"][:, 1:] != IGNORE).sum()) for i in range(len(some)))
    plans = plan_batches(some, batch_tokens=1024)
    told = []
    for each in (model, found.model):
        with held_dense(each):
            options = {"batches": plans, "progress": progress, "note": "loss"}
            losses = evaluate(each, some, CausalLM().loss, **options)
        told.append(float(losses.double().sum()) / max(scored, 1))
    return {what: (told[0], told[1])}
