"""What a dataset is to the core: examples with stable ids that can be collated into batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from headwater.core.fingerprint import fingerprint_json, fingerprint_tensors
from headwater.numerics import noise


class Examples(ABC):
    """Examples that the core can batch, name, and recognise again.

    Attributes:
        ids: One stable, unique name for each example; label draws and results are tied to it.
        lengths: Tokens of each example, for batches of equal length; None when all are alike.
        metadata: Columns that travel into the results, one value for each example.
    """

    ids: list[str]
    lengths: list[int] | None = None
    metadata: dict[str, list]

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Any:
        """The collated batch of the given examples, first axis the example."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the content, by which a fit recognises its data."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def keys(self) -> Tensor:
        """64-bit keys of the ids, for random numbers tied to examples."""
        return noise.keys(self.ids)

    def subset(self, indices: Sequence[int]) -> "Examples":
        return Subset(self, indices)

    def _check(self) -> None:
        if not self.ids:
            raise ValueError("The dataset is empty; there is nothing to trace.")
        if len(set(self.ids)) != len(self.ids):
            seen: set[str] = set()
            twice = next(i for i in self.ids if i in seen or seen.add(i))
            raise ValueError(f"Example ids must be unique; {twice!r} occurs more than once.")
        for name, column in self.metadata.items():
            if len(column) != len(self.ids):
                raise ValueError(
                    f"Metadata column {name!r} has {len(column)} values for {len(self.ids)} examples."
                )


class Subset(Examples):
    """Some examples of another dataset, under the same ids."""

    def __init__(self, base: Examples, indices: Sequence[int]):
        self.base, self.indices = base, [int(i) for i in indices]
        self.ids = [base.ids[i] for i in self.indices]
        self.lengths = None if base.lengths is None else [base.lengths[i] for i in self.indices]
        self.metadata = {k: [v[i] for i in self.indices] for k, v in base.metadata.items()}
        self._check()

    def batch(self, indices: Sequence[int]) -> Any:
        return self.base.batch([self.indices[i] for i in indices])

    def fingerprint(self) -> str:
        return fingerprint_json([self.base.fingerprint(), self.indices])


class TensorExamples(Examples):
    """Examples held in tensors whose first axis is the example, such as images and labels.

    A batch is the tuple of the tensors' rows.
    """

    def __init__(
        self,
        *tensors: Tensor,
        ids: Sequence[str] | None = None,
        metadata: dict[str, list] | None = None,
    ):
        if not tensors or len({len(t) for t in tensors}) != 1:
            raise ValueError(
                f"Tensors must share their first axis; got {[tuple(t.shape) for t in tensors]}."
            )
        self.tensors = tensors
        self.ids = [str(i) for i in range(len(tensors[0]))] if ids is None else list(ids)
        self.metadata = metadata or {}
        if len(self.ids) != len(tensors[0]):
            raise ValueError(
                f"Expected {len(tensors[0])} ids, one for each example; got {len(self.ids)}."
            )
        self._check()

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        index = torch.as_tensor(indices)
        return tuple(t[index] for t in self.tensors)

    def fingerprint(self) -> str:
        return fingerprint_tensors((str(i), t) for i, t in enumerate(self.tensors))


class DatasetExamples(Examples):
    """Examples of a map-style PyTorch dataset, collated by a function.

    The fingerprint reads every example once; give `name` to use a name of your own instead.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence,
        *,
        collate: Callable[[list], Any] = default_collate,
        ids: Sequence[str] | None = None,
        metadata: dict[str, list] | None = None,
        lengths: Sequence[int] | None = None,
        name: str | None = None,
    ):
        self.dataset, self.collate, self.name = dataset, collate, name
        n = len(dataset)  # type: ignore[arg-type]
        self.ids = [str(i) for i in range(n)] if ids is None else list(ids)
        self.metadata, self.lengths = metadata or {}, None if lengths is None else list(lengths)
        self._check()

    def batch(self, indices: Sequence[int]) -> Any:
        return self.collate([self.dataset[int(i)] for i in indices])

    def fingerprint(self) -> str:
        if self.name is not None:
            return fingerprint_json([self.name, self.ids])
        return self._content

    @cached_property
    def _content(self) -> str:
        leaves = (leaf for i in range(len(self)) for leaf in _tensors(self.dataset[i]))
        return fingerprint_tensors((str(n), leaf) for n, leaf in enumerate(leaves))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, str):
        return [torch.tensor(list(value.encode()), dtype=torch.uint8)]
    try:
        return [torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))]
    except TypeError as error:
        raise TypeError(
            f"The dataset holds {type(value).__name__} objects, which have no content to recognise it by; "
            "pass DatasetExamples(..., name=...), a name of your own for this data."
        ) from error


def as_examples(data: Any) -> Examples:
    """Examples from what people have: examples, a tuple of tensors, or a map-style dataset.

    Raises:
        TypeError: The object is none of these.
    """
    if isinstance(data, Examples):
        return data
    if isinstance(data, (tuple, list)) and data and all(isinstance(t, Tensor) for t in data):
        return TensorExamples(*data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DatasetExamples(data)
    raise TypeError(
        "Expected Examples, a tuple of tensors or a map-style dataset (with __len__ and "
        f"__getitem__); got {type(data).__name__}. Wrap your own data in DatasetExamples."
    )


def take(batch: Any, index: Tensor) -> Any:
    """The same batch with rows chosen by `index`, through tuples, lists and dictionaries.

    A list of strings has one for each example; other plain values belong to the whole batch.
    """
    return _map(lambda t: t[index.to(t.device)], batch, lambda texts: [texts[i] for i in index])


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch on a device, through tuples, lists and dictionaries."""
    return _map(lambda t: t.detach().to(device, non_blocking=True), batch)


def _map(function: Callable[[Tensor], Tensor], batch: Any, texts: Callable = list) -> Any:
    """A function of a batch's tensors, and another of its lists of strings."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {k: _map(function, v, texts) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        if batch and all(isinstance(v, str) for v in batch):
            return texts(batch)
        values = [_map(function, v, texts) for v in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
