"""Checks of weights, modes, coverage, tokens and size: what can be told without comparing gradients."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headwater.core.capture import plan_batches
from headwater.core.cost import available_memory_bytes, positions, spread
from headwater.core.doctor.diagnosis import Check, Status, name_some, percent
from headwater.core.doctor.exam import Exam
from headwater.core.doctor.gradients import Compared
from headwater.core.examples import Examples
from headwater.core.follow import Followed, LeftOut
from headwater.core.layers import FUNCTIONAL, Layer
from headwater.core.prediction import IGNORE
from headwater.core.task import CausalLM, Task

_SCAN = 1000  # examples whose labels and first tokens are looked at


def weights(model: nn.Module) -> Check:
    """Whether all parameters and buffers are finite."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bad = [n for n, t in tensors if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    bad = [n for n in bad if not n.endswith("mask")]  # minus infinity is what masks are made of
    if not bad:
        return Check("weights", "ok", "all parameters are finite")
    remedy = "The training run diverged or the file is damaged: take an earlier checkpoint."
    return Check("weights", "fail", f"NaN or infinity in {name_some(bad)}", remedy)


def modes(model: nn.Module) -> Iterator[Check]:
    """Modules whose mode matters: batch norm and gradient checkpointing."""
    norms = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    bare = [n for n, m in norms.items() if m.running_mean is None]
    if bare:
        yield Check(
            "batch norm",
            "fail",
            f"{name_some(bare)} keep no running statistics, so an example's loss depends on its batch",
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
            f"gradient checkpointing is enabled in {name_some([n or 'the model' for n in remade])}; "
            "where it acts in evaluation mode too, hooks see every layer twice",
            "Call model.gradient_checkpointing_disable().",
        )


def coverage(model: nn.Module, followed: Followed) -> Check:
    """What is followed, and what is left out and why."""
    total = sum(p.numel() for p in model.parameters())
    by_why: dict[str, list[LeftOut]] = {}
    for left in followed.left_out:
        by_why.setdefault(left.why, []).append(left)
    parts = [f"{percent(followed.coverage)} of {total:,} parameters followed"]
    slow = sum(layer.numel for layer in followed if layer.kind == FUNCTIONAL)
    if slow:
        parts.append(f"{percent(slow / max(total, 1))} by torch.func, which is slower")
    for why, group in by_why.items():
        share = sum(x.numel for x in group) / max(total, 1)
        parts.append(f"{percent(share)} left out, {why}: {name_some([x.name for x in group])}")
    return Check("coverage", "ok", "; ".join(parts))


def sharing(followed: Followed) -> Iterator[Check]:
    """Modules that share a parameter or run several times."""
    if followed.tied:
        pairs = "; ".join(" = ".join(group) for group in followed.tied[:3])
        yield Check("tied", "ok", f"modules that share one parameter, followed as one: {pairs}")
    if followed.reused:
        named = name_some([f"{name} {k} times" for name, k in followed.reused])
        yield Check("reused", "ok", f"modules that run several times in a pass: {named}")


def zero_gradients(model: nn.Module, compared: Compared) -> Iterator[Check]:
    """Layers without a gradient: not run, untrained adapters, dead."""
    names = compared.layers
    if compared.unused:
        yield Check(
            "unused",
            "warn",
            f"the loss does not depend on {name_some([n for n in names if n in compared.unused])}",
            "Their scores will be zero; leave them out with skip=[…].",
        )
    fresh = [
        n for n, p in model.named_parameters() if "lora_B" in n.split(".") and not bool(p.any())
    ]
    if fresh:
        yield Check(
            "adapter",
            "warn",
            f"{len(fresh)} LoRA adapters have B = 0, as before training ({name_some(fresh)}), so the "
            "gradients of their A are zero",
            "Load the trained adapter, or train it first.",
        )
    prefixes = {n.split(".lora_B")[0] for n in fresh}
    silent = [n for n in compared.silent() if n.split(".lora_A")[0] not in prefixes]
    if silent:
        yield Check(
            "zero gradients",
            "warn",
            f"exactly zero for every example in {name_some(silent)}",
            "Dead units, a detached branch, or a gate that is shut; their scores will be zero.",
        )


def scored_tokens(task: Task, examples: Examples) -> Iterator[Check]:
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
    share = f"{percent(scored / max(total, 1))} of the positions are scored"
    if empty:
        status: Status = "fail" if len(empty) == len(indices) else "warn"
        detail = f"{share}; nothing is scored in {len(empty)} of {len(indices)} examples looked at"
        remedy = "Their labels are -100 throughout (a prompt longer than the limit?); drop them."
        yield Check("labels", status, f"{detail}: {name_some(empty)}", remedy)
    else:
        yield Check("labels", "ok", f"{share}, some in each of {len(indices)} examples looked at")
    token, count = first.most_common(1)[0] if first else (0, 0)
    if token in twice and 2 * count > len(indices):
        yield Check(
            "first token",
            "warn",
            f"token {token} stands twice at the beginning of {len(twice[token])} examples: "
            f"{name_some(twice[token])}",
            "A chat template and the tokenizer both add it: tokenize with add_special_tokens=False.",
        )


def rank_and_memory(exam: Exam, followed: Followed, compared: Compared) -> Iterator[Check]:
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
