"""What a model has learnt by heart: passages that it recites, and wrong labels that it still says.

Measures of Merullo, Vatsavaya, Bushnaq and Lewis (2025), "From Memorization to Reasoning in the Spectrum of Loss
Curvature", arXiv:2510.24256. After the first tokens of a passage the model's greedy continuation is compared with how
the passage goes on, by Levenshtein's distance d in tokens over the length L. Strictly recited is d = 0, loosely
1 - d/L ≥ 0.75.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, evaluation_mode, plan_batches
from headwater.core.examples import Examples, as_examples
from headwater.core.forward import evaluate
from headwater.core.prediction import Categorical
from headwater.core.task import Task
from headwater.models.greedy import greedy
from headwater.numerics.edit_distance import normalized_distances
from headwater.numerics.ranks import kept_ranking
from headwater.numerics.resampling import Estimate, bootstrap

LOOSE = 0.75  # least similarity 1 - d/L of what counts as recited loosely
_MOST_LEVERAGE = 0.95
OWED = 0.25  # from which an example counts as memorized (Feldman and Zhang)


@dataclass(frozen=True, eq=False, repr=False)
class Recitation:
    """How passages were continued.

    Attributes:
        ids: Names of the passages.
        distances: Levenshtein's distance of what was said from how the passage goes on, over its length.
        said: The tokens that were said.
        expected: The tokens of the passages.
    """

    ids: list[str]
    distances: Float[Tensor, " text"]
    said: Int[Tensor, "text pos"]
    expected: Int[Tensor, "text pos"]

    @property
    def is_strict(self) -> Bool[Tensor, " text"]:
        """Recited to the last token."""
        return self.distances == 0

    @property
    def is_loose(self) -> Bool[Tensor, " text"]:
        """Recited but for a quarter of the tokens at most."""
        return 1 - self.distances >= LOOSE

    @property
    def strict(self) -> Estimate:
        """Share recited to the last token, with an interval over passages."""
        return mean_of(self.is_strict)

    @property
    def loose(self) -> Estimate:
        """Share recited loosely."""
        return mean_of(self.is_loose)

    @property
    def distance(self) -> Estimate:
        """Mean distance: 0 where all is recited."""
        return mean_of(self.distances)

    @property
    def repeated(self) -> float:
        """Share of the pairs of tokens said that were said before in the same text: high where the model stutters."""
        pairs = [list(pairwise(t)) for t in self.said.tolist()]
        new = sum(len(set(p)) for p in pairs)
        return 1 - new / max(1, sum(map(len, pairs)))

    def table(self) -> dict[str, list]:
        """One row a passage."""
        return {
            "id": self.ids,
            "distance": self.distances.tolist(),
            "is_strict": self.is_strict.tolist(),
            "is_loose": self.is_loose.tolist(),
        }

    def __repr__(self) -> str:
        return (
            f"Recitation({len(self.ids)} passages: {int(self.is_strict.sum())} strictly, "
            f"{int(self.is_loose.sum())} loosely, mean distance {float(self.distances.mean()):.3f})"
        )


def mean_of(values: Tensor, *, seed: int = 0) -> Estimate:
    """The mean of one value an example, with a bootstrap interval over examples."""
    x = values.double()
    n = len(x)
    return bootstrap(lambda i: float(x[i].mean()), (n,), n=n, n_samples=500, seed=seed)


def recitation(
    model: nn.Module,
    passages: Int[Tensor, "text pos"],
    *,
    prefix: int,
    suffix: int | None = None,
    ids: Sequence[str] | None = None,
) -> Recitation:
    """Let a language model continue the beginnings of passages.

    Args:
        model: Token numbers to logits.
        passages: Their tokens, without padding.
        prefix: Tokens that the model is given.
        suffix: Tokens that it is to say; the rest of the passage when left out.
        ids: Names of the passages.

    Raises:
        ValueError: The passages are shorter than prefix and suffix together.
    """
    n, length = passages.shape
    suffix = length - prefix if suffix is None else suffix
    if prefix < 1 or suffix < 1 or prefix + suffix > length:
        raise ValueError(
            f"Passages of {length} tokens cannot be split into prefix {prefix} and suffix {suffix}; both must be 1 or "
            "more, and fit in."
        )
    expected = passages[:, prefix : prefix + suffix]
    said = greedy(model, passages[:, :prefix], suffix)
    names = [str(i) for i in range(n)] if ids is None else list(ids)
    return Recitation(names, normalized_distances(expected, said), said, expected.cpu())


def recited_examples(
    model: nn.Module, examples: Any, *, prefix: int = 32, suffix: int = 32
) -> Recitation:
    """Which examples of a text dataset the model continues by heart; those that are too short are left out.

    Args:
        model: Token numbers to logits.
        examples: Examples whose batches hold `input_ids`, or tuples that begin with them.
        prefix: Tokens that the model is given.
        suffix: Tokens that it is to say.

    Raises:
        ValueError: No example is long enough.
    """
    data, found, names = as_examples(examples), [], []
    for i, name in enumerate(data.ids):
        batch = data.batch([i])
        tokens = batch["input_ids"] if isinstance(batch, Mapping) else batch[0]
        real = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        row = tokens[0] if real is None else tokens[0][real[0].bool()]
        if len(row) >= prefix + suffix:
            found.append(row[: prefix + suffix])
            names.append(name)
    if not found:
        raise ValueError(
            f"No example has {prefix + suffix} tokens; pass a shorter prefix or suffix."
        )
    return recitation(model, torch.stack(found), prefix=prefix, suffix=suffix, ids=names)


def perplexity(model: nn.Module, task: Task, examples: Any, *, batch_size: int = 32) -> float:
    """Exponential of the mean loss of a scored token."""
    data = as_examples(examples)

    def both(model: nn.Module, batch: Any) -> Float[Tensor, "batch 2"]:
        prediction = task.predict(model, batch)
        scored = prediction.mask.sum(1)  # type: ignore[attr-defined]
        return torch.stack([prediction.loss().double(), scored.double()], dim=1)

    loss, count = evaluate(model, data, both, batches=_batches(data, batch_size)).sum(0).tolist()
    return float(torch.tensor(loss / count).exp())


def ranking_kept(
    model: nn.Module,
    reference: nn.Module,
    task: Task,
    examples: Any,
    *,
    k: int = 10,
    batch_size: int = 8,
) -> Estimate:
    """How well a model keeps the ranking of the next tokens that another has, say itself before an edit: nDCG@k.

    The mean over scored positions of an example, and over examples with an interval; see
    `headwater.numerics.ranks.kept_ranking`.

    Args:
        model: The model.
        reference: The other.
        task: Their task.
        examples: Texts.
        k: How many of the reference's likeliest tokens count.
        batch_size: Most texts in a batch.
    """
    data = as_examples(examples)

    def kept(model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
        found, before = task.predict(model, batch), task.predict(reference, batch)
        mask = found.mask
        each = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        each[mask] = kept_ranking(found.outputs[mask].float(), before.outputs[mask].float(), k)
        return each.sum(1) / mask.sum(1).clamp(min=1)

    with evaluation_mode(reference):
        return mean_of(evaluate(model, data, kept, batches=_batches(data, batch_size)))


def _batches(data: Examples, batch_size: int) -> list[BatchPlan]:
    return plan_batches(data, batch_size=batch_size, batch_tokens=4096)


def owed_to_itself(
    loss: Float[Tensor, " n"], self_influence: Float[Tensor, " n"], *, exact: bool = False
) -> Float[Tensor, " n"]:
    r"""How much of its label's probability a training example owes to having been trained on.

    Its self-influence s is what leaving it out would add to its loss $-\log p_y$, to first order, and $s / (1 - p_y)$
    is what the log-odds of its label would fall by. They are carried on as a straight line, since at labels learnt by
    heart loss and gradient vanish together. What the probability loses is the memorization of Feldman and Zhang (2020),
    "What Neural Networks Memorize and Why", arXiv:2008.03703, who train many models to know it and call 0.25 and more
    memorized.

    Args:
        loss: $-\log p_y$ of the fitted model.
        self_influence: s, in nats.
        exact: Whether s is by the exact curvature, which goes with the example: the log-odds then fall by
            $1 / (1 - h)$ times as much, with the leverage $h = p_y s / (1 - p_y)$ (exactly so for two classes).

    Example:
        >>> owed_to_itself(torch.tensor([2.0]).log(), torch.tensor([3.0]).log() / 2)  # from odds of 1:1 to 1:3
        tensor([0.2500])
    """
    p, rest = (-loss).exp(), -torch.expm1(-loss)
    shift = torch.where(rest > 0, self_influence.clamp(min=0) / rest.clamp(min=1e-300), 0.0)
    odds = -loss - rest.clamp(min=1e-300).log()
    if exact:
        shift = shift / (1 - (p * shift).clamp(max=_MOST_LEVERAGE))
    return p - (odds - shift).sigmoid()


@dataclass(frozen=True, eq=False, repr=False)
class LabelMemory:
    """What a classifier says of examples whose given labels are known to be wrong.

    Attributes:
        ids: Names of the examples.
        predicted_label: What the model says.
        given_label: The wrong label it was trained on.
        true_label: The right one.
    """

    ids: list[str]
    predicted_label: Int[Tensor, " n"]
    given_label: Int[Tensor, " n"]
    true_label: Int[Tensor, " n"]

    @property
    def retained(self) -> Estimate:
        """Share of the wrong labels that are still predicted."""
        return mean_of(self.predicted_label == self.given_label)

    @property
    def recovered(self) -> Estimate:
        """Share of the right labels that are predicted in their place."""
        return mean_of(self.predicted_label == self.true_label)

    def table(self) -> dict[str, list]:
        """One row an example."""
        columns = ("predicted_label", "given_label", "true_label")
        return {"id": self.ids} | {name: getattr(self, name).tolist() for name in columns}

    def __repr__(self) -> str:
        return (
            f"LabelMemory({len(self.ids)} wrong labels: {100 * self.retained.value:.1f} % still predicted, "
            f"{100 * self.recovered.value:.1f} % predicted right)"
        )


def label_memory(
    model: nn.Module, task: Task, examples: Any, true_labels: Int[Tensor, " n"]
) -> LabelMemory:
    """Whether a classifier still says the wrong labels that examples were given.

    Args:
        model: The classifier.
        task: Its task.
        examples: Examples with the labels they were given.
        true_labels: Their right labels, which differ.

    Raises:
        ValueError: A given label is right.
    """
    data = as_examples(examples)

    def both(model: nn.Module, batch: Any) -> Int[Tensor, "batch 2"]:
        prediction = task.predict(model, batch)
        if not isinstance(prediction, Categorical) or prediction.labels.shape[1] != 1:
            raise ValueError("Label memory needs a classifier: one label an example.")
        return torch.stack([prediction.logits[:, 0].argmax(-1), prediction.labels[:, 0]], dim=1)

    predicted, given = evaluate(model, data, both, batches=_batches(data, 256)).T
    if bool((given == true_labels).any()):
        raise ValueError("Pass examples whose given label is wrong; some labels here are right.")
    return LabelMemory(list(data.ids), predicted, given, true_labels)


__all__ = [
    "LabelMemory",
    "Recitation",
    "label_memory",
    "owed_to_itself",
    "perplexity",
    "ranking_kept",
    "recitation",
    "recited_examples",
]
