"""Per-example gradients of every followed layer beside those of plain autograd."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.capture import BatchInfo, Capture, Rows, evaluation_mode
from headwater.core.doctor.batches import GRADIENT_ERROR, doubled, pad_more
from headwater.core.doctor.diagnosis import Check, LayerCheck, name_errors, name_some
from headwater.core.doctor.exam import Exam
from headwater.core.follow import Followed
from headwater.core.gradients import Block, Factored, dense
from headwater.core.target import Loss


def compare(exam: Exam, followed: Followed) -> "Compared":
    """Gradients of every followed layer against autograd's."""
    compared = Compared(exam, followed)
    compared.run()
    if compared.failing() and exam.dtype != torch.float64:
        compared.exact = _in_float64(exam, followed)
    return compared


def _in_float64(exam: Exam, followed: Followed) -> dict[str, float] | None:
    """The layers' errors on a float64 copy, where rounding is out of the question."""
    try:
        model = copy.deepcopy(exam.model).double()
        wide = Exam(model, exam.task, exam.examples, exam.indices, None, exam.progress)
        wide.batch, wide.singles = doubled(wide.batch), [doubled(s) for s in wide.singles]
        compared = Compared(wide, followed)
        compared.run()
    except Exception as error:  # a model that cannot be copied or widened is no finding
        warnings.warn(f"No float64 copy of the model: {error}", stacklevel=2)
        return None
    return compared.worst()


@dataclass
class _Tally:
    """Squared norms of differences and of references, summed over examples."""

    error: float = 0.0
    norm: float = 0.0


