r"""IF-COMP: how many labels a model could still be taught for an input, by Boltzmann influence functions.

A network is overconfident where other labels would be as easy to fit. Adding (x, y) to N training examples with weight
1/N moves the parameters by $\frac1N H^{-1} \nabla \log p(y \mid x)$, so it raises the log-probability of y by

$$\frac{n_y(x)}{N}, \qquad n_y(x) = g_y^\top (F + \rho I)^{-1} g_y, \qquad
g_y = -\nabla_\theta \log \operatorname{softmax}(z(x) / \tau)_y .$$

At τ = 1 the softmax of a trained network is saturated: $g_y$ vanishes for the predicted class and the Fisher
information F is nearly singular. Both are taken at a higher temperature, labels drawn from the softened model. Then

* log Z(x), the regret of predictive normalized maximum likelihood (`headwater.calibrate.pnml`), is to first order
  $h = \frac1N \sum_y p_y n_y$, the unlabelled complexity; for ridge regression it is exactly log(1 + h);
* a labelled example costs its error $-\log p(y \mid x)$ and the regret: high for wrong labels;
* probabilities $\operatorname{softmax}((z + \alpha n / N) / T)$, or $p_y (1 + \alpha n_y / N)$ normalized, hedge where
  labels are cheap, with α and T chosen on validation data like the training data.

Ng, Grosse and Ghassemi (2024), "Measuring Stochastic Data Complexity with Boltzmann Influence Functions",
arXiv:2406.02745.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from headwater.calibrate.base import Calibrator, Predictions, Predictor
from headwater.calibrate.temperature import best_temperature
from headwater.core.capture import Progress
from headwater.core.curvature import EKFAC, CurvatureMethod
from headwater.core.damping import Damping, Inverse
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.forward import class_logits
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.tempering import (
    fit_at_temperature,
    label_norms,
    passes_of,
    temperature_of,
    untempered,
)
from headwater.numerics.calibration import log_losses

Space = Literal["logit", "probability"]
Confidence = Literal["code_length", "complexity", "entropy"]

MANY_CLASSES = 200
TIE = 1e-6  # how far a class stays below the predicted one that it would have risen above


def expected_influence(
    probabilities: Float[Tensor, "n class"], norms: Float[Tensor, "n class"]
) -> Float[Tensor, " n"]:
    r"""$\sum_y p_y n_y$."""
    return (probabilities * norms).sum(1)


def hedged_logits(
    logits: Float[Tensor, "n class"],
    norms: Float[Tensor, "n class"],
    n_train: int,
    strength: float,
    temperature: float,
    *,
    space: Space = "logit",
    keep_predicted: bool = True,
) -> Float[Tensor, "n class"]:
    r"""Logits of the predictive distribution: $(z + \alpha n / N) / T$, or $z / T + \log(1 + \alpha n / N)$.

    Args:
        logits: z.
        norms: n.
        n_train: N.
        strength: α.
        temperature: T.
        space: "logit" or "probability", in that order.
        keep_predicted: Let no class rise above the one that was predicted.

    Example:
        >>> z, n = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 300.0]])
        >>> hedged_logits(z, n, 100, 1.0, 2.0).tolist()
        [[2.0, 1.5]]
    """
    if space == "logit":
        found = (logits + strength * norms / n_train) / temperature
    else:
        found = logits / temperature + torch.log1p(strength * norms / n_train)
    if not keep_predicted:
        return found
    predicted = logits.argmax(1, keepdim=True)
    top = found.gather(1, predicted)
    return found.minimum(top - TIE).scatter(1, predicted, top)


STRENGTHS = (0.0, *(10 ** (k / 6) for k in range(-24, 25)))


def choose_strength(
    logits: Float[Tensor, "n class"],
    norms: Float[Tensor, "n class"],
    labels: Int64[Tensor, " n"],
    n_train: int,
    *,
    space: Space = "logit",
    keep_predicted: bool = True,
    prudent: bool = True,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[float, float]:
    r"""α and T from validation examples, by the log loss.

    For each α the T of the least loss is found. Validation data are like the training data, so they say little of what
    hedging is worth elsewhere, and often nothing against it: the prudent choice is the greatest α whose loss is above
    the least by no more than one standard error of the difference, example by example.

    Args:
        logits: z.
        norms: n.
        labels: Labels.
        n_train: N.
        space: See `hedged_logits`.
        keep_predicted: See `hedged_logits`.
        prudent: Whether to take the greatest α that is as good; else the one of the least loss.
        strengths: Values of α that are tried.

    Returns:
        α and T.
    """
    options: dict[str, Any] = {"space": space, "keep_predicted": keep_predicted}

    def losses(strength: float, temperature: float) -> Tensor:
        hedged = hedged_logits(logits, norms, n_train, strength, temperature, **options)
        return log_losses(hedged.softmax(1), labels)

    tried = []
    for strength in strengths:
        if space == "logit":  # then T divides everything, and its best value is exact
            hedged = hedged_logits(logits, norms, n_train, strength, 1.0, **options)
            temperature = best_temperature(hedged, labels)
        else:
            grid = [10 ** (k / 20) for k in range(-20, 21)]
            temperature = min(grid, key=lambda t: float(losses(strength, t).mean()))
        tried.append((strength, temperature, losses(strength, temperature)))
    best = min(tried, key=lambda found: float(found[2].mean()))
    if prudent:
        for strength, temperature, loss in sorted(tried, key=lambda found: -found[0]):
            excess = loss - best[2]
            if float(excess.mean()) <= float(excess.std()) / len(labels) ** 0.5:
                return strength, temperature
    return best[0], best[1]


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
        "papers": [IFComp.paper],
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


@dataclass(frozen=True, eq=False)
class IFCompPredictor(Predictor):
    """A classifier that hedges where labels are cheap.

    Attributes:
        fit: The fit at the Fisher's temperature.
        method: The method that made it.
        strength: α.
        temperature: T.
    """

    fit: Fit
    method: "IFComp"
    strength: float
    temperature: float

    def predict(self, examples: Any, *, progress: Progress | None = None) -> Predictions:
        return self.from_complexity(self.method.complexity(self.fit, examples, progress=progress))

    def from_complexity(self, found: Complexity) -> Predictions:
        """Probabilities for examples whose complexity is known."""
        return self.method.predictions(found, self.strength, self.temperature)

    def __repr__(self) -> str:
        return f"IFCompPredictor(strength {self.strength:.3g}, temperature {self.temperature:.3g})"


@dataclass(frozen=True, kw_only=True)
class IFComp(Calibrator):
    """Calibrate a classifier by what each label would cost it to learn.

    Args:
        temperature: τ of the gradients and of the Fisher information. 1 leaves a saturated model as it is; where τ is
            far above the spread of the logits, all labels look alike.
        fisher_temperature: Of the Fisher information alone, where it is to differ.
        damping: As for `complexity`; α takes up its scale, so that little damping, which tells inputs apart best, will
            do.
        space: "logit" or "probability".
        strength: α; chosen on validation data when left out.
        output_temperature: T; chosen with it.
        prudent: Of the strengths that validation data cannot tell from the best, take the greatest.
        keep_predicted: Leave the predicted class as it is.
        top: Examine the most probable classes only.
        curvature: How the Fisher information is fitted; "mc" or "exact" labels.
    """

    paper: ClassVar[str] = "arXiv:2406.02745"

    temperature: float = 3.0
    fisher_temperature: float | None = None
    damping: str | float | Damping = "0.001 relative"
    space: Space = "logit"
    strength: float | None = None
    output_temperature: float | None = None
    prudent: bool = True
    keep_predicted: bool = True
    top: int | None = None
    curvature: CurvatureMethod = field(default_factory=lambda: EKFAC(folds=1))

    def __post_init__(self):
        if self.space not in get_args(Space):
            raise ValueError(f"Expected the space 'logit' or 'probability'; got {self.space!r}.")
        if (self.strength is None) != (self.output_temperature is None):
            raise ValueError(
                "strength and output_temperature belong together; give both, or neither to choose them on validation "
                "data."
            )
        if self.strength is not None and self.strength < 0:
            raise ValueError(f"strength must be 0 or more; got {self.strength}. 0 hedges nowhere.")

    def soften(
        self, fit: Fit, *, folder: str | Path | None = None, progress: Progress | None = None
    ) -> Fit:
        """The fit at the Fisher's temperature: the given one where it is at it, else a new one (two passes with "mc").

        Args:
            fit: A fit of the classifier.
            folder: Where to keep the new one, so that it is made once.
            progress: Called with (done, total, note).
        """
        wanted = self.fisher_temperature or self.temperature
        kind = fit.facts["options"]["curvature"]["kind"]
        if temperature_of(fit.task) == wanted and kind != "identity":
            return fit
        options: dict[str, Any] = {"folder": folder, "progress": progress}
        return fit_at_temperature(fit, wanted, curvature=self.curvature, **options)

    def complexity(
        self, fit: Fit, examples: Any, *, progress: Progress | None = None
    ) -> Complexity:
        """Complexities at this method's temperature and damping."""
        return complexity(
            self.soften(fit, progress=progress),
            examples,
            damping=self.damping,
            temperature=self.temperature,
            top=self.top,
            progress=progress,
        )

    def calibrate(
        self, fit: Fit, validation: Any, *, progress: Progress | None = None
    ) -> IFCompPredictor:
        soft = self.soften(fit, progress=progress)
        strength, temperature = self.strength, self.output_temperature
        if strength is None or temperature is None:
            found = self.complexity(soft, validation, progress=progress)
            strength, temperature = self.choose(found)
        return IFCompPredictor(soft, self, strength, temperature)

    def choose(self, validation: Complexity) -> tuple[float, float]:
        """α and T for validation examples whose complexity is known."""
        return choose_strength(
            validation.logits,
            validation.norms,
            validation.labels,
            validation.n_train,
            space=self.space,
            keep_predicted=self.keep_predicted,
            prudent=self.prudent,
        )

    def predictions(self, found: Complexity, strength: float, temperature: float) -> Predictions:
        """Probabilities with given α and T."""
        hedged = hedged_logits(
            found.logits,
            found.norms,
            found.n_train,
            strength,
            temperature,
            space=self.space,
            keep_predicted=self.keep_predicted,
        )
        chosen = {"strength": strength, "temperature": temperature}
        return Predictions(
            probabilities=hedged.softmax(1),
            labels=found.labels,
            ids=found.ids,
            facts=found.facts | chosen,
        )
