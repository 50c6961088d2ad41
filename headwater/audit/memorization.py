r"""What a model has learnt by heart, and along which directions of its weights it is more active there.

Merullo, Vatsavaya, Bushnaq and Lewis (2025), "From Memorization to Reasoning in the Spectrum of Loss Curvature",
arXiv:2510.24256.

Recitation: after the first tokens of a passage the model's greedy continuation is compared with how the passage goes
on, by Levenshtein's distance d in tokens over the length L. Strictly recited is d = 0, loosely $1 - d/L \ge 0.75$.

Spectrum: a layer's $C = U_G^\top W U_A$ in the eigenbases of its K-FAC factors is split into bands of falling
curvature, and $\lVert C_\mathrm{band}\, U_A^\top x \rVert$ is compared between memorized and ordinary inputs. A ratio
above one in the last band says that they use directions which the data as a whole do not need. The same ratio for a
task's inputs predicts how much the task loses when these directions are removed.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, first_tensor, plan_batches
from headwater.core.examples import Examples, as_examples
from headwater.core.fit import Fit
from headwater.core.forward import evaluate
from headwater.core.layers import Layer
from headwater.core.prediction import Categorical
from headwater.core.task import Task
from headwater.forget.base import EVERY, Eigen, editable_layers, eigen, matrix_of
from headwater.models.greedy import greedy
from headwater.numerics.edit_distance import normalized_distances
from headwater.numerics.resampling import Estimate, bootstrap
from headwater.numerics.staircase import staircase_by_count, staircase_mask

LOOSE = 0.75  # least similarity 1 - d/L of what counts as recited loosely
BANDS = (0.1, 0.25, 0.5, 1.0)  # upper ends: top 10 %, 10-25 %, 25-50 %, bottom 50 %


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


def _batches(data: Examples, batch_size: int) -> list[BatchPlan]:
    return plan_batches(data, batch_size=batch_size, batch_tokens=4096)


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


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    r"""How active bands of falling curvature are on several sets of inputs, beside ordinary ones.

    Attributes:
        layers: Names of the layers.
        bands: Upper end of each band, as a share of the directions.
        activity: For each set the mean of $\lVert C_\mathrm{band} U_A^\top x \rVert$ over an example's positions.
        clean: The set that the others are compared with.
        passes: Passes over the data beyond the fit's: forward passes of the sets alone.
    """

    layers: list[str]
    bands: tuple[float, ...]
    activity: dict[str, Float[Tensor, "_ layer band"]]
    clean: str
    passes: float = 0.0

    def ratio(self, name: str, layer: int, band: int, *, n_samples: int = 300) -> Estimate:
        """Mean activity on a set over that on the clean one, with an interval over the examples of both."""
        x, y = (self.activity[k][:, layer, band].double() for k in (name, self.clean))
        return bootstrap(
            lambda i, j: float(x[i].mean() / y[j].mean()),  # NaN where a band holds no direction
            (len(x), len(y)),
            n=len(x),
            n_samples=n_samples,
        )

    def sensitivity(self, name: str) -> float:
        """The ratio in the last band, mean over layers; above one, an edit takes more here than from clean inputs."""
        x, y = (self.activity[k][..., -1].double().mean(0) for k in (name, self.clean))
        return float((x / y).mean())

    def table(self) -> dict[str, list]:
        """One row a set, layer and band."""
        rows = []
        for name in self.activity:
            if name == self.clean:
                continue
            for i, layer in enumerate(self.layers):
                for b, end in enumerate(self.bands):
                    start = self.bands[b - 1] if b else 0.0
                    found = self.ratio(name, i, b)
                    label = f"{100 * start:g}-{100 * end:g} %"
                    rows.append((name, layer, label, found.value, found.low, found.high))
        columns = ("set", "layer", "band", "ratio", "low", "high")
        return {c: [row[i] for row in rows] for i, c in enumerate(columns)}

    def __repr__(self) -> str:
        told = ", ".join(f"{n} {self.sensitivity(n):.2f}" for n in self.activity if n != self.clean)
        return f"Spectrum({len(self.layers)} layers; activity in the last band over {self.clean}: {told})"


def spectrum(
    fit: Fit,
    sets: Mapping[str, Any],
    *,
    clean: str = "clean",
    layers: Sequence[str] = EVERY,
    bands: Sequence[float] = BANDS,
    by: Literal["input", "pair"] = "input",
) -> Spectrum:
    r"""How active bands of a model's weights are on sets of inputs.

    Args:
        fit: A fit with K-FAC factors.
        sets: Sets of examples by name, the clean one among them.
        clean: Name of the set that others are compared with.
        layers: Patterns of names of linear layers.
        bands: Upper ends of the bands, ascending to 1.
        by: "input" orders the eigenvectors of A, whose joint mass is $\mu_j \sum_i \lambda_i$; "pair" orders the pairs
            (i, j) as the edit does, so that a band is a staircase less the one before.
    """
    if clean not in sets or len(sets) < 2:
        raise ValueError(
            f"Expected {clean!r} and another set to compare with it; got {', '.join(sets) or 'none'}."
        )
    ends = tuple(bands)
    if not ends or ends[-1] != 1 or list(ends) != sorted(set(ends)) or ends[0] <= 0:
        raise ValueError(f"Bands must ascend to 1, such as {BANDS}; got {ends}.")
    chosen = editable_layers(fit, layers)
    named = dict(fit.model.named_parameters(remove_duplicate=False))
    parts = {}
    for layer in chosen:
        W = named[layer.parameters[0]].detach()
        parts[layer.name] = _bands(matrix_of(layer, W), eigen(fit, layer), ends, by)
    data = {name: as_examples(value) for name, value in sets.items()}
    activity = {name: _activity(fit, chosen, parts, examples) for name, examples in data.items()}
    passes = sum(map(len, data.values())) / max(len(fit.train), 1) / 3  # a forward is a third
    return Spectrum([x.name for x in chosen], ends, activity, clean, passes)


def _bands(
    W: Tensor, factors: Eigen, ends: Sequence[float], by: str
) -> list[Float[Tensor, "out in"]]:
    """The weight's part in each band, in the coordinates of its output and input."""
    mu, U_A, lam, U_G = (t.to(W.device) for t in factors)
    C = U_G.mT @ W.double() @ U_A
    out, in_ = C.shape
    parts, before = [], torch.zeros_like(C, dtype=torch.bool)
    for end in ends:
        if by == "input":
            within = (torch.arange(in_, device=W.device) < round(end * in_)).expand(out, in_)
        else:
            within = staircase_mask(staircase_by_count(lam, mu, round(end * C.numel())), in_)
        parts.append((U_G @ (C * (within & ~before)) @ U_A.mT).to(W.dtype))
        before = within
    return parts


