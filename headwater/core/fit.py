"""The fit: a model's curvature over its training data, made once and used for many questions."""

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from headwater.core import provenance
from headwater.core.capture import BatchPlan, Capture, Progress, plan_batches
from headwater.core.checkpoint import Checkpoint
from headwater.core.curvature import (
    Curvature,
    CurvatureMethod,
    DenseCurvature,
    DualCurvature,
    FitContext,
    Identity,
    restore,
)
from headwater.core.curvature.choice import choose_curvature
from headwater.core.damping import Damping, evidence, parse_damping
from headwater.core.distributed import current
from headwater.core.doctor import check_classes, check_loss
from headwater.core.examples import Examples, as_examples, to_device
from headwater.core.files import ArtifactMismatch, ArtifactMissing
from headwater.core.fingerprint import fingerprint_json, fingerprint_model
from headwater.core.follow import Followed, follow
from headwater.core.layers import Layer, Use
from headwater.core.locks import FolderLock
from headwater.core.sharding import whole
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.task import Task


@dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    """A model with its training data, followed layers and curvature.

    Attributes:
        model: The model.
        task: What it was trained for.
        train: The training data.
        followed: The followed layers and what is left out.
        curvature: The fitted curvature of the mean training loss.
        facts: Options, costs and the training run's record.
        batch_size: Most examples in a batch.
        batch_tokens: Most positions in a batch, for data with lengths.
    """

    model: nn.Module
    task: Task
    train: Examples
    followed: Followed
    curvature: Curvature
    facts: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 256
    batch_tokens: int = 4096
    _stamps: dict[str, tuple[int, int]] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_stamps", _stamps(self.model))

    @property
    def made_from(self) -> dict[str, str]:
        return self.facts["made_from"]

    def capture(self) -> Capture:
        """The engine over the followed layers.

        Raises:
            ArtifactMismatch: The model's weights were changed since the fit was made.
        """
        now = _stamps(self.model)
        changed = [name for name, stamp in now.items() if self._stamps.get(name) != stamp]
        if changed and fingerprint_model(self.model) != self.made_from["model"]:
            raise ArtifactMismatch(
                f"The weights of the model were changed after the fit was made ({changed[0]} among others); fit again, "
                "or fit a copy of the model and train the other."
            )
        object.__setattr__(self, "_stamps", now)
        return Capture(self.model, self.task, self.followed)

    @property
    def n_rows(self) -> int:
        """Positions of the training data, all examples together."""
        return sum(self.train.lengths) if self.train.lengths else len(self.train)

    def batches(self, examples: Examples, *, folds: int = 1) -> list[BatchPlan]:
        return plan_batches(
            examples, batch_size=self.batch_size, batch_tokens=self.batch_tokens, folds=folds
        )

    def damping(self, choice: str | float | Damping = "auto", *, exact: bool = False) -> Damping:
        """The damping behind a choice.

        Args:
            choice: A number (absolute), "0.1 relative", "weight_decay" (the training run's), "horizon" (that plus one
                over its horizon), "evidence" (the value under which the trained parameters are most probable), or
                "auto": what was chosen for this fit (`headwater.trace.damping_choice`); else for a run of gradient
                descent the recorded weight decay, with the horizon where the curvature is exact; else the evidence.
            exact: Whether the exact matrix is inverted, whatever the fit holds, as conjugate gradients do.

        Raises:
            ValueError: The run's weight decay is asked for and not known.
        """
        parsed = parse_damping(choice)
        if isinstance(parsed, Damping):
            return parsed
        if parsed == "auto" and (known := self.facts.get("chosen_damping")):
            return Damping(**known)
        decay = self.facts.get("weight_decay")
        # AdamW's decay acts on scaled steps and is no ridge penalty on the loss, so "auto" passes it by.
        ridge = decay and not self.facts.get("adaptive", False)
        horizon = None if self.facts.get("adaptive", False) else self.facts.get("horizon")
        # A run stopped after a horizon h answers flat directions as if they were damped by 1/h. The exact curvature
        # has many such directions; the Kronecker form blurs its spectrum and has few.
        exact = exact or isinstance(self.curvature, DualCurvature | DenseCurvature)
        if horizon and (parsed == "horizon" or (parsed == "auto" and exact)):
            source = "weight decay of the training run plus one over its horizon"
            return Damping(float(decay or 0) + 1 / float(horizon), source=source)
        if parsed == "weight_decay" or (parsed == "auto" and ridge):
            if not decay:
                raise ValueError(
                    "The training run's weight decay is not recorded; pass weight_decay=… to headwater.fit, or "
                    "choose damping='auto' or a number."
                )
            return Damping(float(decay), source="weight decay of the training run")
        if parsed == "horizon" and not horizon:
            raise ValueError(
                "The training run's horizon is not recorded; pass horizon=… (the sum of its learning rates over one "
                "minus the momentum) to headwater.fit, or choose damping='auto' or a number."
            )
        n = len(self.train)
        value = evidence(self.curvature.spectra().values(), n=n, distance=moved(self))
        return Damping(value, source="evidence of the trained parameters")

    def damping_ratio(self, damping: Damping) -> float:
        """Damping over the mean eigenvalue: the number that decides quality more than the method does."""
        mean = self.curvature.mean_eigenvalue
        return damping.absolute(mean) / max(mean, 1e-30)

    def save(self, folder: str | Path) -> None:
        """Write the fit as an artifact."""
        body = {
            "layers": [vars(x) | {"uses": [vars(u) for u in x.uses]} for x in self.followed.layers],
            "left_out": [vars(x) for x in self.followed.left_out],
            "tied": self.followed.tied,
            "reused": self.followed.reused,
            "curvature": {"kind": self.curvature.kind, "facts": self.curvature.facts},
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
            "n_train": len(self.train),
            "fit": self.facts,
        }
        with ArtifactWriter(folder, kind="fit", facts=body, made_from=self.made_from) as writer:
            for name, tensor in self.curvature.tensors().items():
                writer.tensor(name, tensor)

    def __repr__(self) -> str:
        n = sum(layer.numel for layer in self.followed)
        return (
            f"Fit({self.facts['options']['curvature']['kind']} curvature of {type(self.model).__name__}, "
            f"{len(self.followed)} layers, {n:,} parameters = {100 * self.followed.coverage:.1f} % of the model, "
            f"{len(self.train):,} training examples)"
        )


