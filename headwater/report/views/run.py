"""A run folder as a page shows it: what it holds, what it cost, its curvature's spectrum, and each saved result.

Everything is read from the folder, as much as is shown and not more; nothing is computed with the model. Results are
asked for by the ids of the folder's own listing, so that none leads out of it.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.display import title_of
from headwater.core.evidence import Evidence
from headwater.core.files import ArtifactError, ArtifactMissing, read_json
from headwater.core.store import Artifact
from headwater.report import text
from headwater.report.views import corpus
from headwater.report.views.answer import CELL, NAME, Named, harmless, minus, trace_view
from headwater.report.views.folders import folders, id_of, inside
from headwater.trace.timeline import Timeline
from headwater.training.changes import ChangeSet
from headwater.training.trajectory import FILE as TRAJECTORY
from headwater.training.verify import Verification

RUN, FINETUNE = "run.json", "finetune.json"
CHANGES = "changes.json"
_POINTS = 60  # of a curve
_SAMPLE = 1 << 20  # eigenvalues of a layer that are looked at
_ROUNDING = 1e-10  # of the largest eigenvalue: what is below counts as zero
_SIDE = 2_048  # of a matrix whose eigenvalues are worked out
_STRONGEST = 5


def overview(run: str | Path) -> dict[str, Any]:
    """What a run folder holds.

    Args:
        run: The run folder.

    Raises:
        ArtifactMissing: It is none.
    """
    run = Path(run)
    record = run_record(run)
    asked = record["fit"]
    fit, damage = _fit(run)
    model = Path(str(asked.get("model", "")))
    named = traces(run)
    return harmless(
        {
            "name": run.resolve().name,
            "model": "/".join(model.parts[-2:]),
            "corpus": "/".join(Path(str(asked.get("data", ""))).parts[-2:]),
            "n_train": _n_train(run, fit),
            "task": "" if fit is None else str(fit.made_from.get("task", "")),
            "has": {
                "index": (run / "index").is_dir(),
                "heldout": asked.get("heldout") is not None,
                "survey": corpus.surveyed(run),
                "trajectory": _is_file(model / TRAJECTORY),
                "finetuned": _is_file(model / FINETUNE),
            },
            "columns": corpus.columns(run),
            "facts": [*damage, *_facts(run, record, fit)],
            "costs": _costs(run, record, fit),
            "spectrum": [] if fit is None else spectrum(run / "fit"),
            "coverage": _coverage(fit),
            "traces": named,
            "verifications": [
                {"id": key, "title": _title(path, found)}
                for key, (path, found) in _readable(run).items()
            ],
            "timelines": [
                {"id": key, "name": folder.parent.name} for key, folder in _timelines(run).items()
            ],
        }
    )


def run_record(run: str | Path) -> dict[str, Any]:
    """The record of a run folder.

    Raises:
        ArtifactMissing: The folder has none.
    """
    record = read_json(Path(run) / RUN)
    if not isinstance(record, dict):
        raise ArtifactMissing(f"{Path(run) / RUN} holds no record of a run.")
    parts = ("fit", "cost", "timelines")
    return record | {name: _mapping(record.get(name)) for name in parts}


def _is_file(path: Path) -> bool:
    """Whether there is a file; one whose name cannot be looked up is not there."""
    try:
        return path.is_file()
    except OSError:
        return False


def _mapping(value: Any) -> dict[str, Any]:
    """The value, if it is one of names and values, else none of them."""
    return value if isinstance(value, dict) else {}


def traces(run: str | Path) -> list[dict[str, Any]]:
    """Ids and names of the saved traces with what each asked, the newest first."""
    return [
        {
            "id": key,
            "name": folder.name,
            "asked": [
                {"prompt": text.shortened(p, NAME * 4), "completion": text.shortened(c, NAME * 4)}
                for p, c in _asked(run, folder)
            ],
        }
        for key, folder in trace_folders(run).items()
    ]


def trace_folders(run: str | Path) -> dict[str, Path]:
    """Folders of the saved traces by id, the newest first."""
    found = folders(Path(run) / "traces")
    return dict(sorted(found.items(), key=lambda pair: (-_time(pair[1]), pair[0])))


def trace(run: str | Path, key: str) -> dict[str, Any]:
    """A saved trace, with the numbers of its examples where they are known.

    Raises:
        ArtifactMissing: There is no trace of that id.
        LeadsOut: A file of it is a link that leads out of the run.
    """
    folder = _of_id(run, trace_folders(run), key, "trace")
    return {"id": key} | trace_view(Evidence.load(folder), folder.name, corpus.numbers(run))


def verification(run: str | Path, key: str) -> dict[str, Any]:
    """A saved verification: predicted beside actual changes, the random control among them.

    Raises:
        ArtifactMissing: There is no verification of that id.
        LeadsOut: A file of it is a link that leads out of the run.
    """
    path = _of_id(run, _verifications(Path(run)), key, "verification")
    found = Verification.load(path)
    return verification_view(found, key, _title(path, found))


def verification_id(path: Path) -> str:
    """What the verification in a file is asked for by."""
    return id_of(f"{path.parent.name}-{path.stem}")


def verification_view(found: Verification, key: str = "", title: str = "") -> dict[str, Any]:
    """A verification as pages show it."""
    digits = text.decimals(v for o in found.outcomes for v in (o.predicted, o.actual))
    return harmless(
        {
            "id": key,
            "title": title or _described(found),
            "told": _verdict(found),
            "rows": [
                {
                    "change": text.shortened(o.change, NAME * 2),
                    "query": text.shortened(o.query_id, NAME * 2),
                    "control": o.control,
                    "predicted": minus(text.signed(o.predicted, digits)),
                    "actual": minus(text.signed(o.actual, digits)),
                    "predicted_value": o.predicted,
                    "actual_value": o.actual,
                    "spread": minus(text.interval(o.low, o.high, digits)),
                }
                for o in found.outcomes
            ],
            "facts": [
                ("Measured", found.measurement),
                ("Protocol", found.protocol),
                *(
                    (name.replace("_", " "), text.shortened(text.quantity(value), CELL))
                    for name, value in found.facts.items()
                ),
            ],
        }
    )


def timeline(run: str | Path, key: str) -> dict[str, Any]:
    """A saved timeline: what each stretch of training added to each query.

    Raises:
        ArtifactMissing: There is no timeline of that id.
        LeadsOut: A file of it is a link that leads out of the run.
    """
    folder = _of_id(run, _timelines(Path(run)), key, "timeline")
    name = folder.parent.name
    asked = _mapping(run_record(run)["timelines"].get(name))
    return {"id": key} | timeline_view(Timeline.load(folder), name, asked.get("source"))


def timeline_view(found: Timeline, name: str = "", column: str | None = None) -> dict[str, Any]:
    """A timeline as pages show it.

    Args:
        found: The timeline.
        name: Its name.
        column: Metadata column to total by.
    """
    column = column if column in found.metadata else None
    place = {example: i for i, example in enumerate(found.train_ids)}
    queries = []
    for query, asked in enumerate(found.queries):
        rows = found.rows(query, top=_STRONGEST, column=column)
        digits = text.decimals(row[key] for row in rows for key in ("raised", "lowered"))
        segments = [
            {key: row[key] for key in ("start", "stop", "stage", "net", "raised", "lowered")}
            | {
                "strongest": [
                    (_called(found, place, example), minus(text.signed(score, digits)))
                    for example, score in row["strongest"]
                ],
                "totals": [
                    (text.shortened(each, NAME), minus(text.signed(value, digits)))
                    for each, value in _largest(row.get("totals", {}))
                ],
            }
            for row in rows
        ]
        queries.append({"text": text.shortened(asked, NAME * 8), "segments": segments})
    told = (
        f"Change of {found.measurement} at the end of training in nats, were an example counted once more in that "
        "stretch; expected over orders of the examples, by SOURCE."
    )
    if found.gap is not None:
        told += f" The sum is the attribution made as a whole, to {found.gap:.2g} nats."
    return harmless(
        {"name": name, "measurement": found.measurement, "queries": queries, "told": told}
    )


def changes(run: str | Path) -> dict[str, Any] | None:
    """The draft of a change set, change by change; None where there is none.

    Raises:
        ArtifactDamaged: The file is no change set.
        LeadsOut: It is a link that leads out of the run.
    """
    path = inside(run, Path(run) / CHANGES)
    if path.is_symlink() or not path.is_file():
        return None
    found, about = ChangeSet.load(path), read_json(path).get("about")
    about = about if isinstance(about, dict) else {}  # what only the page knows, in its order
    made = {
        **{name: {"action": "remove"} for name in found.remove},
        **{name: {"action": "relabel", "label": str(v)} for name, v in found.relabel.items()},
        **{name: {"action": "keep"} for name in found.keep},
        **{
            name: {"action": "duplicate" if v == 2 else "upweight", "weight": v}
            for name, v in found.weights.items()
        },
    }
    order, place = {name: i for i, name in enumerate(about)}, corpus.numbers(run)
    listed = []
    for name in sorted(made, key=lambda each: order.get(each, len(order))):
        known = about[name] if isinstance(about.get(name), dict) else {}
        note, number = known.get("note"), known.get("number")
        told = {"note": note} if isinstance(note, str) else {}
        number = place.get(name, number if isinstance(number, int) else None)
        listed.append({"id": Named(name), "number": number, **made[name], **told})
    return harmless({"name": found.name, "changes": listed})


def spectrum(fit: str | Path) -> list[dict[str, Any]]:
    """Eigenvalues of each layer of a saved fit, as curves over the share of the rank."""
    return [dict(each) for each in _spectrum(str(fit), corpus.stamp(Path(fit)))]


@lru_cache(maxsize=8)
def _spectrum(fit: str, stamp: Any) -> tuple[dict[str, Any], ...]:
    found = []
    artifact = Artifact.open(fit, kind="fit")
    kind = _kind(artifact)
    for layer, values, of in _eigenvalues(artifact):
        curve, told = points(values)
        if len(values) < of:
            told = f"{told} (of a sample of {len(values):,} of {of:,})"
        found.append({"layer": layer, "kind": kind, "points": curve, "told": told})
    return tuple(found)


def points(values: Float[Tensor, " n"]) -> tuple[list[tuple[float, float]], str]:
    """A curve of eigenvalues, the largest first: share of the rank and log₁₀, and what it tells in words.

    Half of at most sixty ranks are evenly spaced, half by their logarithm.

    Example:
        >>> points(torch.tensor([1.0, 100.0, 0.0]))[0]
        [(0.3333, 2.0), (0.6667, 0.0)]
    """
    ordered = values.double().sort(descending=True).values
    n = len(ordered)
    floor = _ROUNDING * float(ordered[0]) if n else 0.0
    positive = ordered[ordered > max(floor, 0.0)]
    if not len(positive):
        return [], f"all of {n:,} eigenvalues are zero"
    last, half = len(positive), _POINTS // 2
    ranks = torch.logspace(0, math.log10(last), half, dtype=torch.float64)
    even = torch.linspace(1, last, half, dtype=torch.float64)
    chosen = torch.cat([ranks, even]).round().long().clamp(1, len(positive)).unique().tolist()
    curve = [(round(r / n, 4), round(math.log10(float(positive[r - 1])), 3)) for r in chosen]
    share = positive.cumsum(0) / positive.sum()
    most = int((share < 0.5).sum()) + 1
    told = (
        f"{n:,} eigenvalues from {float(positive[0]):.2g} down to {float(positive[-1]):.2g}; "
        f"the largest {most:,} make up half of their sum"
    )
    if len(positive) < n:
        told += f"; {n - len(positive):,} are zero, or so by rounding"
    return curve, told


def _eigenvalues(artifact: Artifact) -> Iterator[tuple[str, Tensor, int]]:
    """Eigenvalues of each layer, or of a sample of them, and how many there are."""
    names = set(artifact.tensor_names)
    if "n_folds" in names and any(n.startswith("sums:") for n in names):
        n = max(float(artifact.tensor("n_folds").sum()), 1e-30)
        for name in artifact.tensor_names:
            if name.startswith("sums:"):
                sums = artifact.tensor(name)
                of = sums[0].numel()
                step = max(1, math.ceil(of / _SAMPLE))
                parts = sums.flatten(1)[:, ::step].double()
                yield name.removeprefix("sums:"), parts.sum(0) / n, of
    for name in ("gram", "matrix"):  # over examples, and over parameters
        if name in names and artifact.manifest["tensors"][name]["shape"][0] <= _SIDE:
            matrix = artifact.tensor(name).double()
            if name == "gram":
                matrix = matrix / max(float(artifact.tensor("n_folds").sum()), 1e-30)
            yield "all layers", torch.linalg.eigvalsh(matrix), matrix.shape[0]


def _kind(artifact: Artifact) -> str:
    options = artifact.facts.get("fit", {}).get("options", {})
    return str(options.get("curvature", {}).get("kind", artifact.facts["curvature"]["kind"]))


def _fit(run: Path) -> tuple[Artifact | None, list[tuple[str, str]]]:
    """The fit, if there is one that can be read, and else what is wrong with it."""
    try:
        return Artifact.open(run / "fit", kind="fit"), []
    except ArtifactMissing:
        return None, []
    except ArtifactError as error:
        return None, [("The fit cannot be read", text.shortened(str(error), CELL))]


def _readable(run: Path) -> dict[str, tuple[Path, Verification]]:
    """The verifications; a file that holds none is left out."""
    found = {}
    for key, path in _verifications(run).items():
        try:
            found[key] = path, Verification.load(path)
        except ArtifactError:
            continue
    return found


def _n_train(run: Path, fit: Artifact | None) -> int | None:
    known = corpus.n_train(run)
    if known is not None:
        return known
    if fit is not None and "n_train" in fit.facts:
        return int(fit.facts["n_train"])
    told = [_trace_facts(run, folder).get("n_train") for folder in trace_folders(run).values()]
    if any(told):
        return max(int(n) for n in told if n)
    if fit is not None and "n_folds" in fit.tensor_names:
        return round(float(fit.tensor("n_folds").sum()))
    return None


def _facts(run: Path, record: Mapping[str, Any], fit: Artifact | None) -> list[tuple[str, str]]:
    rows, asked = [], record["fit"]
    if asked.get("heldout") is not None:
        rows.append(("Held-out data", "/".join(Path(str(asked["heldout"])).parts[-2:])))
    if fit is not None:
        known = fit.facts.get("fit", {})
        options = known.get("options", {})
        rows.append(("Curvature", text.quantity(options.get("curvature", _kind(fit)))))
        rows.append(("Followed", text.quantity(options.get("layers", "not recorded"))))
        for name, value in fit.facts["curvature"].get("facts", {}).items():
            rows.append((name.replace("_", " "), text.quantity(value)))
        for key, label in (
            ("weight_decay", "Weight decay"),
            ("horizon", "Horizon"),
            ("distance", "Distance moved, squared"),
            ("versions", "Versions"),
        ):
            if known.get(key) is not None:
                rows.append((label, text.quantity(known[key])))
        rows.append(("Made", str(fit.manifest.get("created", ""))))
    return [(text.shortened(k, NAME), text.shortened(v, CELL)) for k, v in rows]


def _costs(run: Path, record: Mapping[str, Any], fit: Artifact | None) -> list[dict[str, Any]]:
    """What everything cost, in passes over the data and in seconds, as far as it was recorded."""
    paid = record["cost"]
    unit = paid.get("pass_seconds")
    seconds = paid.get("fit_seconds")
    if seconds is None and fit is not None:
        seconds = fit.facts.get("fit", {}).get("seconds")
    rows = [] if fit is None else [_cost("fit", seconds, unit)]
    for folder in trace_folders(run).values():
        facts = _trace_facts(run, folder)
        spent, passes = facts.get("seconds"), facts.get("cost")
        spent = spent.get("trace") if isinstance(spent, dict) else spent
        passes = passes.get("trace") if isinstance(passes, dict) else passes
        if spent is None and "seconds_search" in facts:
            spent = facts.get("seconds_queries", 0.0) + facts["seconds_search"]
        rows.append(_cost(f"trace {folder.name}", spent, unit, passes))
    known = corpus.facts(run)
    if known is not None:
        passes, told = known.get("n_passes"), str(known.get("passes", ""))
        rows.append(_cost("survey", known.get("seconds"), None, passes, "" if passes else told))
    for key, (_, found) in _readable(run).items():
        runs = found.facts.get("runs")
        told = "" if runs is None else f"{runs} trainings"
        rows.append(_cost(f"verification {key}", None, unit, told=told))
    return rows


def _cost(name: str, seconds: Any, unit: Any, passes: Any = None, told: str = "") -> dict[str, Any]:
    seconds, unit, passes = (
        float(v) if isinstance(v, int | float) and math.isfinite(v) else None
        for v in (seconds, unit, passes)
    )
    if passes is None and seconds is not None and unit:
        passes = seconds / unit
    parts = [told] if told else []
    if passes is not None:
        parts.append(f"{passes:.3g} pass{'es' * (passes != 1)} over the data")
    if seconds is not None:
        parts.append(text.duration(seconds))
    return {
        "name": name,
        "passes": passes,
        "seconds": seconds,
        "told": " · ".join(parts) or "not recorded",
    }


def _coverage(fit: Artifact | None) -> dict[str, Any]:
    """Which parameters the fit follows, and which it leaves out."""
    if fit is None:
        return {"followed": "there is no fit", "share": 0.0, "rows": []}
    layers = fit.facts.get("layers", [])
    rows = [
        {
            "name": text.shortened(layer["name"], NAME * 2),
            "kind": str(layer.get("kind", "")),
            "parameters": f"{_numel(layer):,}",
            "state": "followed",
        }
        for layer in layers
    ]
    inside = sum(map(_numel, layers))
    left = fit.facts.get("left_out")
    if left is None:
        told = f"{inside:,} parameters in {len(layers)} layers; what is left out is not recorded"
        return {"followed": told, "share": 1.0, "rows": rows}
    rows += [
        {
            "name": text.shortened(each["name"], NAME * 2),
            "kind": "",
            "parameters": f"{each['numel']:,}",
            "state": text.shortened(str(each["why"]), NAME * 2),
        }
        for each in left
    ]
    whole = inside + sum(each["numel"] for each in left)
    share = inside / max(whole, 1)
    told = f"{inside:,} of {whole:,} parameters ({100 * share:.3g} %) in {len(layers)} layers"
    return {"followed": told, "share": share, "rows": rows}


def _numel(layer: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for shape in layer.get("shapes", [])) or math.prod(layer["shape"])


def _asked(run: str | Path, folder: Path) -> list[tuple[str, str]]:
    """Prompts and completions of a saved trace, without its examples."""
    try:
        artifact = Artifact.open(inside(run, folder), "evidence")
        table = artifact.table("answers").select(["prompt", "completion"])
    except ArtifactError:
        return []
    return [(row["prompt"], row["completion"]) for row in table.to_pylist()]


def _trace_facts(run: Path, folder: Path) -> dict[str, Any]:
    try:
        return Artifact.open(inside(run, folder), "evidence").facts
    except ArtifactError:
        return {}


def _timelines(run: Path) -> dict[str, Path]:
    """Folders of the timelines by id."""
    found = folders(run / "timelines")
    return {key: folder / "data" for key, folder in found.items() if (folder / "data").is_dir()}


def _verifications(run: Path) -> dict[str, Path]:
    """Files of the verifications by id, the newest first."""
    found = {}
    for folder in folders(run / "verify").values():
        for path in folder.glob("*.json"):
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                found[verification_id(path)] = path
    return dict(sorted(found.items(), key=lambda pair: (-pair[1].stat().st_mtime_ns, pair[0])))


def _title(path: Path, found: Verification) -> str:
    return text.shortened(f"{path.parent.name}: {_described(found)}", NAME * 2)


def _described(found: Verification) -> str:
    changes = dict.fromkeys(o.change for o in found.outcomes if not o.control)
    return f"{'; '.join(changes)} ({found.protocol})"


def _verdict(found: Verification) -> str:
    """What the comparison with the random control came to."""
    won, further = found.beats_chance, found.exceeds_chance
    told = f"Predicted and actual change of {found.measurement} in nats, {found.protocol}."
    if "change_set" in found.facts:
        return (
            f"{told} The changes moved {sum(further)} of {len(further)} measurements further than the same done to "
            "others at random did."
        )
    if not won:
        return told
    return (
        f"{told} Leaving out the named examples moved {sum(won)} of {len(won)} measurements further down than leaving "
        "out as many at random did."
    )


def _called(found: Timeline, place: Mapping[str, int], example: str) -> str:
    number = place[example]
    metadata = {name: column[number] for name, column in found.metadata.items()}
    return text.shortened(title_of(example, metadata), NAME)


def _largest(totals: Mapping[str, float], most: int = 8) -> list[tuple[str, float]]:
    return sorted(totals.items(), key=lambda pair: -abs(pair[1]))[:most]


def _of_id(run: str | Path, found: Mapping[str, Path], key: str, what: str) -> Path:
    if key not in found:
        there = ", ".join(text.shortened(n, NAME) for n in list(found)[:8]) or "none"
        raise ArtifactMissing(f"There is no {what} {key!r}; there are: {there}.")
    return inside(run, found[key])


def _time(folder: Path) -> int:
    try:
        return (folder / "manifest.json").stat().st_mtime_ns
    except OSError:
        return 0
