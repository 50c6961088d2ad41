"""Projected gradients from a forward and backward pass that somebody else makes: the training loop's own.

`Capture` runs its own passes; a `Listener` only puts hooks on the followed modules. In the forward pass a hook
projects what a layer reads to a few numbers a position at once and keeps only those; in the backward pass another
projects the gradient of what the layer returned, and the sum over positions of the outer products is the example's row
(LoGra's two-sided projection). Layers and coordinates for which that does not do go through Capture's own row makers.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.core.capture import BatchInfo, Call, Capture, LayerError, first_tensor
from headwater.core.gradients import Factored
from headwater.core.layers import Layer, Use
from headwater.core.projection import Projection, TwoSided
from headwater.core.task import Task
from headwater.numerics import kronecker

_EARLY = ("linear", "conv1d", "embedding")  # kinds whose two sides can be projected apart


@dataclass
class _Early:
    """One run of a module of which only projections are kept.

    Attributes:
        use: The module.
        kept: What it read, projected (n, pos, k).
        part: Its part of the rows (n, out, in), once the gradient has come.
    """

    use: Use
    kept: Tensor
    part: Tensor | None = None


class Listener(Capture):
    """Hooks on the followed layers that make each example's row from somebody else's pass.

    Args:
        model: The model in training; its parameters and modes are left alone.
        task: Its task.
        followed: The layers to follow.
        projection: What is kept of a layer's gradient.

    Raises:
        ValueError: A layer's gradients cannot be seen from outside.
    """

    def __init__(
        self, model: nn.Module, task: Task, followed: Iterable[Layer], projection: Projection
    ):
        super().__init__(model, task, followed)
        if self._functional:
            raise ValueError(
                f"The gradients of {', '.join(list(self._functional)[:3])} need a pass of their own for each example, "
                "so they cannot be read off the training pass; leave them out with skip=[…] when you fit."
            )
        self.projection = projection
        self._two_sided = projection if isinstance(projection, TwoSided) else None
        self._made: dict[tuple[str, torch.dtype, torch.device], _Matrices] = {}
        self._copies: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
        self._last: tuple[Tensor, Tensor | None, bool, Tensor] | None = None
        self._rows_of: dict[str, Tensor] = {}
        self._unreached: list[str] = []

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks in place; they do nothing outside of `listening`."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                for use in layer.uses:
                    module, hook = self._modules[use.module], self._listen(layer, use)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            stack.callback(self.clear)
            yield

    def clear(self) -> None:
        super().clear()
        self.projection.clear()
        self._last, self._rows_of, self._unreached = None, {}, []

    @contextmanager
    def listening(self, n: int) -> Iterator[dict[str, Float[Tensor, "n k"]]]:
        """Around one forward and one backward pass over n examples; their rows are in the dictionary afterwards.

        A row is the gradient of what is differentiated: of the batch's loss, in which an example's own loss may have
        been divided by something.

        Raises:
            LayerError: A layer did not run, or no gradient came for any.
        """
        self.clear()
        tape, found = self._tape, self._rows_of
        tape.rows, tape.recording, tape.emit = n, True, self._finish
        try:
            yield found
            tape.recording = False
            for name in self.layers.keys() - found.keys():
                if name not in tape.calls:
                    raise LayerError(
                        name,
                        f"Layer {name!r} did not run, or where its gradients cannot be followed: under no_grad, in a "
                        "compiled model, or in activation checkpointing that is reentrant (use_reentrant=False is "
                        "fine). Change that, or leave the layer out with skip.",
                    )
                self._finish(name)  # of some uses no gradient came: their part is zero
            if len(self._unreached) == len(self.layers):
                raise LayerError(
                    self._unreached[0],
                    "No gradient came for any layer; make the forward and the backward pass inside of the block.",
                )
        finally:
            self.clear()

    def _listen(self, layer: Layer, use: Use):
        tape, name = self._tape, layer.name
        early = self._two_sided is not None and layer.shape[0] == 1
        early = early and all(u.kind in _EARLY and u.axis == 0 for u in layer.uses)

        def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Any:
            if not tape.recording or not torch.is_grad_enabled() or inside_backward():
                return None
            if name in self._rows_of:
                raise LayerError(
                    name,
                    f"Layer {name!r} ran again after its gradient had come; make one forward and one backward pass in "
                    "each block.",
                )
            x = first_tensor(args, kwargs)
            if use.axis is None and output.shape[0] == 1:
                x, output = (t.expand(tape.rows, *t.shape[1:]) for t in (x, output))
            call: Any = (
                _Early(use, self._read(layer, use, module, x))
                if early
                else Call(use, x, x._version, output.shape, output.dtype)
            )
            tape.calls.setdefault(name, []).append(call)
            tape.waiting[name] += 1
            if not output.requires_grad:
                return None

            def receive(g: Tensor) -> None:
                if isinstance(call, _Early):
                    call.part = self._part_of(layer, call, g)
                else:
                    call.g = g
                tape.waiting[name] -= 1
                if tape.waiting[name] == 0 and tape.emit is not None:
                    tape.emit(name)

            output.register_hook(receive)
            return output

        return hook

    def _finish(self, name: str) -> None:
        """The rows of a layer, all uses of which have their gradients."""
        layer, calls, n = self.layers[name], self._tape.calls[name], self._tape.rows
        if all((c.part if isinstance(c, _Early) else c.g) is None for c in calls):
            self._unreached.append(name)
        if isinstance(calls[0], _Early):
            parts = [c.part for c in calls if isinstance(c, _Early) and c.part is not None]
            kept = calls[0].kept
            zero = kept.new_zeros(n, self.projection.width(layer), dtype=kronecker.sum_dtype(kept))
            self._rows_of[name] = sum(parts[1:], parts[0]).flatten(1) if parts else zero
        else:
            rows = self._rows(layer, calls, n, {}, BatchInfo(torch.arange(n)))
            block = Factored(rows.a, rows.g).to(kronecker.sum_dtype(rows.a))
            self._rows_of[name] = self.projection(layer, block)
        self._tape.calls[name] = []  # let go of what was read

    def _read(self, layer: Layer, use: Use, module: Any, x: Tensor) -> Float[Tensor, "n pos k"]:
        """What a module reads, projected."""
        n = self._tape.rows
        if x.shape[0] % n:
            raise LayerError(
                layer.name,
                f"Layer {layer.name!r} reads {tuple(x.shape)}, which cannot be split into the {n} examples that were "
                "told of. Tell one id for each example of the batch, or leave the layer out with skip.",
            )
        if use.kind == "embedding":
            return self._tokens(layer, module, x.reshape(n, -1))
        P = self._matrices(layer, x)
        last = (
            self._last
        )  # layers that read the same tensor one after the other share its projection
        if last is None or last[0] is not x or last[1] is not P.in_ or last[2] != P.bias:
            read = P.read(x.detach().reshape(n, -1, x.shape[-1]))
            last = self._last = x, P.in_, P.bias, read
        return last[3]

    def _tokens(self, layer: Layer, module: Any, tokens: Tensor) -> Float[Tensor, "n pos k"]:
        """One-hot tokens, projected: columns of the matrix."""
        table = self._matrices(layer, module.weight).out
        if table is None:
            table = torch.eye(module.num_embeddings).to(module.weight)
        found = F.embedding(tokens, table.mT)
        if module.padding_idx is not None:  # PyTorch gives its row no gradient
            found = found * (tokens != module.padding_idx)[..., None]
        return found

    def _part_of(self, layer: Layer, call: _Early, g: Tensor) -> Float[Tensor, "n out in"]:
        """One run's part of the rows, from the gradient of what it returned."""
        P, g = self._matrices(layer, g), g.reshape(self._tape.rows, -1, g.shape[-1])
        if call.use.kind == "embedding":
            a, g = P.read(g), call.kept
        else:
            a, g = call.kept, g if P.out is None else F.linear(g, P.out)
        wide = torch.promote_types(kronecker.sum_dtype(a), g.dtype)
        return kronecker.gradient(a.to(wide), g.to(wide))

    def _matrices(self, layer: Layer, like: Tensor) -> "_Matrices":
        key = layer.name, like.dtype, like.device
        if key not in self._made and self._two_sided is not None:
            out, in_ = self._two_sided.sides(layer)
            self._made[key] = _Matrices(
                self._copy(out, like), self._copy(in_, like), layer.has_bias
            )
        return self._made[key]

    def _copy(self, P: Tensor | None, like: Tensor) -> Tensor | None:
        """A matrix in the type of a tensor; the same for layers that share it."""
        if P is None:
            return None
        key = id(P), like.dtype, like.device
        if key not in self._copies:
            self._copies[key] = P, P.to(like)  # the first keeps its identity taken
        return self._copies[key][1]


@dataclass(frozen=True)
class _Matrices:
    """Both sides of a projection, (kept, whole) each or None for the identity."""

    out: Tensor | None
    in_: Tensor | None
    bias: bool

    def read(self, x: Float[Tensor, "n pos in"]) -> Float[Tensor, "n pos k"]:
        """The projection of x, behind which a one stands where there is a bias."""
        if not self.bias:
            return x if self.in_ is None else F.linear(x, self.in_)
        if self.in_ is None:
            return F.pad(x, (0, 1), value=1.0)
        return F.linear(x, self.in_[:, :-1], self.in_[:, -1])


def inside_backward() -> bool:
    """Whether a backward pass is running: what modules run then is activation checkpointing's recomputation."""
    return torch._C._current_graph_task_id() != -1
