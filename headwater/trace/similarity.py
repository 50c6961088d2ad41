"""Similarity of what the model makes of two inputs: no gradient, no training, and often hard to beat.

Hanawa, Yokoi, Hara and Inui (2021), "Evaluation of Similarity-based Explanations", arXiv:2006.04528, compare such
scores. Sentence embeddings: Reimers and Gurevych (2019), "Sentence-BERT", arXiv:1908.10084.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from headwater.core.capture import Progress
from headwater.core.examples import Examples, as_examples
from headwater.core.files import ArtifactDamaged, ArtifactMismatch, ArtifactMissing
from headwater.core.fit import Fit
from headwater.core.forward import Pool, evaluate, representations
from headwater.core.prediction import Categorical
from headwater.core.scores import Scores
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.task import Measurement
from headwater.trace.base import Attributor, direction, to_scores

KIND = "embeddings"
Metric = Literal["cosine", "dot", "l2"]


def similarity(
    x: Float[Tensor, "query dim"], y: Float[Tensor, "train dim"], metric: Metric = "cosine"
) -> Float[Tensor, "query train"]:
    """Cosines (zero for a vector of zeros), inner products, or minus Euclidean distances.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> [round(float(similarity(x, 2 * x, m)), 6) for m in ("cosine", "dot", "l2")]
        [1.0, 50.0, -5.0]
    """
    x, y = x.double(), y.double()
    if metric == "l2":
        return -torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    if metric == "cosine":
        x, y = normalize(x, dim=1), normalize(y, dim=1)
    return x @ y.mT


@dataclass(frozen=True, kw_only=True)
class RepresentationSimilarity(Attributor):
    """Similarity of the model's last hidden states.

    It does not know what is asked: a like example is taken to lower the loss, and to raise any other measurement.

    Args:
        metric: "cosine", "dot", or "l2" (minus the distance).
        pool: "mean" over an example's positions, or the "last" one.
        module: The module whose input is compared; the model's last linear or convolutional one when left out.
        signed: For classes: an example of another label counts against a query, however alike they are.
    """

    paper: ClassVar[str] = "arXiv:2006.04528"

    metric: Metric = "cosine"
    pool: Pool = "mean"
    module: str | None = None
    signed: bool = False

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
        """Scores of every training example.

        Args:
            fit: The fitted model; its curvature is not used.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            measurement: What is asked; decides the sign only.
            weights: Linear combinations of queries (group, query), taken of their scores.
            names: Names of those groups.
            progress: Called with (done, total, note).
        """
        examples = as_examples(queries)
        x, y = (
            _representations(fit, data, self.pool, self.module, progress)
            for data in (examples, fit.train)
        )
        values = direction(fit, measurement) * similarity(x, y, self.metric)
        if self.signed:
            values = values * _same_label(fit, examples)
        if weights is not None:
            values = weights.to(values) @ values
        options = {"measurement": measurement, "weights": weights, "names": names}
        return to_scores(self, fit, examples, values, **options)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSimilarity(Attributor):
    """Cosine of embeddings: by another model, such as a pretrained encoder of text, or by this one.

    The mean embedding of the training data is taken off first, since most models' embeddings share a large one.

    Args:
        pool: "mean" over an example's positions, or the "last" one.
        module: The module of the encoder whose input is the embedding; its last linear one when left out.
        center: Take the mean of the training data off.
    """

    paper: ClassVar[str] = "arXiv:1908.10084"

    pool: Pool = "mean"
    module: str | None = None
    center: bool = True

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        encoder: Fit | None = None,
        encoder_queries: Any = None,
        known: Float[Tensor, "train dim"] | None = None,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of every training example.

        Args:
            fit: The fit whose examples are scored.
            queries: Examples, a tuple of tensors, or a dataset, like the training data.
            encoder: A fit (of any curvature) of the model that embeds, whose training data are those of `fit` as that
                model reads them, one for one; `fit` itself when left out.
            encoder_queries: The queries as the encoder reads them, where that differs.
            known: The training data's embeddings, where they were made before; see `embedded`.
            measurement: What is asked; decides the sign only.
            weights: Linear combinations of queries (group, query), taken of their scores.
            names: Names of those groups.
            progress: Called with (done, total, note).

        Raises:
            ValueError: The encoder's examples are not those of the fit, one for one.
        """
        examples, encoder = as_examples(queries), encoder or fit
        read = examples if encoder_queries is None else as_examples(encoder_queries)
        if len(read) != len(examples) or encoder.train.ids != fit.train.ids:
            raise ValueError(
                "The encoder must read the same training examples (by id) and as many queries; it has "
                f"{len(encoder.train)} and {len(read)}, where there are {len(fit.train)} and {len(examples)}."
            )
        options = (self.pool, self.module, progress)
        x = _representations(encoder, read, *options).double()
        y = _representations(encoder, encoder.train, *options) if known is None else known
        if len(y) != len(fit.train):
            raise ValueError(
                f"Expected embeddings of {len(fit.train):,} training examples; got {len(y):,}."
            )
        y = y.double()
        mean = y.mean(0) if self.center else torch.zeros(())
        values = direction(fit, measurement) * similarity(x - mean, y - mean)
        if weights is not None:
            values = weights.to(values) @ values
        return to_scores(
            self, fit, examples, values, measurement=measurement, weights=weights, names=names
        )

    def embedded(
        self, fit: Fit, folder: str | Path, *, progress: Progress | None = None
    ) -> Float[Tensor, "train dim"]:
        """Embeddings of the training data: read from a folder, or made and kept there.

        Args:
            fit: The model and its training data.
            folder: Where they are kept; what was made from another model or other data is replaced.
            progress: Called with (done, total, note).
        """
        made_from = {"model": fit.made_from["model"], "data": fit.train.fingerprint()}
        options = {"pool": self.pool, "module": self.module}
        with suppress(ArtifactMissing, ArtifactMismatch, ArtifactDamaged):
            found = Artifact.open(folder, KIND)
            found.require(**made_from)
            if found.facts["options"] == options:
                return found.tensor("embeddings").clone()
        made = _representations(fit, fit.train, self.pool, self.module, progress).float().cpu()
        facts = {"options": options}
        with ArtifactWriter(folder, kind=KIND, facts=facts, made_from=made_from) as writer:
            writer.tensor("embeddings", made)
        return made


def _representations(
    fit: Fit, examples: Examples, pool: Pool, module: str | None, progress: Progress | None
) -> Tensor:
    batches = fit.batches(examples)
    options = {"batches": batches, "module": module, "pool": pool, "progress": progress}
    return representations(fit.model, fit.task, examples, **options)


def _same_label(fit: Fit, queries: Examples) -> Float[Tensor, "query train"]:
    """1 where the labels are the same, -1 elsewhere."""

    def label(model: Any, batch: Any) -> Tensor:
        prediction = fit.task.predict(model, batch)
        if not isinstance(prediction, Categorical) or prediction.labels.shape[1] != 1:
            raise ValueError("signed=True needs one class an example; leave it out for this task.")
        return prediction.labels[:, 0]

    x, y = (
        evaluate(fit.model, data, label, batches=fit.batches(data)) for data in (queries, fit.train)
    )
    return 2.0 * (x[:, None] == y[None, :]).double() - 1
