"""`headwater calibrate ifcomp`: hedged probabilities from the complexities that a run folder holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from headwater.cli.common import emit_json, say
from headwater.cli.flags import RUN

if TYPE_CHECKING:
    from headwater.calibrate import Complexity, Predictions

FOLDER, OUT = "complexity", "calibrated"
MADE = "complexity(fit, examples, damping='0.01 relative').save(folder / 'complexity' / 'test')"


@dataclass(frozen=True, kw_only=True)
class Hedge:
    """Calibrate a classifier by IF-COMP: choose how much to hedge on validation data, and judge all other data.

    A run folder holds complexities under complexity/, saved from Python, one of them of validation examples. The
    calibrated tables are written under calibrated/.

    Example: headwater calibrate ifcomp runs/mine --validation validation

    Args:
        run: The run folder.
        validation: Name of the complexity that strength and temperature are chosen on.
        space: Where to hedge.
        prudent: Of the strengths that validation data cannot tell from the best, take the greatest.
        bins: Bins of the calibration error, of equal mass.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    validation: str = "validation"
    space: Literal["probability", "logit"] = "probability"
    prudent: bool = False
    bins: int = 20
    json: bool = False

    def check(self) -> None:
        """Refuse bins that hold nothing."""
        if self.bins < 1:
            raise ValueError(f"Expected --bins of 1 or more; got {self.bins}.")


def hedge(command: Hedge) -> int:
    from headwater.calibrate import IFComp
    from headwater.calibrate.temperature import best_temperature

    found = _complexities(command)
    chosen_on = found.pop(command.validation)
    method = IFComp(space=command.space, prudent=command.prudent)
    strength, temperature = method.choose(chosen_on)
    scaled = best_temperature(chosen_on.logits, chosen_on.labels)
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for name, part in found.items():
        hedged = method.predictions(part, strength, temperature)
        kinds = {
            "softmax": method.predictions(part, 0.0, 1.0),
            "temperature scaling": method.predictions(part, 0.0, scaled),
            "IF-COMP": hedged,
        }
        measured[name] = {k: p.measures(n_bins=command.bins) for k, p in kinds.items()}
        _write(command.run / OUT / f"{name}.csv", part, hedged)
    if command.json:
        chosen = {"strength": strength, "temperature": temperature, "scaling": scaled}
        emit_json(chosen | {"measures": measured, "out": command.run / OUT})
        return 0
    print(
        f"strength {strength:.3g}, temperature {temperature:.3g}, chosen on {len(chosen_on):,} examples of "
        f"{command.validation!r}; temperature scaling has {scaled:.3g}"
    )
    print(f"{'data':16} {'method':20} {'accuracy':>9} {'ECE':>7} {'NLL':>7} {'Brier':>7}")
    for name, rows in measured.items():
        for kind, m in rows.items():
            figures = f"{m['accuracy']:9.3f} {m['ece']:7.3f} {m['nll']:7.3f} {m['brier']:7.3f}"
            print(f"{name:16} {kind:20} {figures}")
    say(f"Tables in {command.run / OUT}, measures by the labels that the examples came with.")
    return 0


def _complexities(command: Hedge) -> "dict[str, Complexity]":
    """What the run folder holds, by name; says what is missing."""
    from headwater.calibrate import Complexity

    place = command.run / FOLDER
    names = sorted(p.name for p in place.glob("*") if p.is_dir() and not p.name.startswith("."))
    if not names:
        what = "holds no complexities"
        if (command.run / RUN).is_file():
            what = "is of a language model, which has no classes, and holds no complexities of a classifier"
        elif not command.run.is_dir():
            what = "is not there"
        raise FileNotFoundError(f"{command.run} {what}; save some from Python: {MADE}.")
    if command.validation not in names or len(names) < 2:
        raise ValueError(
            f"Expected {command.validation!r} and at least one more in {place}; there are: {', '.join(names)}. "
            "Name the one to choose on with --validation."
        )
    found = {name: Complexity.load(place / name) for name in names}
    made = {
        (c.facts["made_from"]["model"], c.temperature, str(c.facts["damping"]))
        for c in found.values()
    }
    if len(made) > 1:
        raise ValueError(
            f"The complexities in {place} are of {len(made)} different models, temperatures or dampings; make them all "
            "with the same fit and damping."
        )
    return found


def _write(path: Path, found: "Complexity", hedged: "Predictions") -> None:
    """A table, one row an example, whole or not at all."""
    from headwater.core.files import write_bytes
    from headwater.data.text import csv_bytes

    write_bytes(path, csv_bytes(found.table() | hedged.table()))
