r"""BM25: shared words, weighted by how rare they are; the humble baseline of every table on text.

Robertson and Zaragoza (2009), "The Probabilistic Relevance Framework: BM25 and Beyond", Foundations and Trends in
Information Retrieval 3, doi:10.1561/1500000019. For words w of a query and an example of length $L_n$,

$$\sum_w \log\!\Big(1 + \frac{N - N_w + \frac12}{N_w + \frac12}\Big)
\frac{t_{wn}}{t_{wn} + k_1 (1 - b + b\, L_n / \bar L)} .$$

Scored by bm25s (Lù 2024, arXiv:2407.03618).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.examples import Examples, Subset, as_examples
from headwater.core.fit import Fit
from headwater.core.scores import Scores
from headwater.core.task import Measurement
from headwater.extras import require
from headwater.trace.base import Attributor, direction, to_scores


def is_text(examples: Examples) -> bool:
    """Whether the examples hold token ids."""
    batch = examples.batch([0])
    return isinstance(batch, dict) and "input_ids" in batch


def words_of(examples: Examples, column: str | None = None) -> list[list[str]]:
    """The words of each example, in lower case.

    They come from a metadata column, else from the tokens through their tokenizer, else each token id is a word.

    Raises:
        ValueError: There is no such column, or the examples are no text.
    """
    if column is not None:
        if column not in examples.metadata:
            raise ValueError(
                f"There is no metadata column {column!r}; there are: {', '.join(examples.metadata) or 'none'}."
            )
        return [_split(str(text)) for text in examples.metadata[column]]
    tokenizer = _tokenizer(examples)
    found = []
    for i in range(len(examples)):
        batch = examples.batch([i])
        if not isinstance(batch, dict) or "input_ids" not in batch:
            raise ValueError(
                "BM25 compares words, and these examples hold none: expected batches with `input_ids`, or a metadata "
                "column of texts named by BM25(column=…)."
            )
        real = batch["attention_mask"][0].bool() if "attention_mask" in batch else slice(None)
        ids = batch["input_ids"][0][real].tolist()
        if tokenizer is None:
            found.append([str(i) for i in ids])
        else:
            found.append(_split(tokenizer.decode(ids, skip_special_tokens=True)))
    return found


def _split(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _tokenizer(examples: Examples) -> Any:
    while isinstance(examples, Subset):
        examples = examples.base
    return getattr(examples, "tokenizer", None)


def bm25(
    queries: Sequence[Sequence[str]],
    documents: Sequence[Sequence[str]],
    *,
    k1: float = 1.5,
    b: float = 0.75,
) -> Float[Tensor, "query document"]:
    """BM25 of every query and document, given as words."""
    library = require("bm25s", extra="text")
    index = library.BM25(k1=k1, b=b, method="lucene")
    index.index([list(words) for words in documents], show_progress=False)
    rows = [
        torch.from_numpy(index.get_scores(list(words))) if words else torch.zeros(len(documents))
        for words in queries
    ]
    return torch.stack(rows).double()


@dataclass(frozen=True, kw_only=True)
class BM25(Attributor):
    """Overlap of words between query and example.

    It does not know the model or what is asked: a like example is taken to lower the loss, and to raise any other
    measurement. Needs the extra `text`.

    Args:
        column: Metadata column of the texts; the tokens themselves when left out.
        k1: How soon repetitions of a word stop counting.
        b: How much longer examples are held back.
    """

    paper: ClassVar[str] = "doi:10.1561/1500000019"

    column: str | None = None
    k1: float = 1.5
    b: float = 0.75

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example; the model is not run.

        Args:
            fit: The fit whose examples are scored.
            queries: Examples of the same kind as the training data.
            measurement: What is asked; decides the sign only.
            weights: Linear combinations of queries (group, query), taken of their scores.
            names: Names of those groups.
            progress: Not called.
        """
        examples = as_examples(queries)
        texts = [words_of(data, self.column) for data in (examples, fit.train)]
        values = direction(fit, measurement) * bm25(*texts, k1=self.k1, b=self.b)
        if weights is not None:
            values = weights.to(values) @ values
        options = {"measurement": measurement, "weights": weights, "names": names}
        facts = {"papers": [self.paper, "arXiv:2407.03618"]}
        return to_scores(self, fit, examples, values, **options, facts=facts)
