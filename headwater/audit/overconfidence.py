r"""How much surer a model is than it may be, on examples that it has not seen.

Of answers given with confidence c a share c should be right. Confidence beside accuracy, bin by bin, and the expected
calibration error of twenty bins of equal mass (Nguyen and O'Connor 2015, arXiv:1508.05154); for classes also the
temperature that would serve the log loss best (Guo et al. 2017, arXiv:1706.04599): above 1 the model is too sure.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwater.audit.base import Auditor, Findings, Section, Table
from headwater.audit.subject import Subject
from headwater.calibrate.temperature import best_temperature
from headwater.core.capture import evaluation_mode
from headwater.core.examples import Examples, as_examples, to_device
from headwater.core.fit import Fit
from headwater.core.prediction import Categorical
from headwater.numerics.calibration import Reliability, reliability
from headwater.numerics.resampling import Estimate, bootstrap

_AT_ONCE = 512  # positions whose probabilities are held at a time


@dataclass(frozen=True, eq=False, kw_only=True)
class Sureness:
    """What a model answered, position by position.

    Attributes:
        confidence: Probability of its likeliest answer.
        right: Whether that is the label.
        own: Probability of the label.
        example: Number of the example that the position is of.
        temperature: That of the least log loss, for one position an example; None for texts.
    """

    confidence: Float[Tensor, " at"]
    right: Bool[Tensor, " at"]
    own: Float[Tensor, " at"]
    example: Int[Tensor, " at"]
    temperature: float | None = None

    def reliability(self, *, n_bins: int = 20) -> Reliability:
        """Confidence beside accuracy, in bins of equal mass."""
        return reliability(self.confidence, self.right, n_bins=n_bins)

    @property
    def overconfidence(self) -> Estimate:
        """Mean confidence less accuracy, with an interval over examples, whose positions stay together."""
        gap = self.confidence.double() - self.right.double()
        n = int(self.example.max()) + 1
        sums = torch.zeros(2, n, dtype=torch.float64)
        sums[0].index_add_(0, self.example, gap)
        sums[1].index_add_(0, self.example, torch.ones_like(gap))
        return bootstrap(
            lambda i: float(sums[0, i].sum() / sums[1, i].sum()), (n,), n=n, n_samples=500
        )


def sureness_of(probabilities: Float[Tensor, "n class"], labels: Int[Tensor, " n"]) -> Sureness:
    """Of probabilities that are known, one row an example.

    Example:
        >>> found = sureness_of(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> found.confidence.tolist(), found.right.tolist()
        ([0.75, 0.5], [True, False])
    """
    p = probabilities.double()
    confidence, answer = p.max(1)
    own = p.gather(1, labels[:, None]).squeeze(1)
    return Sureness(
        confidence=confidence, right=answer == labels, own=own, example=torch.arange(len(p))
    )


def sureness(model: nn.Module, fit: Fit, examples: Examples) -> Sureness | None:
    """What a model answers to examples; None where it predicts no classes or tokens."""
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    told: list[Sureness] = []
    kept: list[tuple[Tensor, Tensor]] | None = []  # of classes; logits of texts are too many
    with evaluation_mode(model), torch.no_grad():
        for plan in fit.batches(examples):
            found = fit.task.predict(model, to_device(examples.batch(plan.indices), device))
            if not isinstance(found, Categorical):
                return None
            kept = kept if found.labels.shape[1] == 1 else None
            for row, at in (some.unbind(1) for some in found.mask.nonzero().split(_AT_ONCE)):
                z, y = found.logits[row, at].double().cpu(), found.labels[row, at].cpu()
                rows.append(torch.tensor(plan.indices)[row.cpu()])
                told.append(sureness_of(z.softmax(1), y))
                if kept is not None:
                    kept.append((z, y))
    temperature = None
    if kept is not None:
        temperature = best_temperature(*(torch.cat(v) for v in zip(*kept, strict=True)))
    return Sureness(
        confidence=torch.cat([t.confidence for t in told]),
        right=torch.cat([t.right for t in told]),
        own=torch.cat([t.own for t in told]),
        example=torch.cat(rows),
        temperature=temperature,
    )


@dataclass(frozen=True, kw_only=True)
class Overconfidence(Auditor):
    """Hold a model's confidence against what is right, on held-out data.

    Without held-out data out-of-fold probabilities stand in, which are those of models trained in the same way on
    other examples, held against the labels that were given. Without either nothing is said: of examples that a model
    has learnt it is rightly sure.

    Args:
        n_bins: Bins of equal mass.
    """

    n_bins: int = 20

    def audit(self, fit: Fit, *, heldout: Any = None) -> Findings:
        """Findings without columns: what they say is about the model and not about training examples.

        Args:
            fit: The fitted model.
            heldout: Labelled examples that it was not trained on.
        """
        return self.of(Subject(fit, heldout=heldout))

    def of(self, subject: Subject) -> Findings:
        """The findings about a subject."""
        started, fit = time.perf_counter(), subject.fit
        found, whose = None, "out-of-fold"
        if subject.heldout is not None:
            whose = "held-out"
            found = sureness(fit.model, fit, as_examples(subject.heldout))
        elif subject.probabilities is not None:
            found = sureness_of(subject.probabilities, subject.labels)
        if found is None:
            sentences, tables = (_nothing(subject),), ()
        else:
            sentences, tables = self._told(found, whose)
        section = Section(
            name="overconfidence",
            title="How sure it is",
            sentences=sentences,
            tables=tables,
            passes=subject.newly_paid(),
            seconds=time.perf_counter() - started,
            papers=("arXiv:1706.04599",) if found is not None else (),
        )
        train = fit.train
        return Findings(ids=train.ids, columns={}, sections=(section,), metadata=train.metadata)

    def _told(self, found: Sureness, whose: str) -> tuple[tuple[str, ...], tuple[Table, ...]]:
        bins, gap = found.reliability(n_bins=self.n_bins), found.overconfidence
        sure = "too sure" if gap.low > 0 else "too modest" if gap.high < 0 else "as sure as it may"
        what = "labels" if len(found.example) == gap.n else "tokens"
        loss = float(-found.own.clamp(min=1e-300).log().mean())
        sentences = [
            f"On {len(found.right):,} {whose} {what} the model is {sure}: mean confidence "
            f"{float(found.confidence.mean()):.3f}, accuracy {float(found.right.double().mean()):.3f}, difference "
            f"{gap.value:+.3f} (95 % interval {gap.low:+.3f} to {gap.high:+.3f}).",
            f"Expected calibration error {bins.error:.3f} in {len(bins.count)} bins of equal mass; log loss {loss:.3f} "
            "nats.",
        ]
        if found.temperature is not None:
            sentences.append(
                f"The log loss there is least with all logits divided by {found.temperature:.2f}; "
                "headwater.calibrate has calibrators."
            )
        if whose == "out-of-fold":
            sentences.append("These are models trained in the same way on other examples.")
        columns = {
            "answers": bins.count.tolist(),
            "confidence": bins.confidence.tolist(),
            "accuracy": bins.accuracy.tolist(),
        }
        return tuple(sentences), (Table(title="Confidence beside accuracy", columns=columns),)


def _nothing(subject: Subject) -> str:
    if not subject.categorical:
        return "The model predicts real numbers, of which it says no confidence."
    return "Nothing is known of how sure the model may be: there are no held-out data and no out-of-fold probabilities."
