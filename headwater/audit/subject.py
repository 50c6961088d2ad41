"""What an audit reads: the fit, what the model says of its own data now and during training, and what that cost.

Measures share passes: the model is run over the data once at its end and once at each checkpoint, however many measures
ask. Every pass is noted, so that each measure can say what it would have cost alone and the audit what was paid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwater.audit.base import Passes
from headwater.core.capture import Progress, sweep
from headwater.core.fit import Fit, fits_at
from headwater.core.forward import evaluate, representations
from headwater.core.prediction import IGNORE, Categorical, Prediction
from headwater.core.scoring import Norms
from headwater.core.target import Loss
from headwater.core.task import CausalLM, Task
from headwater.numerics.neighbours import nearest
from headwater.training.trajectory import Trajectory

Value = TypeVar("Value")
_COLUMNS = ("count", "loss", "probability", "margin", "el2n", "correct")


@dataclass(frozen=True, eq=False, kw_only=True)
class Outlook:
    r"""What a model says of each example's label, the mean over its scored positions.

    Attributes:
        count: Scored positions.
        loss: $-\log p_y$ (nats).
        probability: $p_y$.
        margin: $z_y - \max_{c \ne y} z_c$ (nats).
        el2n: $\|p - e_y\|_2$.
        correct: Whether the label is the likeliest class; the share of positions.
        logits: Outputs, for one position an example; else None.
        labels: Labels, likewise.
        categorical: Whether there are classes at all; without them only the loss is known.
    """

    count: Float[Tensor, " train"]
    loss: Float[Tensor, " train"]
    probability: Float[Tensor, " train"]
    margin: Float[Tensor, " train"]
    el2n: Float[Tensor, " train"]
    correct: Float[Tensor, " train"]
    logits: Float[Tensor, "train class"] | None = None
    labels: Int[Tensor, " train"] | None = None
    categorical: bool = True


def outlook(logits: Float[Tensor, "*at class"], labels: Int[Tensor, "*at"]) -> Tensor:
    """Loss, probability, margin, EL2N and correctness at every position, along a last axis.

    Example:
        >>> outlook(torch.zeros(1, 2), torch.tensor([0]))[0].tolist()
        [0.6931471805599453, 0.5, 0.0, 0.7071067811865476, 1.0]
    """
    logits, label = logits.double(), labels[..., None]
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, label)[..., 0]
    other = logits.scatter(-1, label, -torch.inf).amax(-1)
    margin = logits.gather(-1, label)[..., 0] - other
    # |p - e_y|² = |p|² - 2 p_y + 1
    squares = (log_p.exp().square().sum(-1) - 2 * own.exp() + 1).clamp(min=0)
    return torch.stack([-own, own.exp(), margin, squares.sqrt(), (margin >= 0).double()], dim=-1)


def _of_batch(prediction: Prediction) -> Float[Tensor, "batch column"]:
    """Counts, the five numbers, and for one position an example label and logits."""
    count = prediction.mask.sum(1, keepdim=True).double()
    if not isinstance(prediction, Categorical):
        loss = prediction.loss().double()[:, None] / count.clamp(min=1)
        return torch.cat([count, loss, loss.new_full((len(loss), 4), torch.nan)], dim=1)
    labels = prediction.labels.clamp(min=0)
    mask = prediction.mask[..., None]
    each = outlook(prediction.logits, labels).masked_fill(~mask, 0.0)
    found = torch.cat([count, each.sum(1) / count.clamp(min=1)], dim=1)
    if prediction.labels.shape[1] > 1:
        return found
    return torch.cat([found, labels.double(), prediction.logits[:, 0].double()], dim=1)


def answer_losses(
    model: nn.Module, task: Task, batch: Mapping[str, Tensor]
) -> Float[Tensor, "batch 2"]:
    """Mean loss a token of what is scored, behind what is not, and of the same tokens standing alone (nats).

    Both are means over the same tokens: all but the first, which nothing precedes where the answer stands alone. Zero
    where there is no second one.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    scored = labels != IGNORE
    rest = scored & (scored.long().cumsum(1) > 1)
    order = (~scored).long().argsort(dim=1, stable=True)[:, : int(scored.sum(1).max())]
    kept = scored.gather(1, order)
    answer = ids.gather(1, order)
    alone = {
        "input_ids": answer.masked_fill(~kept, 0),
        "attention_mask": kept.long(),
        "labels": answer.masked_fill(~kept, IGNORE),
    }
    behind = {**batch, "labels": labels.masked_fill(~rest, IGNORE)}
    found = (task.predict(model, each) for each in (behind, alone))
    return torch.stack([p.loss().double() / p.mask.sum(1).clamp(min=1) for p in found], dim=1)


