"""Names for content: equal fingerprints mean equal bytes.

A fingerprint is a BLAKE2b digest of 256 bits, written in hexadecimal (`b2sum -l 256` prints the
same for a file). Artifacts carry the fingerprints of the model, data and task they were made from.
"""

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.core.sharding import whole

DIGEST_BYTES = 32
_CHUNK_BYTES = 1 << 24
_NOT_FINITE = [{"$float": text} for text in ("nan", "inf", "-inf")]


def short(digest: str) -> str:
    """The first 12 characters of a fingerprint, for people to read."""
    return digest[:12]


def fingerprint_json(value: Any) -> str:
    """Fingerprint of a JSON value; the order of keys does not matter."""
    text = json.dumps(portable(value), sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def fingerprint_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of names, dtypes, shapes and every bit of the content, in any order.

    Tensors are read one after another, in stretches of 16 MiB, so that generators and
    memory-mapped files larger than memory will do.
    """
    digests: dict[str, str] = {}
    for name, tensor in named:
        if name in digests:
            raise ValueError(f"Two tensors are named {name!r}; give each a name of its own.")
        digests[name] = _digest(tensor)
    return fingerprint_json(digests)


def fingerprint_model(model: nn.Module) -> str:
    """Fingerprint of a model's parameters and persistent buffers, by name.

    A tied parameter counts under each of its names, so that a copy with equal values and the same
    names has the same fingerprint, tied or not.
    """
    digests: dict[str, str] = {}
    known: dict[int, str] = {}  # a tied tensor is read once
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = _digest(whole(value))
            digests[name] = known[id(value)]
        else:
            digests[name] = _digest_state(name, value)
    return fingerprint_json(digests)


def portable(value: Any, where: str = "value") -> Any:
    """A copy of `value` made of what JSON can hold; tuples become lists.

    JSON has no infinities and no NaN: they are written as `{"$float": "nan"}`, which `revive`
    turns back. What JSON cannot hold is refused with its place, as in `facts.options[2]`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, (list, tuple)):
        return [portable(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, Mapping):
        if value in _NOT_FINITE:  # made portable before
            return dict(value)
        for key in value:
            if not isinstance(key, str) or key == "$float":
                raise TypeError(
                    f"{where} has the key {key!r}; keys are strings other than '$float'."
                )
        return {key: portable(each, f"{where}.{key}") for key, each in value.items()}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold; expected numbers, strings, "
        "booleans, None, and lists or dicts of them."
    )


def revive(mapping: dict) -> Any:
    """The `object_hook` that reads what `portable` wrote."""
    return float(mapping["$float"]) if mapping.keys() == {"$float"} else mapping


def byte_chunks(tensor: Tensor, limit: int = _CHUNK_BYTES) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, in stretches of at most `limit` bytes.

    At most one stretch is copied at a time, from a GPU or out of a strided view; contiguous memory
    is not copied at all.
    """
    require_dense(tensor)
    tensor = tensor.detach()
    if tensor.nbytes == 0:
        return
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        if flat.stride(0) != 1:  # a single number may carry any stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        for piece in flat.split(max(1, limit // tensor.element_size())):
            plain = piece.cpu().resolve_conj().resolve_neg()
            yield plain.view(torch.uint8).numpy().data
    elif tensor.nbytes <= limit:
        yield from byte_chunks(tensor.contiguous(), limit)
    else:
        rows = limit * len(tensor) // tensor.nbytes
        for part in tensor.split(rows) if rows else tensor:
            yield from byte_chunks(part, limit)


def _digest(tensor: Tensor) -> str:
    content = blake2b(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=DIGEST_BYTES)
    for chunk in byte_chunks(tensor):
        content.update(chunk)
    return content.hexdigest()


def _digest_state(name: str, value: Any) -> str:
    try:
        return fingerprint_json(value)
    except TypeError:
        warnings.warn(
            f"The state {name!r} of the model is a {type(value).__name__}; its fingerprint leaves "
            "out the content, so two models that differ only there count as the same.",
            stacklevel=3,
        )
        return type(value).__qualname__


def require_dense(tensor: Tensor) -> None:
    """Refuse a tensor whose values do not lie in memory one by one."""
    dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)
    if not dense or tensor.is_meta:
        kind = "meta tensor without content" if tensor.is_meta else f"tensor of {tensor.layout}"
        raise TypeError(
            f"Expected a dense tensor, got a {kind}; give one with its values in memory "
            "(.to_dense(), .dequantize())."
        )
