"""A change set: examples to remove, to weight or label otherwise, or to keep: handed on to training and to verify."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from headwater.core.files import ArtifactDamaged, read_json, write_json
from headwater.training.retraining import Change

_EXPECTED = (
    "expected an object with lists remove and keep, relabel with a label for each id, and weights with a number for "
    "each"
)


@dataclass(frozen=True, kw_only=True)
class ChangeSet:
    """What is to be done with training examples, by their ids; all others stay as they are.

    Args:
        name: What the changes are, in words.
        remove: Examples to leave out.
        relabel: New labels of examples.
        keep: Examples that were looked at and stay as they are.
        weights: How often examples count: 2 for twice.

    Raises:
        ValueError: An example is to be treated in two ways, or a weight is not positive and finite.
    """

    name: str = "changes"
    remove: tuple[str, ...] = ()
    relabel: dict[str, int] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        every = [*self.remove, *self.relabel, *self.keep, *self.weights]
        twice = next((i for i, n in Counter(every).items() if n > 1), None)
        if twice is not None:
            raise ValueError(
                f"Example {twice!r} is named twice; remove it, relabel it, weight it, or keep it."
            )
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"The weight of {name!r} must be a positive number; got {weight}. To leave it out, remove it."
                )

    def __len__(self) -> int:
        return len(self.remove) + len(self.relabel) + len(self.weights)

    def training_weights(self) -> dict[str, float]:
        """Weights of the examples that do not count once, by id, as `headwater.training.finetune` takes them.

        Raises:
            ValueError: Labels are to change, which weights cannot.
        """
        if self.relabel:
            raise ValueError(
                f"The change set gives {len(self.relabel)} examples other labels, such as "
                f"{next(iter(self.relabel))!r}. A language model is trained on text and has no labels: remove or "
                "weight these examples, or change their text in the data."
            )
        return dict.fromkeys(self.remove, 0.0) | self.weights

    def planned(self, ids: Sequence[str], *, seed: int = 0) -> list[Change]:
        """The changes that verify makes: all of them, the same without new labels, and the like done at random.

        The second leaves out what the first relabels; it is not made where nothing is relabelled, being the first. The
        control is drawn from the examples that are not changed: as many are left out, and as many weighted alike.

        Args:
            ids: Names of all training examples, in their order.
            seed: Seed of the random choice.

        Raises:
            ValueError: An id is unknown, nothing changes, or too few examples are left to draw a control from.
        """
        number = {name: i for i, name in enumerate(ids)}
        named = [*self.remove, *self.relabel, *self.weights]
        unknown = [i for i in named if i not in number]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(named)} examples to change are not in the training data, such as "
                f"{unknown[0]!r}."
            )
        if not named:
            raise ValueError("The change set changes nothing, so there is nothing to verify.")
        changed = sorted(number[i] for i in named)
        rest = sorted(set(range(len(ids))) - set(changed))
        if len(rest) < len(changed):
            raise ValueError(
                f"{len(changed)} of {len(ids)} examples are changed, which leaves too few to choose as many at random "
                "from."
            )
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
        drawn = [rest[i] for i in order[: len(changed)].tolist()]
        labels = {number[i]: label for i, label in self.relabel.items()}
        weighted = {number[i]: weight for i, weight in self.weights.items()}
        left_out = {number[i]: 0.0 for i in self.remove}
        found = [Change(name=self._words(), weights=left_out | weighted, labels=labels)]
        if labels:
            every = left_out | dict.fromkeys(labels, 0.0)
            found.append(Change(name=f"without those {len(every)}", weights=every | weighted))
        alike = [0.0] * (len(left_out) + len(labels)) + sorted(weighted.values())
        control = dict(sorted(zip(drawn, alike, strict=True)))
        parts = [f"without {alike.count(0.0)}"] if 0.0 in alike else []
        parts += [f"{len(weighted)} weighted alike"] if weighted else []
        name = f"{', '.join(parts)} at random"
        return [*found, Change(name=name, weights=control, control=True)]

    def _words(self) -> str:
        parts = [f"without {len(self.remove)}"] if self.remove else []
        parts += [f"{len(self.relabel)} relabelled"] if self.relabel else []
        parts += [f"{len(self.weights)} weighted"] if self.weights else []
        return f"{', '.join(parts)} ({self.name})"

    def content(self) -> dict[str, Any]:
        """It as JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def save(self, path: str | Path) -> None:
        """Write it as JSON, to be read and edited by people."""
        write_json(Path(path), self.content())

    @classmethod
    def load(cls, path: str | Path) -> "ChangeSet":
        """Read what `save` wrote.

        Raises:
            ArtifactDamaged: The file is no change set.
        """
        content: Any = read_json(Path(path))
        if not isinstance(content, dict):
            raise ArtifactDamaged(
                f"{path} is no change set: {_EXPECTED}; got a {type(content).__name__}."
            )
        lists = {name: content.get(name, []) for name in ("remove", "keep")}
        labels, weights = content.get("relabel", {}), content.get("weights", {})
        wrong = [name for name, ids in lists.items() if not isinstance(ids, list)]
        wrong += [] if isinstance(labels, dict) else ["relabel"]
        wrong += [] if isinstance(weights, dict) else ["weights"]
        if wrong:
            raise ArtifactDamaged(f"{path} is no change set, by its {wrong[0]}: {_EXPECTED}.")
        for name, label in labels.items():
            if type(label) is not int:
                raise ArtifactDamaged(
                    f"{path}: the new label of {name!r} must be the number of a class; got {label!r}."
                )
        for name, weight in weights.items():
            if type(weight) not in (int, float):
                raise ArtifactDamaged(
                    f"{path}: the weight of {name!r} must be a number; got {weight!r}."
                )
        try:
            return cls(
                name=str(content.get("name", "changes")),
                remove=tuple(map(str, lists["remove"])),
                relabel={str(i): label for i, label in labels.items()},
                keep=tuple(map(str, lists["keep"])),
                weights={str(i): float(weight) for i, weight in weights.items()},
            )
        except (ValueError, OverflowError) as error:  # a number that no float can hold
            raise ArtifactDamaged(f"{path} is no change set: {error}") from error
