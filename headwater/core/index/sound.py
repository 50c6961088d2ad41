"""What `index.json` may say: anything else is refused before a file is opened, written or removed by it."""

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, get_args

from headwater.core.damping import Damping
from headwater.core.index.encoding import Dtype, encoding_of

KINDS = ("whitened", "sketched", "logra")


class _Least(int):
    """Whole numbers from this one on."""


_COUNT, _SIZE = _Least(0), _Least(1)
_FILE = {"bytes": _COUNT, "blake2b": str}
_RANGES = [[_COUNT]]
_SOURCE = {
    "data": str, "n": _SIZE, "batch_size": _SIZE, "batch_tokens": _SIZE, "block_rows": _SIZE, "shard_rows": _SIZE,
}  # fmt: skip
_SHARD = {
    "number": _COUNT, "source": _COUNT, "first": _COUNT, "last": _SIZE, "blocks": [_SIZE], "digests": [str],
    "rows": _FILE, "ids": _FILE, "dropped": _RANGES, "removed": _RANGES,
}  # fmt: skip
_INDEX = {
    "made_from": {"model": str, "task": str, "projection": str},
    "space": {
        "kind": str,
        "fingerprint": str,
        "damping": {"value": float, "unit": str, "source": str},
    },
    "layers": dict,
    "dtype": str,
    "n_train": _SIZE,
    "sources": [_SOURCE],
    "shards": [_SHARD],
    "following": _COUNT,
    "facts": dict,
    "versions": dict,
}
_METRIC = {"number": _COUNT, "shards": [_COUNT], "bytes": _COUNT, "blake2b": str}
_AGREEMENT = {"spearman": float, "recall_10": float}
_ERROR = {"rows": _COUNT, "queries": _COUNT, "whole": _AGREEMENT, "dtype_alone": _AGREEMENT}


def require_sound(body: Mapping[str, Any]) -> None:
    """Refuse an index that no build writes.

    Raises:
        ValueError: The message names what is wrong with it.
    """
    _require_shape(body, _INDEX)
    _require(body["space"]["kind"] in KINDS, f"the space {body['space']['kind']!r} is not known")
    _require(body["dtype"] in get_args(Dtype), f"it names the dtype {body['dtype']!r}")
    Damping(**body["space"]["damping"])
    for key in ("kept", "columns", "ranks"):
        _require_shape(body["space"].get(key, {}), dict, f"space[{key!r}]")
    for name, width in body["layers"].items():
        _require_shape(width, _COUNT, f"layers[{name!r}]")
    pending, shards = body["pending"], list(body["shards"])
    if pending is not None:
        _require_shape(pending, {"source": _SOURCE, "shards": [_SHARD]}, "pending")
        shards += pending["shards"]
    sources = [*body["sources"], *([] if pending is None else [pending["source"]])]
    _require(bool(sources), "it has no source")
    _require(bool(body["shards"]) == bool(body["sources"]), "its sources have no shards")
    numbers = [s["number"] for s in shards]
    _require(len(set(numbers)) == len(numbers), "two shards have one number")
    _require(max(numbers, default=-1) < body["following"], "the next shard's number is taken")
    if (factors := body.get("factors")) is not None:
        _require_shape(factors, {"rank": _SIZE, "shapes": dict}, "factors")
        for name, shape in factors["shapes"].items():
            _require_shape(shape, [_COUNT], f"factors of {name!r}")
            _require(len(shape) == 3, f"factors of {name!r} are no (groups, out, in)")
    row_bytes = encoding_of(body["dtype"], body["layers"], factors).bytes_per_row
    for shard in shards:
        _require_shard(shard, sources, row_bytes)
    if body["metric"] is not None:
        _require_shape(body["metric"], _METRIC, "metric")
    _require_facts(body["facts"])


def _require_shard(
    shard: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], row_bytes: int
) -> None:
    what, n = f"shard {shard['number']}", sum(shard["blocks"])
    first, last = shard["first"], shard["last"]
    _require(shard["source"] < len(sources), f"{what} is of no source")
    _require(n * row_bytes <= shard["rows"]["bytes"], f"{what} has more rows than its file holds")
    _require(len(shard["digests"]) == len(shard["blocks"]), f"{what} lacks checksums")
    source = sources[shard["source"]]
    there = source.get("training", False) or last <= source["n"]  # training sees examples again
    _require(first < last and there, f"{what} has rows that its source does not have")
    for name, low, high in (("dropped", first, last), ("removed", 0, n)):
        ends = list(chain.from_iterable(shard[name]))
        pairs = all(len(pair) == 2 and pair[0] < pair[1] for pair in shard[name])
        ascending = all(a <= b for a, b in pairwise([low, *ends, high]))
        _require(pairs and ascending, f"{what} has {name} rows that are not there")
    kept = last - first - sum(b - a for a, b in shard["dropped"])
    _require(n == kept, f"{what} has {n} rows instead of {kept}")


def _require_facts(facts: Mapping[str, Any]) -> None:
    """What is shown to people must be what it is taken for."""
    if (error := facts.get("error")) is not None:
        _require_shape(error, _ERROR, "facts['error']")
        hundred = error["whole"].get("recall_100")
        _require_shape(0.0 if hundred is None else hundred, float, "recall_100")
    if (share := facts.get("kept_share")) is not None:
        _require_shape(share, float, "kept_share")
    if (tried := facts.get("recall_10")) is not None:
        _require_shape(tried, dict, "recall_10")
        for name, value in tried.items():
            _require_shape(value, float, f"recall_10[{name!r}]")


def _require_shape(value: Any, shape: Any, place: str = "") -> None:
    """Refuse a value that is not made as `shape`: a type, a least whole number, a list of one shape, or keys."""
    if isinstance(shape, dict):
        _require(isinstance(value, dict), f"{place or 'it'} is no mapping")
        for key, each in shape.items():
            _require(key in value, f"{place or 'it'} has no {key!r}")
            _require_shape(value[key], each, f"{place}[{key!r}]" if place else key)
    elif isinstance(shape, list):
        _require(isinstance(value, list), f"{place} is no list")
        for i, each in enumerate(value):
            _require_shape(each, shape[0], f"{place}[{i}]")
    elif isinstance(shape, _Least):
        holds = type(value) is int and value >= shape
        _require(holds, f"{place} is no whole number from {int(shape)} on")
    else:
        kinds = (int, float) if shape is float else (shape,)
        _require(type(value) in kinds, f"{place} is no {shape.__name__}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
