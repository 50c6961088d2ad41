"""Evidence: what a trace found, in a form that can be read, stored and shown.

An `Evidence` holds one `Answer` for each query: the completion asked about, the training examples
that raised and lowered it, and totals over all training examples. Reports, tables and machines read
nothing else, so that whatever they show can be recomputed from the saved folder.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from headwater.core.display import Shown, plain_text, title_of
from headwater.core.store import Artifact, ArtifactWriter
from headwater.extras import require

if TYPE_CHECKING:
    import pandas

KIND = "evidence"
Value = str | float | int | None
Side = Literal["raised", "lowered"]


@dataclass(frozen=True, kw_only=True)
class Influencer:
    """One training example and what it did to the measurement of a query.

    Args:
        example_id: Id of the training example.
        score: Predicted change of the measurement, in nats, were the example added once more to the
            training data; positive when it raises the measurement.
        low: Lower end of the 95 % interval of the score, where there is one.
        high: Upper end of that interval.
        significance: p-value of the score among examples that were held out of training.
        tokens: The example's text, token by token; joined, they are the text.
        token_scores: The share of the score that each token carries, in nats; may be empty.
        metadata: The example's columns, such as its title and source.
        loss: The example's own training loss, in nats.
        query_scores: What the example did to each token of the completion, in nats: they add up to the score of a
            log-probability; may be empty.
    """

    example_id: str
    score: float
    low: float | None = None
    high: float | None = None
    significance: float | None = None
    tokens: tuple[str, ...] = ()
    token_scores: tuple[float, ...] = ()
    metadata: dict[str, Value] = field(default_factory=dict)
    loss: float | None = None
    query_scores: tuple[float, ...] = ()

    def __post_init__(self):
        _same_length("token_scores", self.token_scores, "tokens", self.tokens)

    @property
    def text(self) -> str:
        """The tokens, joined."""
        return "".join(self.tokens)


@dataclass(frozen=True, kw_only=True)
class SourceTotal:
    """What all training examples of one source did together.

    Args:
        name: The source: a value of the metadata column that sources are counted by.
        raised: Sum of the positive scores, in nats.
        lowered: Sum of the negative scores, in nats; at most zero.
        net: Sum of all scores, in nats.
        n: Training examples of this source.
    """

    name: str
    raised: float
    lowered: float
    net: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The strongest examples by another method, to compare with.

    Args:
        method: Its name, such as "BM25".
        about: What it looks at, in a few words.
        unit: Unit of its scores; empty where they have none.
        examples: The strongest first, with the beginning of their text as one token.
        skipped: Why there are none, where the method could not run.
    """

    method: str
    about: str = ""
    unit: str = ""
    examples: tuple[Influencer, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One query, and the training data behind the model's answer to it.

    Args:
        query_id: Id of the query.
        prompt: What the model was given.
        completion: What was asked about.
        completion_tokens: The completion, token by token.
        completion_log_probs: Log-probability of each of those tokens, in nats.
        measurement: What is measured, such as "log_prob".
        value: The measurement, in nats.
        raised: Examples that raised the measurement, the strongest first.
        lowered: Examples that lowered it, the strongest first.
        sources: Totals over all training examples, by source.
        source_column: The metadata column that names the source.
        layers: Share of the absolute score that each group of layers carries.
        modules: The same share by the kind of module, such as "mlp.down_proj".
        rankings: The strongest examples by other methods.
        null_scale: Standard deviation of the scores of held-out examples, in nats.
        n_distinguishable: How many top ranks are told apart from noise.
        n_train: Training examples that were scored.
    """

    query_id: str
    prompt: str
    completion: str
    completion_tokens: tuple[str, ...] = ()
    completion_log_probs: tuple[float, ...] = ()
    measurement: str = "log_prob"
    value: float
    raised: tuple[Influencer, ...] = ()
    lowered: tuple[Influencer, ...] = ()
    sources: tuple[SourceTotal, ...] = ()
    source_column: str | None = None
    layers: dict[str, float] = field(default_factory=dict)
    modules: dict[str, float] = field(default_factory=dict)
    rankings: tuple[Ranking, ...] = ()
    null_scale: float | None = None
    n_distinguishable: int | None = None
    n_train: int

    def __post_init__(self):
        _same_length(
            "completion_log_probs",
            self.completion_log_probs,
            "completion_tokens",
            self.completion_tokens,
        )
        for _, _, influencer in self.ranked():
            told = influencer.query_scores
            _same_length("query_scores", told, "completion_tokens", self.completion_tokens)

    def ranked(self) -> Iterator[tuple[Side, int, Influencer]]:
        """Side, rank from 1, and example: those that raised the answer, then those that lowered."""
        for rank, influencer in enumerate(self.raised, start=1):
            yield "raised", rank, influencer
        for rank, influencer in enumerate(self.lowered, start=1):
            yield "lowered", rank, influencer


@dataclass(frozen=True, kw_only=True)
class Evidence(Shown):
    """What a trace found for each of its queries, and the facts of how it was found.

    Args:
        answers: One for each query.
        facts: How the answers came about. Reports know these names, all optional, and list any
            other: model, corpus, method, paper, curvature, damping, damping_ratio (to the mean
            eigenvalue), n_train, n_heldout, cost (passes for each stage), seconds, peak_memory
            (bytes), versions (by package), command.

    Example:
        >>> answer = Answer(query_id="q1", prompt="2 + 2 =", completion=" 4", value=-0.5, n_train=9)
        >>> Evidence(answers=(answer,))
        Evidence: 1 answer, 9 training examples
        q1  '2 + 2 =' → ' 4'  log_prob -0.5 nats
    """

    answers: tuple[Answer, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write a manifest with the facts, and one table each of answers, examples and totals."""
        with ArtifactWriter(folder, kind=KIND, facts=plain(self.facts), made_from={}) as writer:
            for name, rows in _rows(self.answers).items():
                writer.table(name, pa.Table.from_pylist(rows, schema=_SCHEMAS[name]))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Evidence":
        """Read what `save` wrote."""
        artifact = Artifact.open(folder, KIND)
        there = artifact.table_names  # an older version saved fewer tables
        rows = {n: artifact.table(n).to_pylist() if n in there else [] for n in _SCHEMAS}
        return cls(answers=_answers(rows), facts=dict(artifact.facts))

    def to_json(self, *, indent: int | None = None) -> str:
        """The whole result as strict JSON; what is not a finite number is null."""
        return json.dumps(plain(asdict(self)), allow_nan=False, indent=indent)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each query and ranked example; metadata in columns of its own.

        A metadata column whose name is taken is called `metadata.<name>`.
        """
        pandas = require("pandas", extra="tabular")
        rows = [
            _row(answer.query_id, side, rank, influencer)
            for answer in self.answers
            for side, rank, influencer in answer.ranked()
        ]
        columns = dict.fromkeys([*_COLUMNS, *(name for row in rows for name in row)])
        return pandas.DataFrame(rows, columns=list(columns))

    def plot(self, answer: int = 0, *, top: int = 8):
        """A bar for each of the strongest examples of an answer, with intervals and the range of noise.

        Needs the extra `plots`.

        Args:
            answer: Number of the answer.
            top: How many examples of each side.
        """
        pyplot = require("matplotlib.pyplot", extra="plots")
        asked = self.answers[answer]
        chosen = [*asked.raised[:top], *reversed(asked.lowered[:top])]
        figure, axes = pyplot.subplots(figsize=(7, 0.3 * len(chosen) + 1.2), layout="constrained")
        if asked.null_scale is not None:
            reach = 1.96 * asked.null_scale
            axes.axvspan(-reach, reach, color="0.9", label="95 % of held-out examples")
        colors = ["tab:blue" if i.score > 0 else "tab:orange" for i in chosen]
        axes.barh(range(len(chosen)), [i.score for i in chosen], color=colors)
        for row, i in enumerate(chosen):
            if i.low is not None and i.high is not None:
                axes.plot([i.low, i.high], [row, row], color="black", linewidth=1.2)
        names = [plain_text(title_of(i.example_id, i.metadata), 32) for i in chosen]
        axes.set_yticks(range(len(chosen)), names, parse_math=False)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel(plain_text(f"change of {asked.measurement} (nats)", 90), parse_math=False)
        title = f"{asked.prompt[-60:]} → {asked.completion}"
        axes.set_title(plain_text(title, 100), loc="left", fontsize="small", parse_math=False)
        if asked.null_scale is not None:
            axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __repr__(self) -> str:
        n_train = max((answer.n_train for answer in self.answers), default=0)
        head = f"Evidence: {_count(len(self.answers), 'answer')}, {n_train:,} training examples"
        return "\n".join([head, *(line for a in self.answers for line in _summary(a))])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _brief(text: str, width: int) -> str:
    """The text as a quoted literal, which escapes what a terminal would obey, cut to a width."""
    return repr(text if len(text) <= width else f"{text[: width - 1]}…")


def _name(text: str) -> str:
    """A short text, with what a terminal would obey escaped, without quotes."""
    return _brief(text, 24)[1:-1]


def _summary(answer: Answer, top: int = 3) -> Iterator[str]:
    asked = f"{_brief(answer.prompt, 40)} → {_brief(answer.completion, 24)}"
    measured = f"{_name(answer.measurement)} {answer.value:.4g} nats"
    yield f"{_name(answer.query_id)}  {asked}  {measured}"
    for _, rank, influencer in answer.ranked():
        if rank <= top:
            interval = ""
            if influencer.low is not None and influencer.high is not None:
                interval = f" [{influencer.low:.2g}, {influencer.high:.2g}]"
            score = f"{influencer.score:+.3g}{interval}"
            example = f"{_name(influencer.example_id)}  {_brief(influencer.text, 32)}"
            yield f"  {rank}  {score:<24}  {example}"


def plain(value: Any) -> Any:
    """The same value made of what strict JSON has: what is not a finite number becomes None.

    Example:
        >>> plain({"p": float("nan"), "shape": (2, 3)})
        {'p': None, 'shape': [2, 3]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return plain(value.tolist())
    return str(value)


def _text(text: str) -> str:
    """The text in Unicode that can be encoded: half surrogate pairs are replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _same_length(name: str, values: Sequence, other: str, expected: Sequence) -> None:
    if values and len(values) != len(expected):
        raise ValueError(
            f"{name} must be empty or have one value for each of the {len(expected)} {other}; "
            f"got {len(values)}."
        )


# The tables of a saved result. `answer` is the position of the answer a row belongs to.
_STRINGS, _FLOATS = pa.list_(pa.string()), pa.list_(pa.float64())
_SCHEMAS = {
    "answers": pa.schema(
        {
            "query_id": pa.string(),
            "prompt": pa.string(),
            "completion": pa.string(),
            "completion_tokens": _STRINGS,
            "completion_log_probs": _FLOATS,
            "measurement": pa.string(),
            "value": pa.float64(),
            "source_column": pa.string(),
            "null_scale": pa.float64(),
            "n_distinguishable": pa.int64(),
            "n_train": pa.int64(),
        }
    ),
    "influencers": pa.schema(
        {
            "answer": pa.int64(),
            "side": pa.string(),
            "rank": pa.int64(),
            "example_id": pa.string(),
            "score": pa.float64(),
            "low": pa.float64(),
            "high": pa.float64(),
            "significance": pa.float64(),
            "loss": pa.float64(),
            "tokens": _STRINGS,
            "token_scores": _FLOATS,
            "metadata": pa.string(),  # JSON, since columns may mix text and numbers
            "query_scores": _FLOATS,
        }
    ),
    "sources": pa.schema(
        {
            "answer": pa.int64(),
            "name": pa.string(),
            "raised": pa.float64(),
            "lowered": pa.float64(),
            "net": pa.float64(),
            "n": pa.int64(),
        }
    ),
    "layers": pa.schema({"answer": pa.int64(), "name": pa.string(), "share": pa.float64()}),
    "modules": pa.schema({"answer": pa.int64(), "name": pa.string(), "share": pa.float64()}),
    "rankings": pa.schema(
        {
            "answer": pa.int64(),
            "method": pa.string(),
            "about": pa.string(),
            "unit": pa.string(),
            "skipped": pa.string(),
        }
    ),
    "ranked": pa.schema(  # the examples of the rankings; `ranking` is the position among the answer's
        {
            "answer": pa.int64(),
            "ranking": pa.int64(),
            "rank": pa.int64(),
            "example_id": pa.string(),
            "score": pa.float64(),
            "tokens": _STRINGS,
            "metadata": pa.string(),
        }
    ),
}
_COLUMNS = (
    *("query_id", "rank", "side", "example_id"),
    *("score", "low", "high", "significance", "loss"),
)


def _rows(answers: Sequence[Answer]) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {name: [] for name in _SCHEMAS}
    for index, answer in enumerate(answers):
        rows["answers"].append(_fields(answer))
        for side, rank, influencer in answer.ranked():
            key = {"answer": index, "side": side, "rank": rank}
            rows["influencers"].append(key | _example(influencer))
        rows["sources"] += [{"answer": index} | _fields(source) for source in answer.sources]
        for table, shares in (("layers", answer.layers), ("modules", answer.modules)):
            rows[table] += [
                {"answer": index, "name": _text(name), "share": share}
                for name, share in shares.items()
            ]
        for number, ranking in enumerate(answer.rankings):
            rows["rankings"].append({"answer": index} | _fields(ranking))
            rows["ranked"] += [
                {"answer": index, "ranking": number, "rank": rank} | _example(influencer)
                for rank, influencer in enumerate(ranking.examples, start=1)
            ]
    return rows


def _example(influencer: Influencer) -> dict[str, Any]:
    metadata = json.dumps(plain(influencer.metadata), allow_nan=False)
    return _fields(influencer) | {"metadata": metadata}


def _fields(value: Answer | Influencer | SourceTotal | Ranking) -> dict[str, Any]:
    row = {f.name: getattr(value, f.name) for f in fields(value)}
    return {name: _encodable(v) for name, v in row.items()}


def _encodable(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encodable(v) for v in value]
    return _text(value) if isinstance(value, str) else value


def _answers(rows: dict[str, list[dict]]) -> tuple[Answer, ...]:
    tables = ("influencers", "sources", "layers", "modules", "rankings", "ranked")
    examples, sources, layers, modules, rankings, ranked = (_by_answer(rows[t]) for t in tables)
    return tuple(
        Answer(
            **_tuples(row),
            raised=_influencers(examples[index], "raised"),
            lowered=_influencers(examples[index], "lowered"),
            sources=tuple(SourceTotal(**_rest(r)) for r in sources[index]),
            layers={r["name"]: r["share"] for r in layers[index]},
            modules={r["name"]: r["share"] for r in modules[index]},
            rankings=_rankings(rankings[index], ranked[index]),
        )
        for index, row in enumerate(rows["answers"])
    )


def _by_answer(rows: list[dict]) -> dict[int, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["answer"]].append(row)
    return groups


def _influencers(rows: list[dict], side: Side) -> tuple[Influencer, ...]:
    return _in_order(row for row in rows if row["side"] == side)


def _in_order(rows: Iterable[dict]) -> tuple[Influencer, ...]:
    return tuple(
        Influencer(**(_rest(_tuples(row)) | {"metadata": json.loads(row["metadata"])}))
        for row in sorted(rows, key=lambda row: row["rank"])
    )


def _rankings(rows: list[dict], ranked: list[dict]) -> tuple[Ranking, ...]:
    return tuple(
        Ranking(**_rest(row), examples=_in_order(r for r in ranked if r["ranking"] == number))
        for number, row in enumerate(rows)
    )


_KEYS = ("answer", "side", "rank", "ranking")


def _rest(row: dict) -> dict:
    return {name: v for name, v in row.items() if name not in _KEYS}


def _tuples(row: dict) -> dict:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}


def _row(query_id: str, side: Side, rank: int, influencer: Influencer) -> dict[str, Any]:
    key = {"query_id": query_id, "rank": rank, "side": side}
    row = key | {n: getattr(influencer, n) for n in _COLUMNS if n not in key}
    return row | {
        f"metadata.{name}" if name in row else name: value
        for name, value in influencer.metadata.items()
    }
