r"""Complexity: how many labels a model could still be taught for an input, by Boltzmann influence functions.

$h(x) = \frac1N \sum_y p_y n_y$, with the self-influences n of every label and the probabilities p at the temperature of
the gradients (see `headwater.calibrate.ifcomp`; Ng, Grosse and Ghassemi 2024, arXiv:2406.02745).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.damping import Damping, Inverse
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.forward import class_logits
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.tempering import label_norms, passes_of, temperature_of, untempered

PAPER = "arXiv:2406.02745"
MANY_CLASSES = 200

Confidence = Literal["code_length", "complexity", "entropy"]


def expected_influence(
    probabilities: Float[Tensor, "n class"], norms: Float[Tensor, "n class"]
) -> Float[Tensor, " n"]:
    r"""$\sum_y p_y n_y$."""
    return (probabilities * norms).sum(1)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Complexity:
    """What examples would cost a model to learn, under every label.

    Attributes:
        logits: z, at temperature 1.
        norms: n of every class.
        labels: The labels that came with the examples.
        ids: Names of the examples.
        n_train: N.
        temperature: τ of the gradients.
        examined: Classes whose n was computed, where those were the most probable only; the others have the mean of
            these. None where all were.
        facts: What made it: temperatures, damping, passes over data.
    """

    logits: Float[Tensor, "n class"]
    norms: Float[Tensor, "n class"]
    labels: Int64[Tensor, " n"]
    ids: Sequence[str]
    n_train: int
    temperature: float
    examined: Bool[Tensor, "n class"] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def unlabelled(self) -> Float[Tensor, " n"]:
        r"""$h = \frac1N \sum_y p_y n_y$ at the temperature of the gradients: log Z to first order (nats)."""
        p = (self.logits / self.temperature).softmax(1)
        return expected_influence(p, self.norms) / self.n_train

    @property
    def regret(self) -> Float[Tensor, " n"]:
        """log(1 + h): the same to first order, exact for ridge regression, and small where no label is surprising."""
        return self.unlabelled.log1p()

    @property
    def log_normalizer(self) -> Float[Tensor, " n"]:
        r"""$\log \sum_y p_y e^{n_y / N}$ at the temperature of the gradients; above log C it means only "large"."""
        log_p = (self.logits / self.temperature).log_softmax(1)
        return (log_p + self.norms / self.n_train).logsumexp(1)

    def labelled(
        self,
        labels: Int64[Tensor, " n"] | None = None,
        *,
        error_temperature: float = 1.0,
        first_order: bool = False,
    ) -> Float[Tensor, " n"]:
        r"""$-\log p(y \mid x)$ and the regret, the code length of a label (nats).

        Args:
            labels: y; those that came with the examples when left out.
            error_temperature: Of p in the first term, which may differ from that of the gradients.
            first_order: Add h itself, as the authors do, in place of log(1 + h).
        """
        y = self.labels if labels is None else labels
        log_p = (self.logits / error_temperature).log_softmax(1)
        error = -log_p.gather(1, y[:, None]).squeeze(1)
        return error + (self.unlabelled if first_order else self.regret)

    def label_score(self, labels: Int64[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
        """Quality of each label, from 0 (bad) to 1: the probability that its code length stands for."""
        return (-self.labelled(labels)).exp()

    def confidence(self, kind: Confidence = "code_length") -> Float[Tensor, " n"]:
        r"""How much an input is like the training data: low for those out of distribution.

        Args:
            kind: "code_length", minus the expected code length of a label, $-H(p) - \log(1 + h)$ with the entropy at
                temperature 1; "complexity", $-h$; "entropy", $-\sum_y p_y \log (p_y n_y)$ at the temperature of the
                gradients.
        """
        if kind not in get_args(Confidence):
            offered = ", ".join(get_args(Confidence))
            raise ValueError(f"Expected a confidence among {offered}; got {kind!r}.")
        if kind == "entropy":
            p = (self.logits / self.temperature).softmax(1)
            return -(p * (p * self.norms).clamp(min=1e-300).log()).sum(1)
        if kind == "complexity":
            return -self.unlabelled
        log_p = self.logits.log_softmax(1)
        return (log_p.exp() * log_p).sum(1) - self.regret

    def table(self) -> dict[str, list]:
        """One row an example; `label_score` and `ood_score` run from 0 (bad, or unlike the training data) to 1."""
        return {
            "id": list(self.ids),
            "given_label": self.labels.tolist(),
            "predicted_label": self.logits.argmax(1).tolist(),
            "complexity": self.unlabelled.tolist(),
            "label_score": self.label_score().tolist(),
            "ood_score": self.confidence().exp().tolist(),
        }

    def save(self, folder: str | Path) -> None:
        """Write it as an artifact."""
        facts = {k: getattr(self, k) for k in ("n_train", "temperature", "facts")}
        made_from = self.facts.get("made_from", {})
        with ArtifactWriter(folder, kind="complexity", facts=facts, made_from=made_from) as writer:
            for name in ("logits", "norms", "labels", "examined"):
                if getattr(self, name) is not None:
                    writer.tensor(name, getattr(self, name))
            writer.table("examples", {"id": list(self.ids)})

    @classmethod
    def load(cls, folder: str | Path) -> "Complexity":
        """Read what `save` wrote."""
        artifact = Artifact.open(folder, kind="complexity")
        tensors = {name: artifact.tensor(name) for name in artifact.tensor_names}
        ids = artifact.table("examples").to_pydict()["id"]
        return cls(**tensors, **artifact.facts, ids=ids)

    def __repr__(self) -> str:
        found = self.unlabelled
        low, middle, high = found.quantile(found.new_tensor([0.1, 0.5, 0.9])).tolist()
        part = "" if self.examined is None else f", {int(self.examined[0].sum())} classes examined"
        return (
            f"Complexity({len(self):,} examples, {self.logits.shape[1]} classes{part}, temperature "
            f"{self.temperature:g}: median {middle:.3g} nats, 80 % in [{low:.3g}, {high:.3g}])"
        )


def complexity(
    fit: Fit,
    examples: Any,
    *,
    damping: str | float | Damping = "1 relative",
    temperature: float | None = None,
    top: int | None = None,
    progress: Progress | None = None,
) -> Complexity:
    """Complexity of examples under a fit, with one gradient for each example and class.

    Args:
        fit: A fit at a temperature (`headwater.core.tempering.fit_at_temperature`), or an ordinary one for τ = 1.
        examples: Examples, a tuple of tensors, or a dataset, like the training data. Their labels enter labelled
            complexities only; where there are none, zeros will do.
        damping: A number (of the eigenvalues as they are stored), "1 relative" to each layer's mean eigenvalue, and
            what else `Fit.damping` takes. No regret is above log C: damping under which the mean complexity of the
            training data comes near it is too small for complexities to be read as nats.
        temperature: τ of the gradients; that of the fit when left out, as it should be.
        top: Examine the most probable classes only.
        progress: Called with (done, total, note).

    Raises:
        ValueError: The model is no classifier, or the fit's labels are the given ones.

    Warns:
        When there are more than 200 classes, each of which takes a gradient.
    """
    data, base = as_examples(examples), untempered(fit.task)
    made = fit.facts["options"]["curvature"]
    if made.get("fisher") == "empirical" or made["kind"] == "identity":
        raise ValueError(
            f"Complexities need the Fisher information with labels drawn from the model; this fit's curvature is "
            f"{made['kind']!r} with fisher={made.get('fisher')!r}. Use fit_at_temperature(fit, 3.0)."
        )
    tau_fit = temperature_of(fit.task)
    tau = tau_fit if temperature is None else temperature
    logits, labels = class_logits(fit.model, base, data, batches=fit.batches(data))
    n_classes = logits.shape[1]
    k = n_classes if top is None else min(top, n_classes)
    if k < 1:
        raise ValueError(f"Expected one class or more to examine; got top={top}.")
    if k > MANY_CLASSES:
        warnings.warn(
            f"{k:,} classes take as many gradients of each example; pass top=20 to examine the most probable only.",
            stacklevel=2,
        )
    classes = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    rho = fit.damping(damping)
    found = label_norms(fit, data, classes, Inverse(rho), temperature=tau, progress=progress)
    # gradients and Fisher are those of the losses times their temperatures
    found = found * (tau_fit / tau) ** 2
    norms = found.mean(1, keepdim=True).expand(-1, n_classes).clone().scatter_(1, classes, found)
    examined = torch.zeros_like(norms, dtype=torch.bool).scatter_(1, classes, value=True)
    facts = {
        "papers": [PAPER],
        "made_from": fit.made_from,
        "fisher_temperature": tau_fit,
        "damping": vars(rho),
        "curvature": made,
        "passes_beyond_fit": passes_of(fit, n_classes) if tau_fit != 1 else 0,
        "gradients_an_example": k,
    }
    return Complexity(
        logits=logits,
        norms=norms,
        labels=labels,
        ids=data.ids,
        n_train=len(fit.train),
        temperature=tau,
        examined=None if k == n_classes else examined,
        facts=facts,
    )
