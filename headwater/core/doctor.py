"""Checks on a few examples that prove the numbers right before anything long runs."""

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.core.capture import (
    BatchInfo,
    Capture,
    Progress,
    Rows,
    evaluation_mode,
    plan_batches,
)
from headwater.core.cost import available_memory_bytes, positions, spread
from headwater.core.examples import Examples, as_examples, take, to_device
from headwater.core.follow import Followed, LeftOut, coarsest_dtype, follow
from headwater.core.gradients import Block, Factored, dense
from headwater.core.layers import FUNCTIONAL, Layer
from headwater.core.prediction import IGNORE
from headwater.core.target import Loss
from headwater.core.task import CausalLM, Task

Status = Literal["ok", "warn", "fail"]

# Relative errors that rounding explains, by precision: of losses, and of gradients.
_LOSS = {torch.float64: 1e-6, torch.float32: 1e-3}
_GRADIENT = {torch.float64: 1e-7, torch.float32: 1e-3}
_COARSE = 5e-2  # of both, in 16 bits
_PAD = 8  # positions added to see whether padding matters
_SCAN = 1000  # examples whose labels and first tokens are looked at


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: What was looked at.
        status: "ok", "warn" (the numbers hold, but look) or "fail" (they would be wrong).
        detail: What was found.
        remedy: What to do about it; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class LayerCheck:
    """Per-example gradients of one followed layer against autograd's.

    Attributes:
        name: The layer.
        kind: How its gradients are made.
        parameters: How many parameters it covers.
        share: Their share of the model's parameters.
        relative_error: Norm of the difference over the norm of autograd's gradients, the worse of
            one example at a time and all in one batch.
        status: "fail" where that is beyond rounding.
    """

    name: str
    kind: str
    parameters: int
    share: float
    relative_error: float
    status: Status