def _stamps(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Where each weight is, and how often it has been written in place: what changes when a model is trained on."""
    return {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}


_VERIFIED = 2e9  # bytes up to which every checksum is looked at on loading: about four seconds


def _size(folder: str | Path) -> int:
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


def load(folder: str | Path, model: nn.Module, train: Any, task: Task) -> Fit:
    """Read a saved fit, refusing one that was made from another model, other data or another task.

    Raises:
        ArtifactMismatch: The fit does not match; the message names what differs.
    """
    from headwater.core.follow import LeftOut

    examples = as_examples(train)
    artifact = Artifact.open(folder, kind="fit", verify=_size(folder) <= _VERIFIED)
    artifact.require(model=fingerprint_model(model), data=examples.fingerprint(), task=task.name)
    body = artifact.facts
    layers = tuple(
        Layer(
            **{
                **x,
                "uses": tuple(Use(**u) for u in x["uses"]),
                "shape": tuple(x["shape"]),
                "parameters": tuple(x["parameters"]),
                "shapes": tuple(tuple(s) for s in x["shapes"]),
            }
        )
        for x in body["layers"]
    )
    followed = Followed(
        layers,
        tuple(LeftOut(**x) for x in body["left_out"]),
        tuple(tuple(t) for t in body["tied"]),
        tuple((n, k) for n, k in body["reused"]),
    )
    curvature = restore(
        body["curvature"]["kind"], dict(artifact.tensors()), body["curvature"]["facts"]
    )
    return Fit(
        model=model,
        task=task,
        train=examples,
        followed=followed,
        curvature=curvature,
        facts=body["fit"],
        batch_size=body["batch_size"],
        batch_tokens=body["batch_tokens"],
    )


def fit(
    model: nn.Module,
    train: Any,
    task: Task,
    *,
    curvature: CurvatureMethod | Literal["auto"] | str = "auto",
    layers: str | Sequence[str] = "trainable",
    skip: Sequence[str] = (),
    folder: str | Path | None = None,
    weight_decay: float | None = None,
    adaptive: bool = False,
    distance: float | None = None,
    horizon: float | None = None,
    batch_size: int = 256,
    batch_tokens: int = 4096,
    check: bool = True,
    progress: Progress | None = None,
) -> Fit:
    """Fit the curvature of a model over its training data.

    Inside a process group (`torchrun`) the ranks share the work, every rank returns the whole fit, and the first one
    writes the folder, which all must see.

    Args:
        model: The trained model.
        train: Its training data: Examples, a tuple of tensors, or a map-style dataset.
        task: What it was trained for.
        curvature: A curvature such as `EKFAC()`, its name, or "auto": the exact dual form where its rows fit, else
            EK-FAC.
        layers: Which parameters to follow; see `headwater.core.follow.follow`.
        skip: Patterns of parameters or modules to leave out.
        folder: Where to save the fit. A finished fit of the same inputs and options is read instead of made again,
            one with other options is replaced, and a killed one goes on where it stopped.
        weight_decay: The training run's weight decay, which becomes the damping.
        adaptive: Whether the run's optimizer scales its steps (Adam), so that its decay is no ridge penalty.
        horizon: Sum of the run's learning rates over one minus its momentum.
        distance: Squared distance that training moved the followed parameters, for the automatic damping.
        batch_size: Most examples in a batch.
        batch_tokens: Most positions in a batch, for data with lengths.
        check: Verify on a few examples that losses are sums over the batch and repeat exactly.
        progress: Called with (done, total, note).

    Raises:
        ValueError: The loss is a mean over the batch, differs between passes, or no layer can be followed.
        ArtifactMismatch: The folder holds the fit of another model, other data or another task.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> data = (torch.randn(20, 3), torch.randint(2, (20,)))
        >>> from headwater.core.task import Classification
        >>> len(fit(model, data, Classification(), curvature="ekfac").followed)
        1
    """
    world, examples = current(), as_examples(train)
    device = next(model.parameters()).device
    probe = to_device(examples.batch(range(min(2, len(examples)))), device)
    if check:
        check_classes(model, task, examples, probe)
        check_loss(model, task, probe)
    followed = follow(model, task, probe, layers=layers, skip=skip)
    capture = Capture(model, task, followed)
    method = choose_curvature(curvature, capture, examples)
    options = {
        "curvature": {"kind": method.kind} | {k: v for k, v in vars(method).items()},
        "layers": layers if isinstance(layers, str) else list(layers),
        "skip": list(skip),
    }
    made_from = {
        "model": fingerprint_model(model),
        "data": examples.fingerprint(),
        "task": task.name,
    }
    others = world.exchange(made_from)
    if differ := [k for k in made_from if any(other[k] != made_from[k] for other in others)]:
        raise ValueError(
            f"The ranks have different inputs: {', '.join(differ)}. Every rank must load the same model and the same "
            "data, with the same seeds."
        )
    record = {
        "weight_decay": weight_decay,
        "adaptive": adaptive,
        "distance": distance,
        "horizon": horizon,
    }
    inputs = (method, capture, examples, followed, options, made_from, record)
    limits = (batch_size, batch_tokens, progress)
    if folder is None:
        return _fit(*inputs, *limits)
    place = Path(folder)
    if world.agreed(lambda: _finished(place, made_from, options | record)):
        return load(place, model, examples, task)
    unfinished = place.with_name(f".{place.name}.unfinished")
    work = unfinished / fingerprint_json([made_from, options, batch_size, batch_tokens])[:16]
    with world.failing_together(), ExitStack() as stack:
        if world.is_first:
            stack.enter_context(FolderLock(unfinished))
        made = _fit(*inputs, *limits, work)
        if world.is_first:
            made.save(place)
            for stage in work.glob("*"):
                Checkpoint(stage).clear()
            with suppress(OSError):
                work.rmdir()
        world.exchange()  # nobody reads what is not whole yet
    if world.is_first:
        with suppress(OSError):  # other unfinished fits may be in there
            unfinished.rmdir()
    return made


class FitsAt(Sequence):
    """Fits of one model with other weights, each made when it is asked for."""

    def __init__(self, fit: Fit, checkpoints: Sequence[Mapping[str, Tensor]]):
        self.fit, self.checkpoints = fit, checkpoints

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return FitsAt(self.fit, self.checkpoints[index])
        return _fit_at(self.fit, self.checkpoints[index], index)


def fits_at(fit: Fit, checkpoints: Sequence[Mapping[str, Tensor]]) -> FitsAt:
    """Fits of the same task and data with other weights: checkpoints of a run, or runs of other seeds.

    Their curvature is the identity, so they cost a copy of the checkpoint's weights each, held only while in use.

    Args:
        fit: A fit of the model.
        checkpoints: Tensors by the names of the model's state. What a checkpoint leaves out stays as it is in the fit;
            an index may read it from disk.

    Raises:
        ValueError: A checkpoint does not belong to the model; the message names what differs.
    """
    return FitsAt(fit, checkpoints)


def _fit_at(fit: Fit, checkpoint: Mapping[str, Tensor], number: int) -> Fit:
    named = list(fit.model.named_parameters(remove_duplicate=False))
    replaced = {id(p) for name, p in named if name in checkpoint}
    shared = {  # weights that stay as they are take no memory twice
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for _, p in named
        if type(p) is nn.Parameter and id(p) not in replaced
    }
    model = copy.deepcopy(fit.model, shared)
    state = model.state_dict()
    wrong = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in checkpoint.items()
        if name not in state or state[name].shape != tensor.shape
    ]
    trained = {name for layer in fit.followed for name in layer.parameters}
    if wrong or trained.isdisjoint(checkpoint):
        what = (
            f"it has {', '.join(wrong[:3])}" if wrong else "it holds none of the followed weights"
        )
        raise ValueError(f"Checkpoint {number} is not one of this model: {what}.")
    model.load_state_dict(dict(checkpoint), strict=False)
    capture = Capture(model, fit.task, fit.followed)
    made_from = fit.made_from | {"model": fingerprint_model(model)}
    facts = {"made_from": made_from, "options": {"curvature": {"kind": "identity"}}}
    return replace(
        fit,
        model=model,
        curvature=Identity().fit(FitContext(capture, fit.train, [])),
        facts=fit.facts | facts,
    )


def _fit(
    method: CurvatureMethod,
    capture: Capture,
    examples: Examples,
    followed: Followed,
    options: dict[str, Any],
    made_from: dict[str, str],
    record: dict[str, Any],
    batch_size: int,
    batch_tokens: int,
    progress: Progress | None,
    work: Path | None = None,
) -> Fit:
    started = time.perf_counter()
    plans = plan_batches(
        examples, batch_size=batch_size, batch_tokens=batch_tokens, folds=method.folds
    )
    fitted = method.fit(FitContext(capture, examples, plans, progress, work))
    facts = {"made_from": made_from, "options": options, "seconds": time.perf_counter() - started}
    return Fit(
        model=capture.model,
        task=capture.task,
        train=examples,
        followed=followed,
        curvature=fitted,
        facts=facts | record | {"versions": provenance.versions()},
        batch_size=batch_size,
        batch_tokens=batch_tokens,
    )


def _finished(place: Path, made_from: dict[str, str], options: dict[str, Any]) -> bool:
    """Whether a folder holds a whole fit of the same inputs and options."""
    try:
        artifact = Artifact.open(place, kind="fit")
    except ArtifactMissing:
        return False
    try:
        artifact.require(**made_from)
    except ArtifactMismatch as error:
        raise ArtifactMismatch(f"{error} To fit what is at hand, choose another folder.") from None
    saved = artifact.facts["fit"]
    known = saved["options"] | {
        k: saved.get(k) for k in ("weight_decay", "adaptive", "distance", "horizon")
    }
    return fingerprint_json(known) == fingerprint_json(options)


def moved(fit: Fit) -> float:
    """Squared distance that training moved the followed parameters: the recorded one, else that from zero."""
    if fit.facts.get("distance"):
        return float(fit.facts["distance"])
    named = dict(fit.model.named_parameters(remove_duplicate=False))
    names = {n for layer in fit.followed for n in layer.parameters if n in named}
    return sum(float(whole(named[n].detach()).double().square().sum()) for n in sorted(names))