def _activity(
    fit: Fit, layers: Sequence[Layer], parts: dict[str, list[Tensor]], examples: Examples
) -> Float[Tensor, "n layer band"]:
    """Mean norm of what each band returns, over an example's positions and a layer's uses."""
    modules = dict(fit.model.named_modules(remove_duplicate=False))
    seen: dict[str, list[Tensor]] = {}

    def listen(name: str):
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs).detach()
            norms = [(x @ part.mT.to(x.dtype)).norm(dim=-1) for part in parts[name]]
            seen.setdefault(name, []).append(torch.stack(norms, dim=-1))

        return hook

    def norms(model: nn.Module, batch: Any) -> Float[Tensor, "batch layer band"]:
        seen.clear()
        fit.task.predict(model, batch)
        mask = fit.task.masks(batch).get("")
        found = []
        for layer in layers:
            uses = [_mean(x, mask) for x in seen[layer.name]]
            found.append(torch.stack(uses).mean(0))
        return torch.stack(found, dim=1)

    with ExitStack() as stack:
        for layer in layers:
            for use in layer.uses:
                handle = modules[use.module].register_forward_pre_hook(
                    listen(layer.name), with_kwargs=True
                )
                stack.callback(handle.remove)
        return evaluate(fit.model, examples, norms, batches=fit.batches(examples), note="spectrum")


def _mean(x: Float[Tensor, "batch *pos band"], mask: Tensor | None) -> Float[Tensor, "batch band"]:
    x = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    if mask is None or mask.shape != x.shape[:2]:
        return x.mean(1)
    weight = mask[..., None].to(x)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


__all__ = [
    "LabelMemory",
    "Recitation",
    "Spectrum",
    "label_memory",
    "perplexity",
    "recitation",
    "recited_examples",
    "spectrum",
]
