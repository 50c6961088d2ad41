"""A change set: examples to remove, to give another label or to keep, handed from an audit to verify."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from headwater.core.files import ArtifactDamaged, read_json, write_json
from headwater.training.retraining import Change

_EXPECTED = "expected an object with lists remove and keep, and relabel with a label for each id"


@dataclass(frozen=True, kw_only=True)
class ChangeSet:
    """What is to be done with training examples, by their ids; all others stay as they are.

    Args:
        name: What the changes are, in words.
        remove: Examples to leave out.
        relabel: New labels of examples.
        keep: Examples that were looked at and stay as they are.

    Raises:
        ValueError: An example is to be treated in two ways.
    """

    name: str = "changes"
    remove: tuple[str, ...] = ()
    relabel: dict[str, int] = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    def __post_init__(self):
        every = [*self.remove, *self.relabel, *self.keep]
        if len(set(every)) < len(every):
            twice = next(i for i in every if every.count(i) > 1)
            raise ValueError(
                f"Example {twice!r} is named twice; remove it, relabel it, or keep it."
            )

    def __len__(self) -> int:
        return len(self.remove) + len(self.relabel)

    def planned(self, ids: Sequence[str], *, seed: int = 0) -> list[Change]:
        """The changes that verify makes: all of them, the same examples left out, and as many left out at random.

        The second is left out where nothing is relabelled, being the first; the control is drawn from the examples
        that are not changed.

        Args:
            ids: Names of all training examples, in their order.
            seed: Seed of the random choice.

        Raises:
            ValueError: An id is unknown, nothing changes, or too few examples are left to draw a control from.
        """
        number = {name: i for i, name in enumerate(ids)}
        named = [*self.remove, *self.relabel]
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
        drawn = sorted(rest[i] for i in order[: len(changed)].tolist())
        labels = {number[i]: label for i, label in self.relabel.items()}
        left_out = {number[i]: 0.0 for i in self.remove}
        found = [Change(name=self._words(), weights=left_out, labels=labels)]
        if labels:
            every = dict.fromkeys(changed, 0.0)
            found.append(Change(name=f"without those {len(changed)}", weights=every))
        control = dict.fromkeys(drawn, 0.0)
        return [
            *found,
            Change(name=f"without {len(drawn)} at random", weights=control, control=True),
        ]

    def _words(self) -> str:
        parts = [f"without {len(self.remove)}"] if self.remove else []
        parts += [f"{len(self.relabel)} relabelled"] if self.relabel else []
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
        labels = content.get("relabel", {})
        wrong = [name for name, ids in lists.items() if not isinstance(ids, list)]
        wrong += [] if isinstance(labels, dict) else ["relabel"]
        if wrong:
            raise ArtifactDamaged(f"{path} is no change set, by its {wrong[0]}: {_EXPECTED}.")
        for name, label in labels.items():
            if type(label) is not int:
                raise ArtifactDamaged(
                    f"{path}: the new label of {name!r} must be the number of a class; got {label!r}."
                )
        return cls(
            name=str(content.get("name", "changes")),
            remove=tuple(map(str, lists["remove"])),
            relabel={str(i): label for i, label in labels.items()},
            keep=tuple(map(str, lists["keep"])),
        )
