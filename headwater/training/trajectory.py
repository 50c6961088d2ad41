r"""Trajectory: what a training run did, step by step, in a file that people can read.

Attribution asks of it how far a constant gradient would have moved the parameters. With learning
rates $\eta_k$ and momentum $\mu$ that is the horizon $\sum_k \eta_k / (1 - \mu)$.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from headwater.core.files import ArtifactDamaged, read_json, write_json

FILE = "trajectory.json"


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The record of one training run; a list has one value for each step.

    Attributes:
        optimizer: Its name, such as "AdamW".
        lr: Learning rates.
        weight_decay: Decay of the parameters, in units of the optimizer.
        betas: Decay of the running means of gradients and of their squares; empty without any.
        momentum: Decay of the velocity; 0 where gradients are averaged (`betas`) instead.
        batches: Ids of the examples of each step.
        losses: Mean training loss of each step's batch, before the step (nats a token).
        seed: Seed of the order of examples and of the initial weights.
        trained: Names of the trained parameters.
        distance: Squared distance between the trained parameters before and after.
        made_from: Fingerprints of the model, the data and the options.
    """

    optimizer: str
    lr: list[float]
    weight_decay: float
    batches: list[list[str]]
    losses: list[float]
    seed: int
    betas: list[float] = field(default_factory=list)
    momentum: float = 0.0
    trained: list[str] = field(default_factory=list)
    distance: float | None = None
    made_from: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return len(self.lr)

    @property
    def horizon(self) -> float:
        """Sum of the learning rates over one minus the momentum.

        Example:
            >>> Trajectory(optimizer="SGD", lr=[0.1, 0.1], weight_decay=0.0, batches=[["a"], ["b"]],
            ...            losses=[1.0, 0.5], seed=0, momentum=0.5).horizon
            0.4
        """
        return sum(self.lr) / (1 - self.momentum)

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer scales each parameter's step by its past gradients."""
        return self.optimizer.lower().startswith(("adam", "rmsprop", "adagrad", "adafactor"))

    def save(self, path: str | Path) -> None:
        """Write it as JSON; a folder gets the file `trajectory.json`."""
        write_json(_file(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Trajectory":
        """Read what `save` wrote.

        Raises:
            ArtifactMissing: There is no such file.
            ArtifactDamaged: The file is no trajectory.
        """
        content: Any = read_json(_file(path))
        names = {each.name for each in fields(cls)}
        try:
            return cls(**{k: v for k, v in content.items() if k in names})
        except (TypeError, AttributeError) as error:
            raise ArtifactDamaged(f"{_file(path)} is no record of a training run.") from error


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / FILE
