r"""Predictive normalized maximum likelihood: by refitting, in closed form for ridge regression and a last layer.

For each label y the point (x, y) is added to the training set D and the model fitted again; the probabilities that
these models give to their own y are normalized:

$$p_{\mathrm{NML}}(y \mid x) = \frac{p_{\theta(D + (x, y))}(y \mid x)}{Z(x)}, \qquad
Z(x) = \sum_{y'} p_{\theta(D + (x, y'))}(y' \mid x).$$

The regret log Z is the least that any predictor must lose, in the worst case over y, to one that saw y. It runs from 0,
where the data leave no doubt, to log C, where each of C labels is as easily learned.

References:
    Fogel and Feder (2018), "Universal Supervised Learning for Individual Data", arXiv:1812.09520; Bibas, Feder and
    Hassner (2021), "Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution Detection",
    arXiv:2110.09246.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap

from headwater.calibrate.base import Calibrator, Predictions, Predictor
from headwater.core.capture import Progress
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.forward import LastLayer, class_logits, last_layer
from headwater.training.loop import train
from headwater.training.optimizers import Optimizer


def genie_probabilities(
    model: nn.Module,
    x: Shaped[Tensor, "train ..."],
    y: Shaped[Tensor, " train"],
    queries: Shaped[Tensor, "n ..."],
    n_classes: int,
    optimizer: Optimizer,
    *,
    at_once: int = 50,
    progress: Progress | None = None,
) -> Float[Tensor, "n class"]:
    r"""$p_{\theta(D + (x, y))}(y \mid x)$ of each query and label: every one a model trained on, with the point added.

    Training starts from the model's weights and runs as long as the optimizer says, one pass over all examples a step
    where its `batch_size` is one more than there are. This is the truth that approximations are held to; it takes n
    times C trainings.

    Args:
        model: The trained model, without running statistics or dropout.
        x: Training inputs.
        y: Training labels.
        queries: Inputs that are added, one at a time.
        n_classes: Number of labels that are tried.
        optimizer: Rule and length of the further training.
        at_once: Models trained side by side.
        progress: Called with (done, total, note).
    """
    inputs = torch.cat([x, queries.repeat_interleave(n_classes, dim=0)])
    labels = torch.cat([y, torch.arange(n_classes).repeat(len(queries)).to(y)])
    n, total = len(x), len(queries) * n_classes
    base, found = torch.arange(n), []
    for start in range(0, total, at_once):
        added = torch.arange(start, min(start + at_once, total))
        subsets = torch.stack([torch.cat([base, n + k[None]]) for k in added])
        trained = train(
            [model] * len(added),
            inputs,
            labels,
            subsets=subsets,
            seeds=[0] * len(added),
            optimizer=optimizer,
        )
        with torch.no_grad():
            outputs = vmap(lambda theta, point: functional_call(model, theta, (point[None],))[0])(
                trained, inputs[n + added]
            )
        p = outputs.double().softmax(1)
        found.append(p.gather(1, labels[n + added][:, None].long()).squeeze(1))
        if progress is not None:
            progress(int(added[-1]) + 1, total, "refits")
    return torch.cat(found).view(len(queries), n_classes)


def regret(genie: Float[Tensor, "n class"]) -> Float[Tensor, " n"]:
    """Log Z: the logarithm of the sum of what the models that saw each label give to it (nats).

    Example:
        >>> regret(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == [0.0, torch.tensor(2.0).log().item()]
        True
    """
    return genie.sum(-1).log()


def ridge_normalizer(
    features: Float[Tensor, "train feature"], queries: Float[Tensor, "n feature"], ridge: float
) -> Float[Tensor, " n"]:
    r"""Z of linear regression with unit noise and a ridge: $1 + x^\top (X^\top X + \lambda I)^{-1} x$.

    Adding (x, y) leaves the residual $(y - \hat y) / (1 + h)$ with $h = x^\top (X^\top X + \lambda I)^{-1} x$, so the
    densities of all y integrate to 1 + h. To first order the regret is h, the expected self-influence.

    Args:
        features: Training inputs.
        queries: Inputs asked about.
        ridge: λ, the penalty beside the sum of squares.
    """
    x = features.double()
    system = x.mT @ x
    system.diagonal().add_(ridge)
    q = queries.double()
    return 1 + (q * torch.linalg.solve(system, q.mT).mT).sum(1)


def last_layer_genies(
    probabilities: Float[Tensor, "n class"], leverage: Float[Tensor, " n"]
) -> Float[Tensor, "n class"]:
    r"""$p_c / (p_c + p_c^{s} (1 - p_c))$ with $s = x^\top P x / (1 + x^\top P x)$: the last layer after seeing (x, c).

    Example:
        >>> last_layer_genies(torch.tensor([[0.5, 0.5]]), torch.tensor([0.0])).tolist()
        [[0.5, 0.5]]
    """
    p = probabilities.double().clamp(1e-300, 1)
    s = (leverage / (1 + leverage))[:, None]
    return p / (p + p**s * (1 - p))


@dataclass(frozen=True, eq=False)
class LastLayerPNMLPredictor(Predictor):
    """A classifier normalized over the labels its last layer might have seen.

    Attributes:
        fit: A fit of the classifier.
        layer: Its last layer.
        inverse: P, the damped inverse of the training features' second moments.
        method: What it was made by.
    """

    fit: Fit
    layer: LastLayer
    inverse: Float[Tensor, "feature feature"]
    method: "LastLayerPNML"

    def genies(self, examples: Any) -> Float[Tensor, "n class"]:
        """What the last layer gives to each label after seeing it; their sum's logarithm is the regret."""
        data, fit = as_examples(examples), self.fit
        batches = fit.batches(data)
        logits, _ = class_logits(fit.model, fit.task, data, batches=batches)
        x = self.method.features(self.layer, fit, data)
        return last_layer_genies(logits.softmax(1), ((x @ self.inverse) * x).sum(1))

    def predict(self, examples: Any, *, progress: Progress | None = None) -> Predictions:
        data, fit = as_examples(examples), self.fit
        genies = self.genies(data)
        _, labels = class_logits(fit.model, fit.task, data, batches=fit.batches(data))
        return Predictions(
            probabilities=genies / genies.sum(1, keepdim=True),
            labels=labels,
            ids=data.ids,
            facts={"papers": [self.method.paper]},
        )


@dataclass(frozen=True, kw_only=True)
class LastLayerPNML(Calibrator):
    """pNML of the last layer alone, in closed form; nothing is chosen on validation data.

    Args:
        normalize: Scale features to length one, as the authors do.
        ridge: Added to the features' second moments, relative to their mean diagonal.
    """

    paper: ClassVar[str] = "arXiv:2110.09246"

    normalize: bool = True
    ridge: float = 1e-6

    def calibrate(
        self, fit: Fit, validation: Any = None, *, progress: Progress | None = None
    ) -> LastLayerPNMLPredictor:
        layer = last_layer(fit.model, fit.task, fit.train)
        x = self.features(layer, fit, fit.train)
        moment = x.mT @ x
        moment.diagonal().add_(self.ridge * float(moment.diagonal().mean()))
        return LastLayerPNMLPredictor(fit, layer, torch.linalg.inv(moment), self)

    def features(self, layer: LastLayer, fit: Fit, examples: Any) -> Float[Tensor, "n feature"]:
        """What the last layer reads, without the bias's one."""
        x = layer.features(fit.model, fit.task, examples, batches=fit.batches(examples))
        x = x[:, : x.shape[1] - layer.has_bias]
        return x / x.norm(dim=1, keepdim=True).clamp(min=1e-30) if self.normalize else x
