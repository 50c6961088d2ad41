r"""Function-space distance: how far a network's outputs have moved, over data that are not kept.

Dhawan, Huang, Bae and Grosse (2023), "Efficient Parametric Approximations of Neural Network Function Space Distance",
arXiv:2302.03519.

$D(\theta_0, \theta_1) = E_x\, \varrho\big(f(x; \theta_0), f(x; \theta_1)\big)$ over the anchor's data, of which only
moments of the inputs and one number a unit are kept: how often its gate is open. With gates drawn instead of computed
both networks are linear in their inputs (`headwater.numerics.gated`).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from headwater.core.capture import Capture, Progress, evaluation_mode, plan_batches
from headwater.core.curvature import Curvature, CurvatureMethod, Dual, FitContext
from headwater.core.examples import Examples, TensorExamples, as_examples, to_device
from headwater.core.fingerprint import fingerprint_model
from headwater.core.fit import Fit
from headwater.core.function_space.base import (
    Distance,
    Theta,
    check_names,
    named_tensors,
)
from headwater.core.function_space.chain import expected_distance, stages
from headwater.core.function_space.gates import Gate, Gated, GateRecorder, Gates, flipped
from headwater.core.function_space.statistics import (
    AnchorStatistics,
    collect_statistics,
    statistics_of,
)
from headwater.core.prediction import Categorical, Gaussian, Prediction
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.task import FunctionTask, Regression, Task
from headwater.numerics.gated import DISTANCES, covariance_root

Method = Literal["bgln-s", "bgln-d", "bgln-d-released", "linearized", "exact", "tangent"]
Rho = Literal["squared", "softmax", "kl"]
KIND = "function-space-distance"
MOST_FLIPS = 0.5  # share of gates beyond which the estimate is not trusted


@dataclass(frozen=True)
class Draw:
    """Inputs, the gates that hold both networks, and the anchor's outputs.

    Attributes:
        x: Inputs.
        gates: What holds activations, or None where they act as they are.
        before: Outputs at the anchor.
    """

    x: Float[Tensor, "sample *input"]
    gates: Gates | None
    before: Float[Tensor, "sample *dim"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FunctionSpaceDistance(Distance):
    """Distance of a network's outputs from those at an anchor, from summary statistics of the anchor's data.

    Args:
        model: The network at the anchor, which is copied.
        statistics: Of its data.
        method: "bgln-s" draws inputs and gates; "bgln-d" carries moments through a chain of layers, for the squared
            distance of outputs, and "bgln-d-released" does it as the paper's code does; "linearized" computes the
            gates at the anchor from drawn or kept inputs. For comparison: "exact" runs both networks on such inputs,
            "tangent" linearizes the network in its parameters.
        rho: What is averaged: "kl" (before ‖ after, nats), "softmax" (half the squared distance of probabilities) or
            "squared" (of outputs, also half).
        n_samples: Inputs that are drawn, divided among the groups by their shares.
        jitter: Added to the diagonal of covariances, in units of its mean, before inputs are drawn.
        outputs: Which outputs count, such as those of one head; all when left out.
        inputs: Inputs that are kept, in place of drawn ones.
        smooth: Take GELU, SiLU and the like for gates of their mean slope, an extension of the paper.
        seed: Seed of the draws.

    Raises:
        GateError: The network is not affine once its gates are held.
        ValueError: Options do not go together, or statistics are of another network.

    Example:
        >>> from headwater.core.task import Classification
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> data = (torch.randn(20, 3), torch.randint(2, (20,)))
        >>> distance = function_space_distance(net, data, Classification())
        >>> float(distance(net))
        0.0
    """

    paper: ClassVar[str] = "arXiv:2302.03519"

    model: nn.Module
    statistics: AnchorStatistics
    method: Method = "bgln-s"
    rho: Rho = "kl"
    n_samples: int = 200
    jitter: float = 1e-4
    outputs: tuple[int, ...] | None = None
    inputs: Tensor | None = None
    smooth: bool = False
    seed: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    _gated: Gated = field(init=False)
    _kept: dict[str, Any] = field(init=False)

    def __post_init__(self):
        if self.method not in get_args(Method) or self.rho not in DISTANCES:
            raise ValueError(
                f"Expected a method among {', '.join(get_args(Method))} and rho among {', '.join(DISTANCES)}; got "
                f"{self.method!r} and {self.rho!r}."
            )
        if self.n_samples < len(self.statistics.counts):
            raise ValueError(
                f"n_samples must be at least 1 for each of {len(self.statistics.counts)} groups; got {self.n_samples}."
            )
        if not self.jitter >= 0:
            raise ValueError(f"jitter must not be negative; got {self.jitter}.")
        if self.is_deterministic and (self.rho != "squared" or self.inputs is not None):
            raise ValueError(
                f"{self.method!r} has the squared distance of outputs from moments; pass rho='squared' and no inputs, "
                "or choose method='bgln-s'."
            )
        object.__setattr__(self, "_gated", Gated(self.model, smooth=self.smooth))
        object.__setattr__(self, "model", self._gated.model)
        object.__setattr__(self, "_kept", {})
        self._check()
        if self.is_deterministic:
            self._kept["chain"] = stages(self._gated, self.statistics)

    def _probe(self, n: int) -> Tensor:
        """Inputs of about the right size, for tests of the network: the groups' means plus independent noise."""
        statistics, generator = self.statistics.diagonal(), torch.Generator().manual_seed(self.seed)
        group = torch.arange(n) % len(statistics.counts)
        deviation = statistics.covariance.sqrt()
        deviation = deviation + 1e-3 * (1 + deviation.mean())
        z = torch.randn(n, deviation.shape[1], generator=generator, dtype=torch.float64)
        x = statistics.mean[group] + deviation[group] * z
        return x.reshape(n, *statistics.input_shape).to(self._like)

    def _check(self) -> None:
        """Hold the network to what the method assumes, and the statistics to the network."""
        with torch.no_grad():
            probe = self._probe(16)
            _, gates = self._gated.with_pattern({}, probe)
            self._gated.prove(probe)
        units = {name: tuple(g.slope.shape[1:]) for name, g in gates.items()}
        known = {name: tuple(r.shape[1:]) for name, r in self.statistics.rates.items()}
        if units != known:
            differ = sorted(units.items() ^ known.items())[0][0]
            raise ValueError(
                f"Gate rates are not of this network: {differ!r} has units {units.get(differ)} and rates "
                f"{known.get(differ)}. Collect the statistics with the same model."
            )

    @property
    def is_deterministic(self) -> bool:
        """Whether moments are carried through and nothing is drawn."""
        return self.method.startswith("bgln-d")

    @property
    def anchor(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    @property
    def n_numbers(self) -> int:
        kept = 0 if self.inputs is None else self.inputs.numel()
        if self.method in ("bgln-s", "bgln-d", "bgln-d-released"):
            rates = sum(r.numel() for r in self.statistics.rates.values())
            return self.statistics.n_numbers if self.inputs is None else kept + rates
        if self.inputs is not None:
            return kept
        return self.statistics.n_numbers - sum(r.numel() for r in self.statistics.rates.values())

    def __call__(self, theta: Theta, *, draw: int = 0) -> Float[Tensor, ""]:
        given = named_tensors(theta)
        check_names(given, self.anchor)
        if self.is_deterministic:
            return self._expected(given)
        drawn = self.drawn(draw)
        before = drawn.before
        if self.method == "tangent":
            moved = {k: v - self.anchor[k] for k, v in given.items() if v.is_floating_point()}
            start = {k: self.anchor[k] for k in moved}
            after = before + jvp(lambda t: self._outputs(t, drawn), (start,), (moved,))[1]
        else:
            after = self._outputs(given, drawn)
        return DISTANCES[self.rho](before, after).mean()

    def _outputs(self, parameters: Mapping[str, Tensor], drawn: Draw) -> Tensor:
        return self._chosen(self._gated(parameters, drawn.x, drawn.gates))

    def _chosen(self, outputs: Tensor) -> Tensor:
        outputs = outputs.flatten(1)
        return outputs if self.outputs is None else outputs[:, list(self.outputs)]

    def drawn(self, draw: int = 0) -> Draw:
        """Inputs and gates of a number, the same each time; the last are kept."""
        if self._kept.get("number") != draw:
            with torch.no_grad():
                self._kept.update(number=draw, draw=self._draw(draw))
        return self._kept["draw"]

    def _draw(self, draw: int) -> Draw:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + draw)
        x = self._gaussian(generator) if self.inputs is None else self.inputs.to(self._like)
        gates: Gates | None = None
        if self.method == "bgln-s":
            group = torch.arange(len(x)) if self.inputs is not None else self._groups()
            if self.inputs is not None:
                group = torch.multinomial(
                    self.statistics.shares, len(x), replacement=True, generator=generator
                )
            gates = {}
            for name, rate in self.statistics.rates.items():
                rate = rate[group]
                if self._is_random(name):
                    rate = torch.bernoulli(rate.clamp(0, 1), generator=generator)
                gates[name] = Gate(rate.to(self._like))
        elif self.method == "linearized":
            before, gates = self._gated.with_pattern({}, x)
            return Draw(x, gates, self._chosen(before))
        return Draw(x, gates, self._chosen(self._gated({}, x, gates)))

    def _is_random(self, name: str) -> bool:
        return isinstance(self._gated.activation(name), nn.ReLU)

    @property
    def _like(self) -> Tensor:
        return next(self.model.parameters())

    def _groups(self) -> Tensor:
        """The group of each drawn input: by shares, at least one of each."""
        n, shares = self.n_samples, self.statistics.shares
        counts = (shares * (n - len(shares))).floor().long() + 1
        short = shares * n - counts
        for k in short.argsort(descending=True)[: n - int(counts.sum())].tolist():
            counts[k] += 1
        return torch.repeat_interleave(torch.arange(len(shares)), counts)

    def _gaussian(self, generator: torch.Generator) -> Tensor:
        """Inputs drawn from the groups' Gaussians."""
        if "roots" not in self._kept:
            covariance = self.statistics.covariance
            self._kept["roots"] = [covariance_root(c, jitter=self.jitter) for c in covariance]
        group = self._groups()
        z = torch.randn(len(group), self.statistics.mean.shape[1], generator=generator).double()
        x = torch.empty_like(z)
        for k, root in enumerate(self._kept["roots"]):
            own = z[group == k]
            own = own * root if root.ndim == 1 else own @ root.mT
            x[group == k] = self.statistics.mean[k] + own
        return x.reshape(-1, *self.statistics.input_shape).to(self._like)

    def _expected(self, given: Mapping[str, Tensor]) -> Tensor:
        return expected_distance(
            self._kept["chain"],
            self.statistics,
            given,
            released=self.method == "bgln-d-released",
            outputs=self.outputs,
        )

    def flips(self, theta: Theta, probe: Tensor | None = None) -> float:
        """Share of the gates that are on another side than at the anchor; the estimate is for small shares.

        Args:
            theta: Where.
            probe: Inputs of the anchor's kind; inputs drawn from its statistics when left out.
        """
        given = named_tensors(theta)
        check_names(given, self.anchor)
        with torch.no_grad():
            x = self._probe(256) if probe is None else probe.to(self._like)
            sides = [self._gated.with_pattern(t, x)[1] for t in ({}, given)]
        differ, total = flipped(*sides)
        return differ / total if total else 0.0

    def check(self, theta: Theta, probe: Tensor | None = None) -> float:
        """The share of gates that flipped, with a warning where most have: then the distance is not to be trusted."""
        share = self.flips(theta, probe)
        if share > MOST_FLIPS:
            warnings.warn(
                f"{share:.0%} of the gates are on another side than at the anchor. The distance holds them where they "
                "were; this far away its numbers are no estimate. Anchor it anew, nearer by.",
                stacklevel=2,
            )
        return share

    def curvature(self, fit: Fit, method: CurvatureMethod | None = None) -> Curvature:
        """The distance's Gauss–Newton matrix at the anchor, over a fit's layers, in any form that a curvature has.

        Args:
            fit: A fit of the network at the anchor, for its followed layers.
            method: The form; the exact dual one when left out.

        Raises:
            ValueError: The distance draws nothing, is no negative log-likelihood, or has another anchor.
        """
        if self.is_deterministic or self.rho == "softmax":
            raise ValueError(
                "A curvature is gathered over drawn inputs with rho='kl' or 'squared'; this distance has "
                f"method={self.method!r} and rho={self.rho!r}. `gauss_newton_product` works for all."
            )
        if fit.made_from["model"] != self.facts["made_from"]["model"]:
            raise ValueError(
                "The fit is of another model than the distance's anchor; fit the anchor."
            )
        drawn = self.drawn()
        gates = drawn.gates or {}
        held = {f"slope:{n}": g.slope for n, g in gates.items()}
        held |= {f"offset:{n}": g.offset for n, g in gates.items() if g.offset is not None}
        names, labels = list(held), torch.zeros(len(drawn.x), dtype=torch.int64)

        def predict(model: nn.Module, batch: Any) -> Prediction:
            x, labels, *values = batch
            given = dict(zip(names, values, strict=True))
            replayed = {n: Gate(given[f"slope:{n}"], given.get(f"offset:{n}")) for n in gates}
            with self._gated.holding(replayed or None):
                outputs = self._chosen(model(x))[:, None]
            if self.rho == "kl":
                return Categorical(outputs, labels[:, None])
            mask = torch.ones_like(outputs[..., 0], dtype=torch.bool)
            return Gaussian(outputs, torch.zeros_like(outputs), mask)

        examples = TensorExamples(drawn.x, labels, *held.values())
        task = FunctionTask(predict_with=predict, label="function-space distance")
        method = Dual() if method is None else method
        batches = plan_batches(examples, batch_size=fit.batch_size, folds=method.folds)
        capture = Capture(self.model, task, fit.followed)
        return method.fit(FitContext(capture, examples, batches))

    def in_place_of_data(self, fit: Fit, method: CurvatureMethod | None = None) -> Fit:
        """The same fit with the distance's curvature instead of its data's: influence without the data's curvature."""
        curvature = self.curvature(fit, method)
        kind = (method or Dual()).kind
        told = {"kind": kind, "of": KIND, "method": self.method, "n_samples": self.n_samples}
        facts = fit.facts | {"options": fit.facts["options"] | {"curvature": told}}
        facts.pop("chosen_damping", None)
        return replace(fit, curvature=curvature, facts=facts)

    def save(self, folder: str | Path) -> None:
        """Write the statistics as an artifact; the anchor itself is known by its fingerprint."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        facts = self.facts | {"options": options, "statistics": self.statistics.facts}
        with ArtifactWriter(folder, KIND, facts, self.facts["made_from"]) as writer:
            for name, tensor in self.statistics.tensors().items():
                writer.tensor(name, tensor)
            if self.inputs is not None:
                writer.tensor("inputs", self.inputs)

    def __repr__(self) -> str:
        kept = f"{self.n_numbers:,} numbers"
        passes = self.statistics.passes
        return (
            f"FunctionSpaceDistance({self.method}, {self.rho}, of {type(self.model).__name__}, "
            f"{int(self.statistics.counts.sum()):,} examples in {len(self.statistics.groups)} groups, {kept}, "
            f"{passes:g} forward passes beyond the fit)"
        )


_OPTIONS = ("method", "rho", "n_samples", "jitter", "outputs", "smooth", "seed")


def load_distance(folder: str | Path, model: nn.Module, **options: Any) -> FunctionSpaceDistance:
    """Read a saved distance; the model is the anchor.

    Args:
        folder: Where it was saved.
        model: The network at the anchor.
        options: Those to change, such as `method` or `n_samples`.

    Raises:
        ArtifactMismatch: The model is another one.
    """
    artifact = Artifact.open(folder, KIND, verify=True)
    artifact.require(model=fingerprint_model(model))
    facts, tensors = dict(artifact.facts), dict(artifact.tensors())
    saved = facts.pop("options")
    saved["outputs"] = None if saved["outputs"] is None else tuple(saved["outputs"])
    statistics = AnchorStatistics.from_tensors(tensors, facts.pop("statistics"))
    given = saved | {"inputs": tensors.get("inputs"), "facts": facts} | options
    return FunctionSpaceDistance(model=model, statistics=statistics, **given)


def function_space_distance(
    anchor: Fit | nn.Module,
    train: Any = None,
    task: Task | None = None,
    *,
    method: Method = "bgln-s",
    rho: Rho | None = None,
    by: str | Sequence[Any] | None = None,
    diagonal: bool = False,
    keep: int = 0,
    n_samples: int = 200,
    smooth: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> FunctionSpaceDistance:
    """A function-space distance anchored at a model, from its data; these are not needed afterwards.

    Args:
        anchor: A fit, or the model itself with its data and task.
        train: The data; a fit's own when left out.
        task: The task; a fit's own when left out.
        method: How networks are compared; see `FunctionSpaceDistance`.
        rho: What is averaged; when left out "squared" for regression and where moments are carried, else "kl".
        by: Groups of the data with statistics of their own, such as classes: a metadata column, or one value an
            example.
        diagonal: Keep variances of the inputs alone, for inputs of many dimensions.
        keep: Keep so many inputs themselves and draw none.
        n_samples: Inputs that are drawn.
        smooth: Take GELU, SiLU and the like for gates of their mean slope, an extension of the paper.
        seed: Seed of the draws, and of which inputs are kept.
        progress: Called with (done, total, note).
        options: Further fields of `FunctionSpaceDistance`.

    Raises:
        GateError: The network is not affine once its gates are held.
    """
    collecting: dict[str, Any] = {
        "by": by,
        "diagonal": diagonal,
        "smooth": smooth,
        "progress": progress,
    }
    if isinstance(anchor, Fit) and train is None and task is None:
        model, examples, task = anchor.model, anchor.train, anchor.task
        anchor.capture()  # refuses weights that were changed since
        statistics = statistics_of(anchor, **collecting)
        made_from = {k: anchor.made_from[k] for k in ("model", "data")}
    elif isinstance(anchor, nn.Module) and train is not None and task is not None:
        model, examples = anchor, as_examples(train)
        statistics = collect_statistics(model, task, examples, **collecting)
        made_from = {"model": fingerprint_model(model), "data": examples.fingerprint()}
    else:
        raise ValueError("Expected a fit alone, or a model with its training data and its task.")
    if rho is None:
        plain = isinstance(task, Regression) or method.startswith("bgln-d")
        rho = "squared" if plain else "kl"
    options.setdefault("outputs", getattr(task, "outputs", None))
    return FunctionSpaceDistance(
        model=model,
        statistics=statistics,
        method=method,
        rho=rho,
        n_samples=n_samples,
        smooth=smooth,
        seed=seed,
        inputs=_some_inputs(model, task, examples, keep, seed) if keep else None,
        facts={"made_from": made_from},
        **options,
    )


def _some_inputs(
    model: nn.Module, task: Task, examples: Examples, n: int, seed: int
) -> Float[Tensor, "n *input"]:
    """What the model reads for examples drawn at random."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    recorder = GateRecorder(model, smooth=True)
    batch = examples.batch(order[:n].tolist())
    with recorder.watching(), evaluation_mode(model), torch.no_grad():
        task.predict(model, to_device(batch, next(model.parameters()).device))
        assert recorder.inputs is not None
        return recorder.inputs.clone()