class Subject:
    """A fit under audit.

    Args:
        fit: The fitted model.
        trajectories: Records of its training run with checkpoints; of several seeds, where there are.
        probabilities: Probabilities of the classes for each example by models that were not trained on it.
        probabilities_cost: What those cost.
        neighbours: Nearest neighbours that are looked at, in the model's last representation.
        heldout: Labelled examples that the model was not trained on.
        progress: Called with (done, total, note).

    Raises:
        ValueError: The probabilities are not those of the examples and classes.
    """

    def __init__(
        self,
        fit: Fit,
        *,
        trajectories: Sequence[Trajectory] = (),
        probabilities: Float[Tensor, "train class"] | None = None,
        probabilities_cost: Passes | None = None,
        neighbours: int = 10,
        heldout: Any = None,
        progress: Progress | None = None,
    ):
        self.fit, self.progress, self.n_neighbours = fit, progress, neighbours
        self.heldout = heldout
        self.trajectories = [t for t in trajectories if any(c.step for c in t.checkpoints)]
        self._known: dict[Any, Any] = {}
        self._costs: dict[Any, Passes] = {}
        self._touched: set[Any] = set()
        self._told = Passes()
        self.probabilities = probabilities
        self._probabilities_cost = probabilities_cost or Passes()
        if probabilities is not None:
            self._check(probabilities)

    def __len__(self) -> int:
        return len(self.fit.train)

    def _check(self, probabilities: Tensor) -> None:
        expected = (len(self), self.classes)
        if not self.classes:
            raise ValueError("Out-of-fold probabilities need one class an example; leave them out.")
        if tuple(probabilities.shape) != expected:
            raise ValueError(
                f"Expected out-of-fold probabilities {expected} (train, class); got {tuple(probabilities.shape)}."
            )
        off = float((probabilities.double().sum(1) - 1).abs().max())
        if not off < 1e-3 or bool((probabilities < 0).any()):
            raise ValueError(
                "Out-of-fold probabilities must not be negative and must sum to one for each example; the sums are "
                f"off by up to {off:.2g}. Pass softmax(logits), not logits."
            )

    def once(
        self, key: Any, cost: Passes, make: Callable[[], Value], *, note: bool = True
    ) -> Value:
        """What `make` makes, made once, its cost noted; `note=False` where its user has no need of the passes."""
        if note:
            self._touched.add(key)
        if key not in self._known:
            self._known[key], self._costs[key] = make(), cost
        return self._known[key]

    @property
    def paid(self) -> Passes:
        """All passes so far."""
        return sum(self._costs.values(), Passes())

    def newly_paid(self) -> Passes:
        """The passes since this was last asked."""
        before, self._told = self._told, self.paid
        return self._told - before

    @contextmanager
    def watched(self) -> Iterator[Callable[[], Passes]]:
        """Yield a function that tells what was used since, at the cost that it has alone."""
        before, self._touched = self._touched, set()
        touched = self._touched
        try:
            yield lambda: sum((self._costs[key] for key in touched), Passes())
        finally:
            self._touched = before | touched

    @property
    def final(self) -> Outlook:
        """What the fitted model says."""
        return self._final(note=True)

    def _final(self, *, note: bool) -> Outlook:
        return self.once(
            "final",
            Passes(forward=1),
            lambda: self._outlook(self.fit.model, "what the model says"),
            note=note,
        )

    @property
    def labels(self) -> Int[Tensor, " train"]:
        """The class of each example, which needs no pass in itself.

        Raises:
            ValueError: The task has no class an example.
        """
        labels = self._final(note=False).labels
        if labels is None:
            raise ValueError(
                "This task has no class for each example, so there is no label to hold against another."
            )
        return labels

    @property
    def categorical(self) -> bool:
        """Whether the model predicts classes or tokens."""
        return self._final(note=False).categorical

    @property
    def classes(self) -> int:
        """How many classes there are; 0 where an example has not one class."""
        logits = self._final(note=False).logits
        return 0 if logits is None else logits.shape[1]

    @property
    def judged(self) -> str:
        """What may be wrong of an example, as people call it: labels, texts or targets."""
        if self.classes:
            return "labels"
        return "texts" if self.categorical else "targets"

    def outlooks(self, run: int) -> list[Outlook]:
        """What the model said at each checkpoint of a run, the initial parameters left out."""
        return [self._at(run, i) for i in self.kept(run)]

    def kept(self, run: int, share: float = 1.0) -> list[int]:
        """Numbers of a run's checkpoints within a share of its steps, one at least; not the initial parameters."""
        trajectory = self.trajectories[run]
        every = [i for i, c in enumerate(trajectory.checkpoints) if c.step]
        return [
            i for i in every if trajectory.checkpoints[i].step <= share * trajectory.steps
        ] or every[:1]

    def _at(self, run: int, checkpoint: int) -> Outlook:
        note = f"checkpoint {checkpoint} of run {run + 1}"
        return self.once(
            ("outlook", run, checkpoint),
            Passes(forward=1),
            lambda: self._outlook(self.fit_at(run, checkpoint).model, note),
        )

    def early(self, share: float) -> list[Outlook]:
        """What the models said early in training, over all runs."""
        return [self._at(r, i) for r in range(len(self.trajectories)) for i in self.kept(r, share)]

    def fit_at(self, run: int, checkpoint: int) -> Fit:
        """The fit with a checkpoint's weights and without curvature."""
        (found,) = fits_at(self.fit, [self.trajectories[run].load_checkpoint(checkpoint)])
        return found

    def gradient_norms(self, run: int, checkpoint: int) -> Float[Tensor, " train"]:
        """Norm of each example's loss gradient at a checkpoint, over the followed layers."""

        def make() -> Tensor:
            fit, norms = self.fit_at(run, checkpoint), Norms(len(self))
            sweep(
                fit.capture(),
                fit.train,
                [norms],
                Loss(),
                batches=fit.batches(fit.train),
                progress=self.progress,
                note="gradient norms",
            )
            return norms.finish()

        return self.once(("norms", run, checkpoint), Passes(backward=1), make)

    @property
    def representations(self) -> Float[Tensor, "train dim"]:
        """What the model's last linear or convolutional module reads."""
        fit = self.fit
        return self.once(
            "representations",
            Passes(forward=1),
            lambda: representations(
                fit.model,
                fit.task,
                fit.train,
                batches=fit.batches(fit.train),
                progress=self.progress,
            ),
        )

    @property
    def neighbours(self) -> tuple[Int[Tensor, "train k"], Float[Tensor, "train k"]]:
        """The nearest other examples by cosine of the representations, and the cosines."""
        x = self.representations
        k = min(self.n_neighbours, len(self) - 1)
        return self.once("neighbours", Passes(), lambda: nearest(x, k))

    @property
    def out_of_fold(self) -> Float[Tensor, "train class"] | None:
        """The given probabilities, at the cost that was told."""
        return self.once("probabilities", self._probabilities_cost, lambda: self.probabilities)

    @property
    def has_prompts(self) -> bool:
        """Whether some texts begin with a prompt: tokens that a causal language model reads and is not scored on."""
        train = self.fit.train
        if not isinstance(self.fit.task, CausalLM) or train.lengths is None:
            return False
        scored = self._final(note=False).count
        return bool((scored < torch.tensor(train.lengths) - 1).any())

    @property
    def answers(self) -> tuple[Float[Tensor, " train"], Float[Tensor, " train"]]:
        """Mean loss a token of each text's answer: behind its prompt, and standing alone (nats)."""
        fit = self.fit

        def make() -> Tensor:
            return evaluate(
                fit.model,
                fit.train,
                lambda model, batch: answer_losses(model, fit.task, batch),
                batches=fit.batches(fit.train),
                progress=self.progress,
                note="answers with and without their prompts",
            )

        found = self.once("answers", Passes(forward=2), make)
        return found[:, 0], found[:, 1]

    def _outlook(self, model: nn.Module, note: str) -> Outlook:
        fit, kinds = self.fit, set()

        def told(model: nn.Module, batch: Any) -> Tensor:
            prediction = fit.task.predict(model, batch)
            kinds.add(isinstance(prediction, Categorical))
            return _of_batch(prediction)

        found = evaluate(
            model,
            fit.train,
            told,
            batches=fit.batches(fit.train),
            progress=self.progress,
            note=note,
        )
        n = len(_COLUMNS)
        values = dict(zip(_COLUMNS, found[:, :n].unbind(1), strict=True))
        if found.shape[1] == n:
            return Outlook(**values, categorical=all(kinds))
        return Outlook(**values, labels=found[:, n].long(), logits=found[:, n + 1 :])
