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

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headwater.calibrate.base import Calibrator, Predictions, Predictor
from headwater.calibrate.boltzmann import Complexity, complexity
from headwater.calibrate.temperature import LOWEST, best_temperature
from headwater.core.capture import Progress
from headwater.core.curvature import EKFAC, CurvatureMethod
from headwater.core.damping import Damping
from headwater.core.fit import Fit
from headwater.core.tempering import fit_at_temperature, temperature_of
from headwater.numerics.calibration import log_losses

Space = Literal["logit", "probability"]
TIE = 1e-6  # how far a class stays below the predicted one that it would have risen above


def hedged_logits(
    logits: Float[Tensor, "n class"],
    norms: Float[Tensor, "n class"],
    n_train: int,
    strength: float,
    temperature: float,
    *,
    space: Space = "probability",
    keep_predicted: bool = True,
) -> Float[Tensor, "n class"]:
    r"""Logits of the predictive distribution: $(z + \alpha n / N) / T$, or $z / T + \log(1 + \alpha n / N)$.

    Args:
        logits: z.
        norms: n.
        n_train: N.
        strength: α.
        temperature: T.
        space: "logit" for the first, "probability" for the second.
        keep_predicted: Let no class rise above the one that was predicted.

    Example:
        >>> z, n = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 300.0]])
        >>> hedged_logits(z, n, 100, 1.0, 2.0, space="logit").tolist()
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
    space: Space = "probability",
    keep_predicted: bool = True,
    prudent: bool = False,
    sharpen: bool = False,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[float, float]:
    r"""α and T from validation examples, by the log loss.

    For each α the T of the least loss is found. Validation data are like the training data, and say little of what
    hedging is worth elsewhere. The prudent choice is therefore the greatest α whose loss is above the least by no more
    than one standard error of the difference, example by example; a model that needs no hedging pays for it.

    Args:
        logits: z.
        norms: n.
        labels: Labels.
        n_train: N.
        space: See `hedged_logits`.
        keep_predicted: See `hedged_logits`.
        prudent: Whether to take the greatest α that is as good; else the one of the least loss.
        sharpen: Whether T may fall below 1.
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
            temperature = best_temperature(hedged, labels, lowest=LOWEST if sharpen else 1.0)
        else:
            grid = [10 ** (k / 20) for k in range(-20 if sharpen else 0, 21)]
            temperature = min(grid, key=lambda t: float(losses(strength, t).mean()))
        tried.append((strength, temperature, losses(strength, temperature)))
    best = min(tried, key=lambda found: float(found[2].mean()))
    if prudent:
        for strength, temperature, loss in sorted(tried, key=lambda found: -found[0]):
            excess = loss - best[2]
            if float(excess.mean()) <= float(excess.std()) / len(labels) ** 0.5:
                return strength, temperature
    return best[0], best[1]


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
        damping: As for `complexity`; α takes up its scale.
        space: "probability", where n enters by its logarithm, or "logit", which hedges without bound far from the
            training data.
        strength: α; chosen on validation data when left out.
        output_temperature: T; chosen with it.
        prudent: Of the strengths that validation data cannot tell from the best, take the greatest.
        sharpen: Let T fall below 1, for a model that validation data show to be too modest. Such data are like the
            training data; elsewhere it is seldom too modest.
        keep_predicted: Leave the predicted class as it is.
        top: Examine the most probable classes only.
        curvature: How the Fisher information is fitted; "mc" or "exact" labels.
    """

    paper: ClassVar[str] = "arXiv:2406.02745"

    temperature: float = 3.0
    fisher_temperature: float | None = None
    damping: str | float | Damping = "0.01 relative"
    space: Space = "probability"
    strength: float | None = None
    output_temperature: float | None = None
    prudent: bool = False
    sharpen: bool = False
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
            sharpen=self.sharpen,
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