@dataclass(frozen=True)
class Diagnosis:
    """What the checks found.

    Attributes:
        checks: All checks, in the order in which they were made.
        layers: The followed layers, empty where the loss itself is broken.
        coverage: Share of the model's parameters that is followed.
        left_out: Parameters that are not followed, and why.
        tied: Groups of modules that share one parameter.
        reused: Modules that run several times in a forward pass, with how often.
        facts: Numbers behind the checks.
    """

    checks: tuple[Check, ...]
    layers: tuple[LayerCheck, ...] = ()
    coverage: float = 0.0
    left_out: tuple[LeftOut, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    reused: tuple[tuple[str, int], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings are allowed."""
        return all(check.status != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r} was not checked; there are {[c.name for c in self.checks]}.")

    def to_rows(self, of: Literal["checks", "layers"] = "checks") -> list[dict[str, Any]]:
        """The checks, or the layers, as rows of a table."""
        return [asdict(row) for row in (self.checks if of == "checks" else self.layers)]

    def to_json(self) -> dict[str, Any]:
        """Everything, made of what strict JSON has."""
        from headwater.core.evidence import plain

        return plain({"ok": self.ok} | asdict(self))

    def __repr__(self) -> str:
        counts = Counter(check.status for check in self.checks)
        head = ", ".join(f"{counts[s]} {s}" for s in ("ok", "warn", "fail") if counts[s])
        lines = [f"Diagnosis({head}; {len(self.layers)} layers, {_percent(self.coverage)} covered)"]
        for check in self.checks:
            if check.status != "ok":
                lines.append(
                    f"  {check.status}  {check.name}: {check.detail} {check.remedy}".rstrip()
                )
        return "\n".join(lines)


def check_loss(model: nn.Module, task: Task, batch: Any) -> Tensor:
    """The losses of a small batch, after proof that they are one an example and repeat.

    Raises:
        ValueError: The task returns no number an example, the loss of a batch is not made of its
            examples' losses, or two passes over a batch differ.
    """
    with evaluation_mode(model), torch.no_grad():
        losses = task.loss(model, batch)
        if losses.ndim != 1:
            raise ValueError(
                "Expected the loss of each example, shape (batch,); the task returned "
                f"{tuple(losses.shape)}. Use reduction='none' and sum over the example's own "
                "positions."
            )
        again = task.loss(model, batch)
        if not torch.equal(losses, again):
            raise ValueError(
                f"Two passes over the same batch differ by up to {_gap(losses, again):.3g} nats, "
                "though the model is in evaluation mode. Look for dropout or noise that is called "
                "as a function, and switch it off."
            )
        singles = [task.loss(model, take(batch, torch.tensor([i]))) for i in range(len(losses))]
        alone = torch.cat(singles)
    if not _close(losses, alone, coarsest_dtype(model)):
        raise ValueError(
            "An example's loss depends on the batch it stands in: up to "
            f"{_gap(losses, alone):.3g} nats between a batch of {len(losses)} and single examples. "
            "Usual causes: a mean over the batch or over its tokens, batch norm in training mode, "
            "padding that the model does not mask."
        )
    return losses


def examine(
    model: nn.Module,
    train: Any,
    task: Task,
    *,
    layers: str | Sequence[str] = "trainable",
    skip: Sequence[str] = (),
    n: int = 4,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Prove on a few examples that the gradients of every followed layer are right.

    Each layer's per-example gradients are compared with plain autograd on the model's own
    parameters, one example at a time and in one batch. Whether the loss or the gradients depend on
    batching, padding, what stands under the mask, or chance is found out, and what the followed
    layers cover is told. The model's modes, gradients and parameters are left as they were.

    Args:
        model: The model.
        train: Its training data, as for `headwater.fit`.
        task: What it was trained for.
        layers: Which parameters to follow.
        skip: Patterns of parameters or modules to leave out.
        n: Examples to compare on, spread over the lengths.
        tolerance: Largest relative error of a layer's gradients; by the model's precision when left
            out.
        progress: Called with (done, total, note).

    Returns:
        The diagnosis; `ok` says whether the numbers can be trusted.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> data = (torch.randn(20, 3), torch.randint(2, (20,)))
        >>> from headwater.core.task import Classification
        >>> examine(model, data, Classification()).ok
        True
    """
    started = time.perf_counter()
    examples = as_examples(train)
    exam = _Exam(model, task, examples, _chosen(examples, n), tolerance, progress)
    checks = [_weights(model), *_modes(model), *exam.loss_checks()]
    facts: dict[str, Any] = {"examples": [examples.ids[i] for i in exam.indices]}
    if any(
        check.status == "fail" and check.name in ("loss", "repeats", "alone") for check in checks
    ):
        detail = "not compared, because the loss itself is not in order"
        return Diagnosis((*checks, Check("gradients", "warn", detail)), facts=facts)
    try:
        followed = follow(model, task, exam.batch, layers=layers, skip=skip)
    except Exception as error:  # whatever a user's model raises is the finding
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Diagnosis((*checks, Check("coverage", "fail", said)), facts=facts)
    checks += [_coverage(model, followed), *_sharing(followed)]
    compared = exam.compare(followed)
    checks += compared.checks()
    checks += [*_zeros(model, compared), *_tokens(task, examples)]
    checks += _size(exam, followed, compared)
    facts |= {
        "dtype": str(exam.dtype).removeprefix("torch."),
        "tolerance": exam.tolerance,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "positions_per_example": compared.positions,
        "relative_error": max(compared.worst().values(), default=0.0),
        "seconds": time.perf_counter() - started,
    }
    return Diagnosis(
        tuple(checks),
        compared.layer_checks(facts["n_parameters"]),
        followed.coverage,
        followed.left_out,
        followed.tied,
        followed.reused,
        facts,
    )


def _chosen(examples: Examples, n: int) -> list[int]:
    """A few examples spread over the lengths, the very longest not among them."""
    total = len(examples)
    order = sorted(range(total), key=lambda i: (examples.lengths or [0] * total)[i])
    n = min(n, total)
    return [order[(2 * j + 1) * total // (2 * n)] for j in range(n)]


class _Exam:
    """The chosen examples, as a batch and one by one, and the passes over them."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        indices: list[int],
        tolerance: float | None,
        progress: Progress | None,
    ):
        self.model, self.task, self.examples, self.indices = model, task, examples, indices
        self.progress = progress
        self.dtype, self.device = coarsest_dtype(model), next(model.parameters()).device
        self.tolerance = _GRADIENT.get(self.dtype, _COARSE) if tolerance is None else tolerance
        self.batch = to_device(examples.batch(indices), self.device)
        self.singles = [to_device(examples.batch([i]), self.device) for i in indices]

    def _loss(self, data: Any) -> Tensor:
        with evaluation_mode(self.model), torch.no_grad():
            return self.task.loss(self.model, data)

    def loss_checks(self) -> Iterator[Check]:
        """The form of the loss: one number an example, finite, repeatable, free of the batch."""
        again = to_device(self.examples.batch(self.indices), self.device)
        if not _same(self.batch, again):
            remedy = "Turn random augmentation off: a traced example must be the same each time."
            yield Check("data", "fail", "two readings of the same examples differ", remedy)
        try:
            losses = self._loss(self.batch)
        except Exception as error:  # whatever a user's model raises is the finding
            detail = f"the loss of a batch could not be computed: {type(error).__name__}: {error}"
            yield Check(
                "loss", "fail", detail, "Check that the task and the batches fit the model."
            )
            return
        if losses.ndim != 1 or len(losses) != len(self.indices):
            yield Check(
                "loss",
                "fail",
                f"expected one number an example, shape ({len(self.indices)},); the task returned "
                f"{tuple(losses.shape)}",
                "Use reduction='none' and sum over the example's own positions.",
            )
            return
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if bad:
            named = _named([self.examples.ids[self.indices[i]] for i in bad])
            remedy = "Look at these examples, and at the model's weights."
            yield Check("loss", "fail", f"not finite for {named}", remedy)
            return
        yield Check("loss", "ok", f"one finite number an example, {float(losses.mean()):.4g} nats")
        yield self._repeats(losses)
        try:
            alone = torch.cat([self._loss(single) for single in self.singles])
        except Exception as error:  # as above
            detail = f"no loss of one example alone: {type(error).__name__}: {error}"
            yield Check("alone", "fail", detail, "The model must run on a batch of one.")
            return
        yield self._batching(losses, alone)
        yield from self._padding()

    def _repeats(self, losses: Tensor) -> Check:
        gap = _gap(losses, self._loss(self.batch))
        if gap <= 1e-5 * float(losses.abs().max()):
            return Check("repeats", "ok", "two passes agree")
        return Check(
            "repeats",
            "fail",
            f"two passes over the same batch differ by up to {gap:.3g} nats, though all modules are "
            "in evaluation mode",
            "Look for dropout or noise that is called as a function (F.dropout(x) trains by "
            "default), and pass training=self.training.",
        )

    def _batching(self, losses: Tensor, alone: Tensor) -> Check:
        if _close(losses, alone, self.dtype):
            return Check("batching", "ok", "a batch's losses are those of its examples alone")
        ratio = losses / alone
        if bool(((ratio - ratio.mean()).abs() < 1e-3 * ratio.mean().abs()).all()):
            size = f"{1 / float(ratio.mean()):.4g}"
            detail = f"losses in a batch of {len(losses)} are those alone divided by {size}"
            remedy = "The loss is a mean over the batch: use reduction='none' and sum each example."
        else:
            gap = _gap(losses, alone)
            detail = f"an example's loss depends on its batch, by up to {gap:.3g} nats"
            remedy = (
                "Usual causes: a mean over the batch's tokens, batch norm without running "
                "statistics, padding that the model does not mask."
            )
        return Check("batching", "fail", detail, remedy)

    def _padding(self) -> Iterator[Check]:
        """Whether padding, or what stands under it, changes a loss."""
        at = self.shortest
        padded = None if at is None else _padded(self.singles[at])
        if at is None or padded is None:
            return
        try:
            wide = self._loss(padded)
        except Exception as error:  # a context that is full already, for one
            yield Check("padding", "warn", f"not checked: {type(error).__name__}: {error}")
            return
        alone = self._loss(self.singles[at])
        remedy = "Pass attention_mask to every layer that mixes positions, and pad on the right."
        if not _close(wide, alone, self.dtype):
            gap = _gap(wide, alone)
            detail = f"{_PAD} more masked positions change a loss by {gap:.3g} nats"
            yield Check("padding", "fail", detail, remedy)
        else:
            yield Check("padding", "ok", f"{_PAD} more masked positions leave the loss as it is")
        if "input_ids" not in padded:
            return
        other = self._loss(_relettered(padded))
        if _close(other, wide, self.dtype):
            yield Check("mask", "ok", "tokens under the mask do not matter")
        else:
            gap = _gap(other, wide)
            detail = f"other tokens under the mask change a loss by {gap:.3g} nats"
            yield Check("mask", "fail", detail, remedy)

    @property
    def shortest(self) -> int | None:
        """The example that is padded: the shortest; None where batches have no mask."""
        if not isinstance(self.batch, dict) or self.batch.get("attention_mask") is None:
            return None
        return min(
            range(len(self.singles)), key=lambda i: self.singles[i]["attention_mask"].shape[1]
        )

    def compare(self, followed: Followed) -> "_Compared":
        """Gradients of every followed layer against autograd's."""
        compared = _Compared(self, followed)
        compared.run()
        if compared.failing() and self.dtype != torch.float64:
            compared.exact = self._in_float64(followed)
        return compared

    def _in_float64(self, followed: Followed) -> dict[str, float] | None:
        """The layers' errors on a float64 copy, where rounding is out of the question."""
        try:
            model = copy.deepcopy(self.model).double()
            exam = _Exam(model, self.task, self.examples, self.indices, None, self.progress)
            exam.batch, exam.singles = _doubled(exam.batch), [_doubled(s) for s in exam.singles]
            compared = _Compared(exam, followed)
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


class _Compared:
    """Our gradients and autograd's, by layer: one example at a time, in one batch, and padded."""

    def __init__(self, exam: _Exam, followed: Followed):
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
            if exam.shortest == i and (padded := _padded(single)) is not None:
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
        return self.exact is not None and self.exact[name] <= _GRADIENT[torch.float64]

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
            detail = f"{_listed(bad)} differ from autograd's by rounding alone (float64 agrees)"
            remedy = f"Expect errors of this size in {self.exam.dtype}; a wider type has none."
            return Check(name, "warn", detail, remedy)
        detail = f"{len(wrong)} of {len(errors)} layers differ from autograd's: " + _listed(
            {n: bad[n] for n in wrong}
        )
        return Check(name, "fail", detail, remedy.format(names=_named([repr(n) for n in wrong])))

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


def _weights(model: nn.Module) -> Check:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bad = [n for n, t in tensors if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    bad = [n for n in bad if not n.endswith("mask")]  # minus infinity is what masks are made of
    if not bad:
        return Check("weights", "ok", "all parameters are finite")
    remedy = "The training run diverged or the file is damaged: take an earlier checkpoint."
    return Check("weights", "fail", f"NaN or infinity in {_named(bad)}", remedy)


def _modes(model: nn.Module) -> Iterator[Check]:
    """Modules whose mode matters: batch norm and gradient checkpointing."""
    norms = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    bare = [n for n, m in norms.items() if m.running_mean is None]
    if bare:
        yield Check(
            "batch norm",
            "fail",
            f"{_named(bare)} keep no running statistics, so an example's loss depends on its batch",
            "Set track_running_stats=True and train on, or use another norm.",
        )
    elif any(m.training for m in norms.values()):
        yield Check(
            "batch norm",
            "ok",
            f"{len(norms)} modules in training mode are run in evaluation mode: gradients are those "
            "with the running statistics",
        )
    remade = [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)]
    if remade:
        yield Check(
            "checkpointing",
            "warn",
            f"gradient checkpointing is enabled in {_named([n or 'the model' for n in remade])}; "
            "where it acts in evaluation mode too, hooks see every layer twice",
            "Call model.gradient_checkpointing_disable().",
        )


def _coverage(model: nn.Module, followed: Followed) -> Check:
    total = sum(p.numel() for p in model.parameters())
    by_why: dict[str, list[LeftOut]] = {}
    for left in followed.left_out:
        by_why.setdefault(left.why, []).append(left)
    parts = [f"{_percent(followed.coverage)} of {total:,} parameters followed"]
    slow = sum(layer.numel for layer in followed if layer.kind == FUNCTIONAL)
    if slow:
        parts.append(f"{_percent(slow / max(total, 1))} by torch.func, which is slower")
    for why, group in by_why.items():
        share = sum(x.numel for x in group) / max(total, 1)
        parts.append(f"{_percent(share)} left out, {why}: {_named([x.name for x in group])}")
    return Check("coverage", "ok", "; ".join(parts))


def _sharing(followed: Followed) -> Iterator[Check]:
    if followed.tied:
        pairs = "; ".join(" = ".join(group) for group in followed.tied[:3])
        yield Check("tied", "ok", f"modules that share one parameter, followed as one: {pairs}")
    if followed.reused:
        named = _named([f"{name} {k} times" for name, k in followed.reused])
        yield Check("reused", "ok", f"modules that run several times in a pass: {named}")


def _zeros(model: nn.Module, compared: _Compared) -> Iterator[Check]:
    """Layers without a gradient: not run, untrained adapters, dead."""
    names = compared.layers
    if compared.unused:
        yield Check(
            "unused",
            "warn",
            f"the loss does not depend on {_named([n for n in names if n in compared.unused])}",
            "Their scores will be zero; leave them out with skip=[…].",
        )
    fresh = [
        n for n, p in model.named_parameters() if "lora_B" in n.split(".") and not bool(p.any())
    ]
    if fresh:
        yield Check(
            "adapter",
            "warn",
            f"{len(fresh)} LoRA adapters have B = 0, as before training ({_named(fresh)}), so the "
            "gradients of their A are zero",
            "Load the trained adapter, or train it first.",
        )
    prefixes = {n.split(".lora_B")[0] for n in fresh}
    silent = [n for n in compared.silent() if n.split(".lora_A")[0] not in prefixes]
    if silent:
        yield Check(
            "zero gradients",
            "warn",
            f"exactly zero for every example in {_named(silent)}",
            "Dead units, a detached branch, or a gate that is shut; their scores will be zero.",
        )


def _tokens(task: Task, examples: Examples) -> Iterator[Check]:
    """What is scored, and whether a first token comes twice, over up to a thousand examples."""
    indices = spread(len(examples))[:_SCAN]
    scored, total, empty = 0, 0, []
    first: Counter[int] = Counter()
    twice: dict[int, list[str]] = {}
    for i in indices:
        one = examples.batch([i])
        labels = one.get("labels") if isinstance(one, dict) else None
        if not isinstance(labels, Tensor) or labels.ndim != 2:
            return
        hits = int((labels[:, 1:] if isinstance(task, CausalLM) else labels).ne(IGNORE).sum())
        scored, total = scored + hits, total + labels.numel()
        empty += [] if hits else [examples.ids[i]]
        ids = one.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] > 1:
            head = int(ids[0, 0])
            first[head] += 1
            if head == int(ids[0, 1]):
                twice.setdefault(head, []).append(examples.ids[i])
    share = f"{_percent(scored / max(total, 1))} of the positions are scored"
    if empty:
        status: Status = "fail" if len(empty) == len(indices) else "warn"
        detail = f"{share}; nothing is scored in {len(empty)} of {len(indices)} examples looked at"
        remedy = "Their labels are -100 throughout (a prompt longer than the limit?); drop them."
        yield Check("labels", status, f"{detail}: {_named(empty)}", remedy)
    else:
        yield Check("labels", "ok", f"{share}, some in each of {len(indices)} examples looked at")
    token, count = first.most_common(1)[0] if first else (0, 0)
    if token in twice and 2 * count > len(indices):
        yield Check(
            "first token",
            "warn",
            f"token {token} stands twice at the beginning of {len(twice[token])} examples: "
            f"{_named(twice[token])}",
            "A chat template and the tokenizer both add it: tokenize with add_special_tokens=False.",
        )


def _size(exam: _Exam, followed: Followed, compared: _Compared) -> Iterator[Check]:
    """Whether the data determine the factors, and whether a batch fits in memory."""
    examples, n = exam.examples, len(exam.indices)
    matrices = [x for x in followed if _has_factors(x) and x.name in compared.positions]
    short = [x for x in matrices if compared.positions[x.name] * len(examples) < max(x.shape[1:])]
    if short:
        worst = max(short, key=lambda x: max(x.shape[1:]))
        seen = compared.positions[worst.name] * len(examples)
        yield Check(
            "rank",
            "warn",
            f"{len(short)} layers have a side longer than the data have positions ({worst.name}: "
            f"{max(worst.shape[1:])} against {seen:.0f}); in the missing directions damping decides",
            "Use more data, or look at how scores change with the damping.",
        )
    largest = max(plan_batches(examples), key=lambda b: positions(examples, b))
    probe = n * max((examples.lengths or [1])[i] for i in exam.indices) if examples.lengths else n
    need = sum(compared.bytes.values()) * positions(examples, largest) / probe
    free = available_memory_bytes(exam.device)
    detail = f"inputs and output gradients of one batch take {need / 1e9:.2g} GB"
    if need > free / 2:
        detail += f" of the {free / 1e9:.2g} GB available"
        yield Check("memory", "warn", detail, "Lower batch_tokens or batch_size.")
    else:
        yield Check("memory", "ok", detail)


def _has_factors(layer: Layer) -> bool:
    return layer.kind not in ("norm", "bias", FUNCTIONAL)


def _padded(batch: Any) -> dict[str, Any] | None:
    """The batch with masked positions appended on the right; None where it has no mask."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None

    def pad(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.shape[:2] != mask.shape:
            return x
        if name == "position_ids":
            more = x[:, -1:] + torch.arange(1, _PAD + 1, device=x.device)
        else:
            more = x.new_full((len(x), _PAD, *x.shape[2:]), IGNORE if name == "labels" else 0)
        return torch.cat([x, more.to(x)], dim=1)

    return {name: pad(name, x) for name, x in batch.items()}


def _relettered(padded: dict[str, Any]) -> dict[str, Any]:
    """A padded batch with other tokens under the mask: the example's own, so that they exist."""
    ids, mask = padded["input_ids"], padded["attention_mask"].bool()
    other = ids.roll(_PAD, dims=1)
    return padded | {"input_ids": torch.where(mask, ids, torch.where(other == ids, ids + 1, other))}


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor):
        return x.shape == y.shape and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same(x[k], y[k]) for k in x)
    if isinstance(x, tuple | list):
        return len(x) == len(y) and all(map(_same, x, y))
    return True


def _doubled(batch: Any) -> Any:
    """The same batch with its real numbers in float64."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {k: _doubled(v) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_doubled(v) for v in batch)
    return batch


def _close(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    rtol = _LOSS.get(dtype, _COARSE)
    return torch.allclose(x, y.to(x), rtol=rtol, atol=rtol)


def _gap(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max())


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _named(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _listed(errors: dict[str, float], most: int = 5) -> str:
    return _named([f"{name} ({_percent(error)})" for name, error in errors.items()], most)
