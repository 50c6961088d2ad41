"""What every quantizer of layers needs: the statistics of their inputs, the loop over them, and the result.

The statistics are the second moments of what each layer reads. Those of a fit cost nothing, and are of the model as it
was. Run block by block, calibration examples show every block what the blocks before it return now that they are
quantized, which costs two forward passes.
"""

import copy
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from headwater.core.blocks import BlockByBlock, block_names
from headwater.core.capture import Progress, plan_batches
from headwater.core.curvature import Layerwise
from headwater.core.examples import Examples, as_examples
from headwater.core.files import ArtifactMismatch
from headwater.core.fingerprint import (
    fingerprint_json,
    fingerprint_model,
    fingerprint_tensors,
    portable,
    short,
)
from headwater.core.fit import Fit
from headwater.core.layers import module_kind
from headwater.core.locks import FolderLock
from headwater.core.quantized import (
    QuantizedLinear,
    empty_layer,
    held_dense,
    layer_facts,
    quantized_layers,
    replace_module,
    save_quantized,
)
from headwater.core.store import Artifact, ArtifactWriter
from headwater.core.task import Task
from headwater.numerics.rounding import lacks_rank


@dataclass(frozen=True, eq=False, repr=False)
class Quantized:
    """A quantized model and how its layers did.

    Attributes:
        model: The model, its layers `QuantizedLinear`.
        rows: One for each layer.
        facts: Method, source of the statistics, passes over the data beyond the fit, seconds.
        made_from: Fingerprints of the original model and of the data.
    """

    model: nn.Module
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)

    def table(self) -> dict[str, list]:
        """Columns with a row for each layer."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return {name: [row.get(name) for row in self.rows] for name in names}

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of storage for each quantized weight, all that is needed to make it counted."""
        weights = sum(row["weights"] for row in self.rows)
        return sum(row["bits_per_weight"] * row["weights"] for row in self.rows) / weights

    @property
    def relative_proxy(self) -> float:
        """Mean over layers of the outputs' squared error, relative to the outputs."""
        return sum(row["relative_proxy"] for row in self.rows) / len(self.rows)

    def save(self, folder: str | Path) -> None:
        """Write the model, its table and facts as an artifact; `headwater.core.quantized.load_quantized` reads it."""
        save_quantized(
            self.model, folder, facts=self.facts, made_from=self.made_from, table=self.table()
        )

    def __repr__(self) -> str:
        weights = sum(row["weights"] for row in self.rows)
        return (
            f"Quantized({len(self.rows)} layers, {weights:,} weights in {self.bits_per_weight:.3f} bits each, "
            f"output error {100 * self.relative_proxy:.2g} % in the mean, statistics from {self.facts['statistics']}, "
            f"{self.facts['passes_beyond_fit']:g} passes beyond the fit, {self.facts['seconds']:.0f} s)"
        )


