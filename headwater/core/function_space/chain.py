"""BGLN-D on a network that is a chain: moments of activations carried from layer to layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from headwater.core.function_space.gates import Gated, GateError, HeldActivation, call_name
from headwater.core.function_space.statistics import AnchorStatistics
from headwater.numerics.gated import (
    PairMoments,
    expected_squared_distance,
    through_affine,
    through_gates,
)


@dataclass(frozen=True)
class Stage:
    """Affine modules one after the other, and the gates behind them.

    Attributes:
        modules: With their names.
        shape: Shape of what it reads, for one example.
        gate: Name of the gates; None behind the last.
        random: Whether they are drawn, as those of a ReLU are.
    """

    modules: tuple[tuple[str, nn.Module], ...]
    shape: tuple[int, ...]
    gate: str | None
    random: bool = True

    def map(self, given: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Its map of flattened rows, with some parameters replaced."""

        def run(rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n other"]:
            x = rows.reshape(-1, *self.shape)
            for name, module in self.modules:
                own = {
                    key.removeprefix(f"{name}."): value
                    for key, value in given.items()
                    if key.startswith(f"{name}.")
                }
                x = functional_call(module, own, (x,))
            return x.flatten(1)

        return run


def _leaves(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        every = ((f"{name}.{k}" if name else k, child) for k, child in module._modules.items())
        return [leaf for k, child in every if child is not None for leaf in _leaves(child, k)]
    if isinstance(module, HeldActivation) or not list(module.children()):
        return [(name, module)]
    raise GateError(
        f"BGLN-D carries moments along a chain of layers; {name or 'the model'!r} is a {type(module).__name__}, whose "
        "inside may branch. Build the network of nn.Sequential, or choose method='bgln-s'."
    )


def stages(gated: Gated, statistics: AnchorStatistics) -> list[Stage]:
    """The network as affine stages with gates between them.

    Raises:
        GateError: It is no chain of modules.
    """
    found, run, shape = [], [], statistics.input_shape
    calls: dict[str, int] = {}
    for name, module in _leaves(gated.model, ""):
        if not isinstance(module, HeldActivation):
            run.append((name, module))
            continue
        number = calls.get(module.name, 0)
        calls[module.name] = number + 1
        gate = call_name(module.name, number)
        random = isinstance(module.activation, nn.ReLU)
        found.append(Stage(tuple(run), shape, gate, random))
        run, shape = [], tuple(statistics.rates[gate].shape[1:])
    return [*found, Stage(tuple(run), shape, None)]


def expected_distance(
    chain: Sequence[Stage],
    statistics: AnchorStatistics,
    given: Mapping[str, Tensor],
    *,
    released: bool = False,
    outputs: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """Expected half squared distance of the outputs from the anchor's, the mean over groups by their shares.

    Args:
        chain: The network.
        statistics: Of its data.
        given: The parameters that differ.
        released: Without the covariance of activations and differences, and without the diagonal's own factor.
        outputs: Which outputs count; all when left out.
    """
    like = next(p for stage in chain for _, m in stage.modules for p in m.parameters())
    total = like.new_zeros(())
    for k, share in enumerate(statistics.shares.tolist()):
        mean, C = statistics.mean[k].to(like), statistics.covariance[k].to(like)
        moments = PairMoments.of_inputs(mean, torch.diag(C) if C.ndim == 1 else C)
        for stage in chain:
            before, after = stage.map({}), stage.map(given)
            moments = through_affine(moments, before, after, released=released)
            if stage.gate is not None:
                rate = statistics.rates[stage.gate][k].flatten().to(like)
                moments = through_gates(moments, rate, released=released, random=stage.random)
        if outputs is not None:
            moments = _only(moments, list(outputs))
        total = total + share * expected_squared_distance(moments)
    return total


def _only(moments: PairMoments, chosen: list[int]) -> PairMoments:
    matrices = (moments.covariance, moments.difference_covariance, moments.cross)
    return PairMoments(
        moments.mean[chosen], moments.difference[chosen], *(m[chosen][:, chosen] for m in matrices)
    )
