"""Correlations of values and of ranks, row by row."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def average_ranks(values: Float[Tensor, "*row n"]) -> Float[Tensor, "*row n"]:
    """Ranks 1 to n along the last axis, float64; equal values share the mean of their ranks.

    Example:
        >>> average_ranks(torch.tensor([10.0, 30.0, 20.0, 30.0])).tolist()
        [1.0, 3.5, 2.0, 3.5]
    """
    values = values.contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def pearson(a: Float[Tensor, "*row n"], b: Float[Tensor, "*row n"]) -> Float[Tensor, "*row"]:
    """Pearson correlation along the last axis, float64; NaN where a row is constant or has a NaN.

    Example:
        >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])).item()
        -1.0
    """
    a, b = a.double(), b.double()
    undefined = (a == a[..., :1]).all(-1) | (b == b[..., :1]).all(-1)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    # Scaled before they are multiplied, so that no product of tiny or huge numbers is lost.
    a, b = (v / v.abs().amax(-1, keepdim=True) for v in (a, b))
    r = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return r.clamp(-1, 1).masked_fill(undefined, torch.nan)


def spearman(a: Float[Tensor, "*row n"], b: Float[Tensor, "*row n"]) -> Float[Tensor, "*row"]:
    """Spearman's rank correlation along the last axis: Pearson's of the average ranks.

    NaN where a row is constant or has a NaN.
    """
    undefined = a.isnan().any(-1) | b.isnan().any(-1)
    return pearson(average_ranks(a), average_ranks(b)).masked_fill(undefined, torch.nan)


def kept_ranking(
    scores: Float[Tensor, "*row n"], reference: Float[Tensor, "*row n"], k: int = 10
) -> Float[Tensor, "*row"]:
    r"""How well scores keep the top k of a reference, nDCG@k: 1 where they rank the same k in the same order.

    The reference's first item is worth k, its second k - 1, and so on down to 1, all others nothing. The worth of the
    first k items by the scores, the r-th discounted by $\log_2(r + 1)$, is divided by that of the reference's own.
    Järvelin and Kekäläinen (2002), doi:10.1145/582415.582418; the worths are our choice.

    Args:
        scores: Higher for what comes first.
        reference: Likewise.
        k: How many count; all where there are fewer.

    Example:
        >>> kept_ranking(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([9.0, 5.0, 4.0]), 2).item()
        1.0
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}.")
    k = min(k, scores.shape[-1])
    worth = torch.arange(k, 0, -1, dtype=torch.float64, device=scores.device)
    discounted = 1 / torch.arange(2, k + 2, dtype=torch.float64, device=scores.device).log2()
    first, best = (x.topk(k, dim=-1).indices for x in (scores, reference))
    found = (first[..., :, None] == best[..., None, :]).double() @ worth  # what each is worth
    return (found * discounted).sum(-1) / (worth * discounted).sum()


def redrawn_spearman(
    a: Float[Tensor, "*row n"], b: Float[Tensor, "*row n"], counts: Int[Tensor, " n"]
) -> Float[Tensor, "*row"]:
    """Spearman's correlation of rows in which element i stands `counts[i]` times.

    For the draws of a bootstrap: elements are sorted once, for their ranks, and then only counted.

    Args:
        a: Average ranks of the elements, each standing once.
        b: Average ranks of the elements, each standing once.
        counts: How often each element stands in the rows.

    Returns:
        What `spearman` says of the longer rows.
    """
    weights = counts.double()
    a, b = (_redrawn_ranks(v, weights) for v in (a, b))
    a, b = (v - (v * weights).sum(-1, keepdim=True) / weights.sum() for v in (a, b))
    squares = (a.square() * weights).sum(-1) * (b.square() * weights).sum(-1)
    constant = squares < 1e-6  # ranks that are not all equal differ by 1/2 at least
    return ((a * b * weights).sum(-1) / squares.sqrt()).masked_fill(constant, torch.nan)


def _redrawn_ranks(
    ranks: Float[Tensor, "*row n"], weights: Float[Tensor, " n"]
) -> Float[Tensor, "*row n"]:
    """Average ranks when elements stand several times: those below, and half of those equal."""
    code = (2 * ranks).long() - 1  # whole numbers in the order of the ranks, equal where they are
    equal = code.new_zeros((*code.shape[:-1], 2 * code.shape[-1]), dtype=torch.float64)
    equal.scatter_add_(-1, code, weights.expand(code.shape))
    return (equal.cumsum(-1) - (equal - 1) / 2).gather(-1, code)


def subset_predictions(
    scores: Float[Tensor, "query n_train"], masks: Bool[Tensor, "subset n_train"]
) -> Float[Tensor, "query subset"]:
    r"""What scores predict for models trained on subsets: $g_k(q) = \sum_{m \in S_k} \tau(q, m)$.

    A query whose predictions differ by no more than the rounding of these sums has one prediction
    for all subsets: its row is made constant, float64.
    """
    if scores.shape[1] != masks.shape[1]:
        raise ValueError(
            f"Scores and masks must cover the same training examples; got {scores.shape[1]} "
            f"columns of scores and masks of {masks.shape[1]} examples."
        )
    scores = scores.double()
    predictions = scores @ masks.double().T
    rounding = 4 * torch.finfo(torch.float64).eps * scores.abs().sum(1, keepdim=True)
    spread = predictions.amax(1, keepdim=True) - predictions.amin(1, keepdim=True)
    return torch.where(spread <= rounding, predictions[:, :1], predictions)


def lds(
    scores: Float[Tensor, "query n_train"],
    masks: Bool[Tensor, "subset n_train"],
    outcomes: Float[Tensor, "subset query"],
) -> Float[Tensor, " query"]:
    """Linear datamodeling score of each query: do scores rank the retrained subsets rightly?

    Spearman correlation, over subsets, of the summed scores of a subset's examples and the
    measurement of a model trained on that subset.

    Args:
        scores: Positive where adding the example raises the measurement.
        masks: True where a subset holds an example.
        outcomes: The measurement after training on each subset, a mean over seeds or a single run.

    Returns:
        One correlation for each query; NaN where predictions or outcomes are constant. The mean
        over queries is `lds(...).nanmean()`, and `isnan().sum()` tells how many are left out.

    References:
        Park, Georgiev, Ilyas, Leclerc and Madry (2023), "TRAK: Attributing Model Behavior at
        Scale", arXiv:2303.14186.
    """
    return spearman(subset_predictions(scores, masks), outcomes.T)