class Compared:
    """Our gradients and autograd's, by layer: one example at a time, in one batch, and padded."""

    def __init__(self, exam: Exam, followed: Followed):
        self.exam, self.followed = exam, followed
        self.layers = {layer.name: layer for layer in followed}
        self.capture = Capture(exam.model, exam.task, followed)
        self.tally: dict[str, dict[str, _Tally]] = {}
        self.raised: dict[str, str] = {}
        self.unused: set[str] = set(self.layers)
        self.positions: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.exact: dict[str, float] | None = None

    def run(self) -> None:
        exam, n = self.exam, len(self.exam.indices)
        batch = self._batch_gradients()
        for i, single in enumerate(exam.singles):
            reference = self._autograd(single)
            self._add("alone", i, single, reference)
            if exam.shortest == i and (padded := pad_more(single)) is not None:
                self._add("padded", i, padded, reference)
            for name, block in batch.items():
                self._count("batch", name, dense(block[[i]]), reference[name])
            if exam.progress is not None:
                exam.progress(i + 1, n, "gradients")

    def _backward(self, data: Any, indices: list[int], emit: Callable[[Rows], None]) -> None:
        info = BatchInfo(torch.tensor(indices))
        keys = self.exam.examples.keys[indices].to(self.exam.device)
        with self.capture.hooks(), torch.no_grad():
            self.capture.backward(data, Loss(), info, keys, emit)

    def _batch_gradients(self) -> dict[str, Block]:
        """The batch's gradients, each layer in its smaller form."""
        found: dict[str, Block] = {}
        n = len(self.exam.indices)

        def emit(rows: Rows) -> None:
            name = rows.layer.name
            self.positions[name] = rows.n_positions / n
            self.bytes[name] = rows.a.nbytes + rows.g.nbytes
            small = rows.a.numel() + rows.g.numel() < n * rows.layer.numel
            block = Factored(rows.a.clone(), rows.g.clone())
            found[name] = block if small and rows.a.ndim == 3 else block.dense()

        try:
            self._backward(self.exam.batch, self.exam.indices, emit)
        except Exception as error:  # the user's model in our hooks: the message is the finding
            self.raised["batch"] = f"{type(error).__name__}: {error}"
            return {}
        return found

    def _add(self, mode: str, i: int, data: Any, reference: dict[str, Tensor]) -> None:
        def emit(rows: Rows) -> None:
            ours = Factored(rows.a, rows.g).dense()
            self._count(mode, rows.layer.name, ours, reference[rows.layer.name])

        try:
            self._backward(data, [self.exam.indices[i]], emit)
        except Exception as error:  # as above
            self.raised[mode] = f"{type(error).__name__}: {error}"

    def _count(self, mode: str, name: str, ours: Tensor, reference: Tensor) -> None:
        tally = self.tally.setdefault(mode, {}).setdefault(name, _Tally())
        reference = reference.double()
        tally.error += float((ours.double() - reference).square().sum())
        tally.norm += float(reference.square().sum())

    def _autograd(self, data: Any) -> dict[str, Tensor]:
        """Autograd's gradients of the layers' own parameters for one example, (1, *block)."""
        model = self.exam.model
        named = dict(model.named_parameters(remove_duplicate=False))
        wanted = {n: named[n] for x in self.followed for n in x.parameters if n in named}
        frozen = [p for p in model.parameters() if not p.requires_grad]
        with evaluation_mode(model), torch.enable_grad(), _beside(model, self.followed) as beside:
            inputs = wanted | beside
            try:
                for p in wanted.values():
                    p.requires_grad_(True)
                loss = self.exam.task.loss(model, data).sum()
                found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
            finally:
                for p in frozen:
                    p.requires_grad_(False)
        gradients = dict(zip(inputs, found, strict=True))
        reference = {}
        for layer in self.followed:
            parts = {n: gradients[n] for n in layer.parameters}
            if any(g is not None for g in parts.values()):
                self.unused.discard(layer.name)
            filled = {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in parts.items()}
            reference[layer.name] = layer.from_parameters({n: g[None] for n, g in filled.items()})
        return reference

    def errors(self, mode: str) -> dict[str, float]:
        r"""Relative error of each layer, $\lVert g - g_0\rVert / \max(\lVert g_0\rVert, \epsilon s)$.

        With s the norm over all layers and $\epsilon$ the root of the rounding unit: a layer whose
        gradient vanishes but for rounding, such as the bias of attention keys, is no error.
        """
        tally = self.tally.get(mode, {})
        scale = sum(t.norm for t in tally.values()) ** 0.5
        floor = torch.finfo(self.exam.dtype).eps ** 0.5 * scale
        return {
            name: t.error**0.5 / max(t.norm**0.5, floor, torch.finfo(torch.float64).tiny)
            for name, t in tally.items()
        }

    def worst(self) -> dict[str, float]:
        """The worse of one example at a time and all in one batch, by layer; NaN where none came."""
        if self.raised.keys() & {"alone", "batch"}:
            return dict.fromkeys(self.layers, float("nan"))
        alone, batch = self.errors("alone"), self.errors("batch")
        return {name: max(alone.get(name, 0.0), batch.get(name, 0.0)) for name in self.layers}

    def failing(self, mode: str | None = None) -> dict[str, float]:
        """Layers whose error is beyond the tolerance, the worst first."""
        errors = self.worst() if mode is None else self.errors(mode)
        bad = {n: e for n, e in errors.items() if not e <= self.exam.tolerance}
        return dict(sorted(bad.items(), key=lambda item: -item[1]))

    def _is_rounding(self, name: str) -> bool:
        return self.exact is not None and self.exact[name] <= GRADIENT_ERROR[torch.float64]

    def checks(self) -> Iterator[Check]:
        """The verdicts, one for each way of passing the examples."""
        yield self._verdict(
            "gradients",
            "alone",
            "per-example gradients equal autograd's",
            "Its parameter acts outside its module, or the module computes something else than its "
            "kind says. Leave it out with skip=[{names}], or route every use through the module.",
        )
        yield self._verdict(
            "batched gradients",
            "batch",
            "gradients in a batch are those of single examples",
            "The first axis of what it reads is not the example (sequence-first layouts, windows, "
            "routed tokens). Leave it out with skip=[{names}], or put the example first.",
        )
        if "padded" in self.tally or "padded" in self.raised:
            yield self._verdict(
                "padded gradients",
                "padded",
                "masked positions leave the gradients as they are",
                "Padding reaches {names}: pass attention_mask to every layer that mixes positions.",
            )

    def _verdict(self, name: str, mode: str, good: str, remedy: str) -> Check:
        if mode in self.raised:
            where = "Leave the layer out with skip=[…]."
            return Check(name, "fail", f"could not be taken: {self.raised[mode]}", where)
        errors, bad = self.errors(mode), self.failing(mode)
        if not bad:
            worst = max(errors.values(), default=0.0)
            detail = f"{good}: {len(errors)} layers, largest relative error {worst:.1e}"
            return Check(name, "ok", detail)
        wrong = [n for n in bad if not self._is_rounding(n)]
        if not wrong:
            detail = f"{name_errors(bad)} differ from autograd's by rounding alone (float64 agrees)"
            remedy = f"Expect errors of this size in {self.exam.dtype}; a wider type has none."
            return Check(name, "warn", detail, remedy)
        detail = f"{len(wrong)} of {len(errors)} layers differ from autograd's: " + name_errors(
            {n: bad[n] for n in wrong}
        )
        return Check(name, "fail", detail, remedy.format(names=name_some([repr(n) for n in wrong])))

    def layer_checks(self, n_parameters: int) -> tuple[LayerCheck, ...]:
        """One row a layer."""
        bad, worst = self.failing(), self.worst()
        return tuple(
            LayerCheck(
                layer.name,
                layer.kind,
                layer.numel,
                layer.numel / max(n_parameters, 1),
                worst[layer.name],
                "ok"
                if layer.name not in bad
                else "warn"
                if self._is_rounding(layer.name)
                else "fail",
            )
            for layer in self.followed
        )

    def silent(self) -> list[str]:
        """Layers that take part in the loss but have a gradient of exactly zero everywhere."""
        tally = self.tally.get("alone", {})
        return [n for n, t in tally.items() if t.norm == 0 and n not in self.unused]


@contextmanager
def _beside(model: nn.Module, followed: Followed) -> Iterator[dict[str, Tensor]]:
    """Zero matrices beside weights that are no parameters, so that autograd can differentiate them.

    A quantized layer returns $W x$; the gradient in a zero matrix Z of $W x + Z x$ is that in W.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    modules, zeros, handles = dict(model.named_modules()), {}, []
    dtype = next((p.dtype for p in named.values() if p.is_floating_point()), torch.float32)

    def add(zero: Tensor) -> Callable:
        def hook(module, args, kwargs, output):
            x = args[0] if args else next(iter(kwargs.values()))
            return output + nn.functional.linear(x.to(zero), zero).to(output)

        return hook

    device = next(model.parameters()).device
    try:
        for layer in followed:
            if layer.parameters[0] in named:
                continue
            zero = torch.zeros(layer.shapes[0], dtype=dtype, device=device, requires_grad=True)
            zeros[layer.parameters[0]] = zero
            for use in layer.uses:
                hook = add(zero)
                handles.append(modules[use.module].register_forward_hook(hook, with_kwargs=True))
        yield zeros
    finally:
        for handle in handles:
            handle.remove()
