"""How far one sequence is from another."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, tensor


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions that make one sequence of the other.

    Row by row of the classical table. Within a row an insertion follows an insertion, so that the least over all of
    them is a running minimum of the entries less their number.

    Example:
        >>> levenshtein("kitten", "sitting")
        3

    References:
        Levenshtein (1966), and Wagner and Fischer (1974), "The String-to-String Correction Problem".
    """
    number = {item: i for i, item in enumerate(dict.fromkeys([*first, *second]))}
    a, b = (np.array([number[item] for item in s], dtype=np.int64) for s in (first, second))
    steps = np.arange(len(b) + 1)
    row = steps
    for i, item in enumerate(a, start=1):
        best = np.concatenate([[i], np.minimum(row[:-1] + (b != item), row[1:] + 1)])
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def normalized_distances(
    texts: Int[Tensor, "text pos"], others: Int[Tensor, "text pos"]
) -> Float[Tensor, " text"]:
    r"""Levenshtein distance of each pair of texts over their length, $d / L$.

    Example:
        >>> normalized_distances(tensor([[1, 2, 3, 4]]), tensor([[1, 2, 4, 4]])).tolist()
        [0.25]
    """
    if texts.shape[1] == 0:
        raise ValueError("Expected texts of one token or more; got none.")
    pairs = zip(texts.tolist(), others.tolist(), strict=True)
    return tensor([levenshtein(a, b) / len(a) for a, b in pairs]).double()