@dataclass(frozen=True, kw_only=True)
class Quantizer(ABC):
    """Quantizes linear layers, one at a time, by the second moments of their inputs.

    Attributes:
        paper: The paper of the method.
        layers: Patterns of module names; the linear layers of the blocks when there are none.
    """

    paper: ClassVar[str]
    layers: tuple[str, ...] = ()

    @abstractmethod
    def layer(
        self, name: str, module: nn.Module, H: Float[Tensor, "in in"]
    ) -> tuple[QuantizedLinear, dict[str, Any]]:
        """One quantized layer, and its row of the report.

        Args:
            name: Its name.
            module: The linear layer.
            H: The second moment of its inputs.

        Raises:
            ValueError: H is not a second moment of its inputs; the message names the layer.
        """

    def adapt(
        self,
        model: nn.Module,
        data: Any,
        *,
        task: Task | None = None,
        folder: str | Path | None = None,
        batch_size: int = 16,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> Quantized:
        """A quantized copy of the model; parameters that are not quantized are shared with it in memory.

        Args:
            model: The model.
            data: A `Fit` of this model, whose activation covariances are read; calibration examples, which are run
                through the model block by block, the blocks before already quantized, as in the paper; or second
                moments by name, as `headwater.core.forward.input_moments` gives them.
            task: The task, with examples.
            folder: Where finished layers are kept until all are, so that a killed run goes on where it stopped.
            batch_size: Most calibration examples in a batch.
            batch_tokens: Most positions in a batch.
            progress: Called with (done, total, note).

        Raises:
            ArtifactMismatch: The fit is one of another model.
            ValueError: A layer cannot be quantized; the message names it.
        """
        started = time.monotonic()
        names = chosen_layers(model, self.layers)
        new = _shared_copy(model)
        if isinstance(data, Fit):
            work = _FromFit(new, names, data)
        elif isinstance(data, Mapping):
            work = _Given(new, names, data)
        elif task is None:
            raise ValueError("Calibration examples need their task, such as task=CausalLM().")
        else:
            examples = as_examples(data)
            plans = plan_batches(examples, batch_size=batch_size, batch_tokens=batch_tokens)
            work = _ByBlocks(new, names, BlockByBlock(new, task, examples, plans), examples)
        if work.positions is not None:
            _warn_of_rank(model, names, work.positions)
        made_from = {"model": fingerprint_model(model), "data": work.data}
        place = None
        if folder is not None:
            digest = fingerprint_json([made_from, portable(asdict(self)), work.statistics])
            place = Path(folder) / digest[:16]
        kept = _Kept(place, self, progress, len(names))
        with ExitStack() as stack:
            if folder is not None:
                stack.enter_context(FolderLock(folder))
            rows = list(work.run(kept))
            kept.clear()
        order = {name: k for k, name in enumerate(names)}
        rows.sort(key=lambda row: order[row["layer"]])
        facts = {
            "method": {"name": type(self).__name__, "paper": self.paper} | asdict(self),
            "papers": [self.paper],
            "statistics": work.statistics,
            "passes_beyond_fit": work.passes,
            "positions": work.positions,
            "seconds": time.monotonic() - started,
        }
        return Quantized(new, rows, portable(facts), made_from)


def _warn_of_rank(model: nn.Module, names: Sequence[str], positions: int) -> None:
    widths = {name: weight_of(model.get_submodule(name)).shape[1] for name in names}
    widest = max(names, key=widths.__getitem__)
    if widths[widest] > positions:
        warnings.warn(
            f"{positions:,} positions of data give the {widths[widest]:,} inputs of {widest!r} a second moment of "
            "lower rank; it is damped, and more examples would serve better.",
            stacklevel=3,
        )


def weight_of(module: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear layer, outputs first."""
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, assignment]
    return weight.mT.contiguous() if module_kind(module) == "conv1d" else weight


def chosen_layers(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Names of the layers to quantize.

    Args:
        model: The model.
        patterns: Patterns of names; the linear layers of the model's blocks when there are none.

    Raises:
        ValueError: There are none.
    """
    uses: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    linear, tied = [], []
    for name, module in model.named_modules():
        plain = module_kind(module) in ("linear", "conv1d") and "lora_" not in name
        weight = getattr(module, "weight", None)
        if plain and isinstance(weight, nn.Parameter) and weight.is_floating_point():
            (linear if uses[id(weight)] == 1 else tied).append(name)
    blocks = block_names(model)

    def wanted(name: str) -> bool:
        if patterns:
            return any(fnmatch(name, p) or fnmatch(name, f"{p}.*") for p in patterns)
        return not blocks or any(name == b or name.startswith(f"{b}.") for b in blocks)

    found = [name for name in linear if wanted(name)]
    if not found:
        shared = f" ({', '.join(tied[:3])} share their weights with other modules)" if tied else ""
        if quantized := len(quantized_layers(model)):
            shared = f" ({quantized} are quantized already; quantize the model they were made from)"
        asked = f"of {', '.join(patterns)}" if patterns else "in its blocks"
        raise ValueError(
            f"The model has no linear layers {asked} to quantize{shared}; its linear layers are: "
            f"{', '.join(linear[:6]) or 'none'}."
        )
    return found


def _shared_copy(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own that share the model's memory."""
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, shared)


class _Kept:
    """Finished layers: on disk where there is a folder, so that a killed run goes on.

    Args:
        folder: The folder of this very run.
        method: The method.
        progress: Called with (done, total, note).
        total: Layers in all.
    """

    def __init__(
        self, folder: Path | None, method: Quantizer, progress: Progress | None, total: int
    ):
        self.folder, self.method, self.progress, self.total = folder, method, progress, total
        self.done = 0

    def has(self, name: str) -> bool:
        """Whether a layer is finished."""
        return self.folder is not None and (self.folder / name / "manifest.json").is_file()

    def layer(
        self, name: str, module: nn.Module, H: Callable[[], Float[Tensor, "in in"]]
    ) -> tuple[QuantizedLinear, dict[str, Any]]:
        """A quantized layer and its row, read or made."""
        if self.folder is not None and self.has(name):
            found = _read(self.folder / name, module)
        else:
            found = self.method.layer(name, module, H())
            if self.folder is not None:
                _write(self.folder / name, *found)
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, f"quantizing: {name}")
        return found

    def clear(self) -> None:
        """Remove what was kept of this run."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _write(folder: Path, layer: QuantizedLinear, row: dict[str, Any]) -> None:
    with ArtifactWriter(folder, kind="quantized layer") as writer:
        for name, tensor in layer.named_buffers():
            writer.tensor(name, tensor)
        writer.fact("layer", layer_facts(layer))
        writer.fact("row", row)


def _read(folder: Path, module: nn.Module) -> tuple[QuantizedLinear, dict[str, Any]]:
    artifact = Artifact.open(folder, kind="quantized layer", verify=True)
    layer = empty_layer(artifact.facts["layer"] | {"bias": False})
    device = weight_of(module).device
    state = {name: tensor.to(device, copy=True) for name, tensor in artifact.tensors()}
    layer.load_state_dict(state, assign=True)
    layer.bias = module.bias  # type: ignore[assignment]
    return layer, artifact.facts["row"]


@dataclass(frozen=True)
class _FromFit:
    """Layers quantized with the activation covariances of a fit: no pass over the data."""

    model: nn.Module
    names: list[str]
    fit: Fit
    statistics: ClassVar[str] = "the fit"
    passes: ClassVar[float] = 0.0

    def __post_init__(self):
        ours, theirs = fingerprint_model(self.model), self.fit.made_from["model"]
        if ours != theirs:
            raise ArtifactMismatch(
                f"The fit was made from another model ({short(theirs)}…) than the one to quantize ({short(ours)}…); "
                "fit this one, or pass the model that was fitted."
            )
        if not isinstance(self.fit.curvature, Layerwise):
            raise ValueError(
                f"The fit's curvature, {self.fit.curvature.kind!r}, holds no activation covariances; fit with "
                "curvature='ekfac' or 'kfac', or pass calibration examples."
            )

    @property
    def data(self) -> str:
        return self.fit.made_from["data"]

    @property
    def positions(self) -> int:
        """Positions that the covariances are means over."""
        if self.fit.train.lengths is not None:
            return self.fit.n_rows
        return int(self.fit.curvature.facts.get("moments_positions", self.fit.n_rows))

    def covariance(self, name: str) -> Float[Tensor, "in in"]:
        """A of a module, without the row and column of the bias."""
        layers = {use.module: layer for layer in self.fit.followed for use in layer.uses}
        layer = layers.get(name)
        if layer is None or layer.kind not in ("linear", "conv1d") or len(layer.uses) > 1:
            raise ValueError(
                f"The fit does not follow {name!r} as a linear layer of its own; fit with layers='all', choose other "
                "layers, or pass calibration examples."
            )
        assert isinstance(self.fit.curvature, Layerwise)
        if self.fit.facts["options"]["curvature"].get("approximation") == "reduce":
            raise ValueError(
                "The factors of approximation='reduce' are of sums over positions; fit with 'expand', or pass "
                "calibration examples."
            )
        A = self.fit.curvature.activation_covariance(layer.name)
        return A[:-1, :-1] if layer.has_bias else A

    def run(self, kept: _Kept) -> Iterator[dict[str, Any]]:
        for name in self.names:
            module = self.model.get_submodule(name)
            layer, row = kept.layer(name, module, partial(self.covariance, name))
            replace_module(self.model, name, layer)
            yield row


@dataclass(frozen=True)
class _Given:
    """Layers quantized with second moments that are given."""

    model: nn.Module
    names: list[str]
    moments: Mapping[str, Tensor]
    statistics: ClassVar[str] = "given second moments"
    passes: ClassVar[float] = 0.0
    positions: ClassVar[int | None] = None

    def __post_init__(self):
        if missing := [name for name in self.names if name not in self.moments]:
            raise ValueError(f"There is no second moment of what {missing[0]!r} reads.")
        if short := [name for name in self.names if lacks_rank(self.moments[name])]:
            more = f" and of {len(short) - 1} other layers" if len(short) > 1 else ""
            warnings.warn(
                f"The second moment of what {short[0]!r} reads{more} is of lower rank than it has inputs; it is "
                "damped, and one of more data would serve better.",
                stacklevel=4,
            )

    @property
    def data(self) -> str:
        return fingerprint_tensors((name, self.moments[name]) for name in self.names)

    def run(self, kept: _Kept) -> Iterator[dict[str, Any]]:
        for name in self.names:
            module = self.model.get_submodule(name)
            layer, row = kept.layer(name, module, partial(self.moments.__getitem__, name))
            replace_module(self.model, name, layer)
            yield row


@dataclass(frozen=True)
class _ByBlocks:
    """Layers quantized block by block, on what the blocks before return once they are quantized."""

    model: nn.Module
    names: list[str]
    blocks: BlockByBlock
    examples: Examples
    statistics: ClassVar[str] = "calibration examples, block by block"
    passes: ClassVar[float] = 0.67  # two forward passes

    def __post_init__(self):
        inside = {n for b in self.blocks.names for n in self.names if _in_block(n, b)}
        if outside := [name for name in self.names if name not in inside]:
            raise ValueError(
                f"{outside[0]!r} lies in none of the blocks {self.blocks.names[0]}, …; choose other layers, or use the "
                "statistics of a fit."
            )
        if self.positions < 1:
            raise ValueError("The calibration examples have no real positions.")

    @property
    def data(self) -> str:
        return self.examples.fingerprint()

    @property
    def positions(self) -> int:
        return self.blocks.n_positions

    def run(self, kept: _Kept) -> Iterator[dict[str, Any]]:
        for block in self.blocks.names:
            names = [name for name in self.names if _in_block(name, block)]
            left = [name for name in names if not kept.has(name)]
            moments = self.blocks.moments(left) if left else {}
            for name in names:
                module = self.model.get_submodule(name)
                layer, row = kept.layer(name, module, partial(moments.__getitem__, name))
                replace_module(self.model, name, layer)
                yield row
            with held_dense(self.model.get_submodule(block)):
                self.blocks.advance()


def _in_block(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")
