"""What a workload is: a model, the recipe that trains it, and real data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from headwater.core.examples import TensorExamples
from headwater.core.task import Classification, Task
from headwater.training.bank import random_masks
from headwater.training.loop import Loss, correct_class_margin, example_losses
from headwater.training.optimizers import SGD, Optimizer, Stage


@dataclass(frozen=True, eq=False, kw_only=True)
class Data:
    """Training examples and queries.

    Attributes:
        train: Training examples: inputs and targets.
        queries: Queries likewise.
        wrong: Which training labels are known to be wrong.
        parts: Numbers of the training examples of each stage; empty for a single stage on all.
    """

    train: TensorExamples
    queries: TensorExamples
    wrong: Bool[Tensor, " train"] | None = None
    parts: tuple[Tensor, ...] = ()

    def masks(self, n: int, *, fraction: float, seed: int = 0) -> Bool[Tensor, "subset train"]:
        """Random subsets that hold the same share of every stage's examples."""
        parts = self.parts or (torch.arange(len(self.train)),)
        masks = torch.zeros(n, len(self.train), dtype=torch.bool)
        for number, part in enumerate(parts):
            masks[:, part] = random_masks(
                len(part), n, fraction=fraction, seed=1000 * number + seed
            )
        return masks


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained on what.

    Attributes:
        name: Name on the command line.
        title: Heading of its table.
        load: Reads the data.
        model: The initial model of a seed.
        recipe: The optimizer of each stage.
        task: What the model is trained for, and what queries ask.
        loss: The training loss on outputs and targets, as the retraining bank needs it.
        measure: The measurement on outputs and targets, likewise.
        text: Whether examples are text, for the baselines on words.
        subsets: Random halves that are retrained.
        repeats: Retrainings of each.
        seeds: Models trained on everything; the first is the one that methods see, all of them make ensembles.
        checkpoints: Kept of every training run.
        parallel: Models trained side by side.
        cut: Least probability of a label that the dual form keeps; its rows and its cost grow as this falls.
        slow: Entries left out because they would take hours here, with the reason.
    """

    name: str
    title: str
    load: Callable[[], Data]
    model: Callable[[int], nn.Module]
    recipe: tuple[Optimizer, ...]
    task: Task = field(default_factory=lambda: Classification(measurement_of="margin"))
    loss: Loss = example_losses
    measure: Loss = correct_class_margin
    text: bool = False
    subsets: int = 100
    repeats: int = 3
    seeds: int = 5
    checkpoints: int = 6
    parallel: int = 50
    cut: float = 1e-3
    slow: tuple[tuple[str, str], ...] = ()

    @property
    def adaptive(self) -> bool:
        """Whether the last optimizer scales its steps."""
        return not isinstance(self.recipe[-1], SGD)

    def stages(self, data: Data) -> list[Stage]:
        """The recipe, each stage on its part of the data."""
        parts: Sequence[Tensor | None] = data.parts or [None] * len(self.recipe)
        return [Stage(optimizer=o, examples=p) for o, p in zip(self.recipe, parts, strict=True)]


HOURS = "a hundred passes and more for each of hundreds of steps; run it on a smaller workload"
LARGE = (
    ("Arnoldi", HOURS),
    ("LiSSA", HOURS),
    ("EK-FAC + CG", HOURS),
    ("exact unrolling", "the adjoints of all queries do not fit a small machine; see docs"),
)
