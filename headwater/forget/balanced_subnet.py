r"""The few weights that recite, found by gradients on what to forget and what to keep, and set to zero.

Sakarvadia, Ajith, Khan, Hudson, Geniesse, Chard, Yang, Foster and Mahoney (2024), "Mitigating Memorization in Language
Models", arXiv:2410.02159: BalancedSubnet. A score $d$ a weight says how much it is to be dropped; the share of weights
with the greatest scores is. The scores descend on

$$J = (1 - w)\, L_\mathrm{retain} - w\, L_\mathrm{forget}$$

by the straight-through gradient $\partial J / \partial d \approx -\, W \circ \partial J / \partial W$. Beginning at
zero they are a sum of gradients, so that the learning rate scales them all and their order does not depend on it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headwater.core.capture import BatchPlan, evaluation_mode
from headwater.core.examples import Examples, as_examples, to_device
from headwater.core.fit import Fit
from headwater.forget.base import EVERY, Editor, WeightEdit, as_edit, editable_layers, matrix_of

Weights = dict[str, Tensor]


def without_greatest(scores: Weights, n: int) -> Weights:
    """Masks that are false for the n greatest scores of all tensors together.

    Example:
        >>> without_greatest({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}, 2)
        {'a': tensor([False,  True]), 'b': tensor([False])}
    """
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    kept[flat.topk(n).indices] = False
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class BalancedSubnet(Editor):
    """Zero the weights that a forget set needs and a retain set does not; a baseline that is told what to forget.

    Args:
        sparsity: Share of the layers' weights that is dropped.
        loss_weight: Weight w of forgetting beside keeping.
        epochs: Passes over the forget set.
        lr: Learning rate of the scores.
        layers: Patterns of names of linear and convolutional layers.
        seed: Seed of the order of the batches.
    """

    paper: ClassVar[str] = "arXiv:2410.02159"

    sparsity: float = 0.0015
    loss_weight: float = 0.7
    epochs: int = 5
    lr: float = 0.3
    layers: tuple[str, ...] = EVERY
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.sparsity < 1 or not 0 <= self.loss_weight <= 1:
            raise ValueError(
                f"Expected sparsity in (0, 1) and loss_weight in [0, 1]; got {self.sparsity} and {self.loss_weight}."
            )
        if self.epochs < 1 or not self.lr > 0:
            raise ValueError(
                f"Expected epochs of 1 or more and a positive lr; got {self.epochs} and {self.lr}."
            )

    def edit(self, fit: Fit, *, forget: Any = None, retain: Any = None) -> WeightEdit:
        if forget is None or retain is None:
            raise ValueError(
                "BalancedSubnet learns from examples: pass forget=… and retain=…; CurvatureEdit needs neither."
            )
        forgotten, kept = as_examples(forget), as_examples(retain)
        layers = editable_layers(fit, self.layers)
        named = dict(fit.model.named_parameters(remove_duplicate=False))
        weights = {layer.parameters[0]: named[layer.parameters[0]] for layer in layers}
        masks, seen = self._learn(fit, weights, forgotten, kept)
        edited, rows = {}, []
        for layer in layers:
            name = layer.parameters[0]
            mask = matrix_of(layer, masks[name])
            edited[layer.name] = matrix_of(layer, weights[name].detach()) * mask
            sizes = {"out": mask.shape[0], "in": mask.shape[1], "pairs": mask.numel()}
            rows.append({"layer": layer.name} | sizes | {"kept": int(mask.sum())})
        facts = self.facts(passes=seen / max(len(fit.train), 1))
        return as_edit(fit, edited, rows, facts)

    def _learn(
        self, fit: Fit, weights: dict[str, Any], forget: Examples, retain: Examples
    ) -> tuple[Weights, int]:
        """Which weights are kept, and how many examples it took to say so."""
        n = math.ceil(self.sparsity * sum(w.numel() for w in weights.values()))
        wide = {k: torch.promote_types(w.dtype, torch.float32) for k, w in weights.items()}
        scores = {k: torch.zeros_like(w, dtype=wide[k]) for k, w in weights.items()}
        generator, seen = torch.Generator().manual_seed(self.seed), 0
        with evaluation_mode(fit.model), restored(fit.model, weights) as originals:
            for plan, other in self._pairs(fit, forget, retain, generator):
                w = self.loss_weight
                gradients = [
                    _gradient(fit, weights, examples, part, sign)
                    for examples, part, sign in ((forget, plan, -w), (retain, other, 1 - w))
                ]
                seen += len(plan.indices) + len(other.indices)
                for name, original in originals.items():
                    scores[name] += self.lr * original * sum(g[name] for g in gradients)
                masks = without_greatest(scores, n)
                with torch.no_grad():
                    for name, weight in weights.items():
                        weight.copy_(originals[name] * masks[name])
        return without_greatest(scores, n), seen

    def _pairs(
        self, fit: Fit, forget: Examples, retain: Examples, generator: torch.Generator
    ) -> Iterator[tuple[BatchPlan, BatchPlan]]:
        """A batch of what is forgotten beside one of what is kept, for every epoch over the former."""
        first, second = fit.batches(forget), fit.batches(retain)
        others = torch.randperm(len(second), generator=generator).tolist()
        for step in range(self.epochs):
            order = torch.randperm(len(first), generator=generator).tolist()
            for place, i in enumerate(order):
                yield first[i], second[others[(step * len(first) + place) % len(second)]]


@contextmanager
def restored(model: nn.Module, weights: dict[str, Any]) -> Iterator[Weights]:
    """Copies of weights that are put back at the end; they alone require gradients meanwhile."""
    originals = {name: w.detach().clone() for name, w in weights.items()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    chosen = {id(w) for w in weights.values()}
    for p, _ in flags:
        p.requires_grad_(id(p) in chosen)
    try:
        yield originals
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(originals[name])
        for p, flag in flags:
            p.requires_grad_(flag)


def _gradient(
    fit: Fit, weights: dict[str, Any], examples: Examples, plan: BatchPlan, scale: float
) -> Weights:
    """Gradients of the mean loss of a batch, by token where there are tokens."""
    batch = to_device(examples.batch(plan.indices), next(fit.model.parameters()).device)
    lengths = sum(examples.lengths[i] for i in plan.indices) if examples.lengths else None
    loss = fit.task.loss(fit.model, batch).sum() / (lengths or len(plan.indices))
    found = torch.autograd.grad(scale * loss, list(weights.values()))
    return dict(zip(weights, found, strict=True))
