r"""Confident learning: which labels do models that have not seen them contradict?

Northcutt, Jiang and Chuang (2021), "Confident Learning: Estimating Uncertainty in Dataset Labels", arXiv:1911.00068.
With out-of-fold probabilities $\hat p$ and a threshold for each class, the mean probability of the class among those
examples that carry it,

$$t_j = \frac{1}{|X_{\tilde y = j}|} \sum_{x : \tilde y = j} \hat p_j(x), \qquad
C_{ij} = \#\{x : \tilde y = i,\; j = \operatorname*{argmax}_{l :\, \hat p_l(x) \ge t_l} \hat p_l(x)\},$$

the entries of $C$ off its diagonal count labels that are confidently another class.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from headwater.extras import require
from headwater.training.loop import Optimizer, Stage, outputs, train

__all__ = ["confidently_other", "label_quality", "out_of_fold"]


def confidently_other(
    probabilities: Float[Tensor, "n class"], labels: Int[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """Which examples stand off the diagonal of the confident joint.

    A class that no example carries has no threshold, and no example is confidently of it.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.95, 0.05]])
        >>> confidently_other(p, torch.tensor([0, 0, 1, 1])).tolist()
        [False, False, False, True]
    """
    p, classes = probabilities.double(), torch.arange(probabilities.shape[1])
    carries = labels[:, None] == classes
    counts = carries.sum(0)
    thresholds = (p * carries).sum(0) / counts.clamp(min=1)
    thresholds = thresholds.masked_fill(counts == 0, torch.inf)
    confident = p >= thresholds - 1e-6  # as the reference: a mean of equal numbers reaches itself
    likeliest = p.masked_fill(~confident, -1.0).argmax(1)
    return confident.any(1) & (likeliest != labels)


def label_quality(
    probabilities: Float[Tensor, "n class"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Label quality by cleanlab and its default, self-confidence; needs the extra `audit`."""
    rank = require("cleanlab.rank", extra="audit")
    found = rank.get_label_quality_scores(labels.numpy(), probabilities.double().numpy())
    return torch.from_numpy(found).double()


def out_of_fold(
    make_model: Callable[[int], nn.Module],
    x: Shaped[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    optimizer: Optimizer | Sequence[Stage],
    folds: int = 5,
    seed: int = 0,
) -> Float[Tensor, "n class"]:
    """Probabilities of each example by a model that was trained without its fold, all folds side by side.

    Folds are drawn at random, and as many examples are left out for each: where they do not divide, a few more.

    Args:
        make_model: The initial model of a seed.
        x: Inputs.
        y: Labels.
        optimizer: Optimizer and length of training; or several stages.
        folds: How many folds.
        seed: Seed of the folds and of the trainings.

    Raises:
        ValueError: There are fewer than two folds, or fewer examples than folds.
    """
    if not 2 <= folds <= len(y):
        raise ValueError(f"folds must be from 2 to the {len(y)} examples; got {folds}.")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = list(order.chunk(folds))
    size = len(y) - max(len(part) for part in held)
    subsets = torch.stack([order[~torch.isin(order, part)][:size].sort().values for part in held])
    models = [make_model(seed + k) for k in range(len(held))]
    seeds = [seed + k for k in range(len(held))]
    trained = train(models, x, y, subsets=subsets, seeds=seeds, optimizer=optimizer)
    logits = outputs(models[0], trained, x)
    found = torch.empty_like(logits[0])
    for part, said in zip(held, logits, strict=True):
        found[part] = said[part]
    return found.double().softmax(-1)
