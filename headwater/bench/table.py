"""A report as people read it: a table in Markdown, and quality against cost."""

from collections.abc import Sequence
from typing import Any

from headwater.bench.run import Report
from headwater.extras import require


def markdown(report: Report) -> str:
    """The report as Markdown: the protocol, the ceilings, and a row for each method."""
    noisy = any("auc_queries" in row for row in report.rows)
    columns = ["method", "knob", "expected effect, LDS", "fixed run, LDS", "passes", "MB"]
    columns += ["AUC, queries", "AUC, self-influence"] if noisy else []
    lines = [f"## {report.title}", "", *_preamble(report), ""]
    lines += [_line(columns), _line(["---"] * len(columns))]
    measured = [row for row in report.rows if "error" not in row]
    for row in sorted(measured, key=lambda r: -r["expected"]["value"]):
        lines.append(_line(_cells(row, noisy)))
    lines += ["", *_remarks(report)]
    return "\n".join(lines).rstrip() + "\n"


def _preamble(report: Report) -> list[str]:
    f, right = report.facts, ""
    if f["right"] is not None:
        halves = f.get("halves_right")
        others = "" if halves is None else f", those of halves {100 * halves:.1f} %"
        right = f" The first model answers {100 * f['right']:.1f} % of the queries rightly{others}."
    lines = [
        f"{f['parameters']:,} parameters, {f['train']:,} examples, {f['steps']} steps, {f['queries']} queries; asked: "
        f"the {f['measurement']}.{right} *Expected effect*: {f['subsets']} random halves (alpha {f['alpha']:g}), "
        f"{f['repeats']} retrainings of each with seeds of their own. *Fixed run*: the first model's run repeated "
        f"{f['subsets']} times without a random {100 * f['left_out']:g} % of the examples (alpha "
        f"{1 - f['left_out']:g}). All rows are reported on one half of queries and subsets; tuned ones were tuned on "
        "the other.",
        "",
    ]
    if f["ceiling"]:
        lines.append(f"- noise ceiling of the expected effect: {_estimate(f['ceiling'])}")
    else:
        lines.append("- no noise ceiling: every half was retrained once")
    if f["additive"]:
        lines.append(
            "- a ridge datamodel, learned from part of the retrainings and held against the others (the "
            f"ceiling of all sums where subsets far outnumber examples): {_estimate(f['additive'])}"
        )
    lines.append(
        f"- metasmoothness of the first model's run: {f['metasmoothness']:.2f} (near 1 its derivatives mean something)"
    )
    if f["loss_auc"]:
        lines.append(f"- AUC of wrong labels by an example's own loss: {_estimate(f['loss_auc'])}")
    return lines + [f"- **warning**: {text}" for text in f["warnings"]]


def _cells(row: dict[str, Any], noisy: bool) -> list[str]:
    name = f"**{row['name']}**" if row["name"] == "random" else row["name"]
    cells = [
        name,
        _knob(row),
        _estimate(row["expected"]) + _missing(row["expected"]),
        _estimate(row["fixed"]) + _missing(row["fixed"]),
        f"{row['fit_passes'] + row['passes']:.3g}",
        f"{row['memory'] / 1e6:.0f}",
    ]
    if noisy:
        for key in ("auc_queries", "auc_self"):
            cells.append(_estimate(row[key]) if row.get(key) else "")
    return cells


def _knob(row: dict[str, Any]) -> str:
    if not row["knob"]:
        return ""
    damping, ratio = row.get("damping"), row.get("damping_ratio")
    told = row["knob"]
    if damping and not row["tuned"]:
        unit = " × mean" if damping.get("unit") == "relative" else ""
        told = f"damping {damping['value']:.2g}{unit}"
        if damping["source"] != "given":
            told += f" = {_short(damping['source'])}"
    if ratio:
        told += f" ({ratio:.3g} × mean)"
    return f"{'tuned' if row['tuned'] else 'untuned'}: {told}"


def _short(source: str) -> str:
    """Where a damping comes from, in few words."""
    for long, short in (
        ("weight decay of the training run", "weight decay"),
        (" plus one over its horizon", " + 1/horizon"),
    ):
        source = source.replace(long, short)
    return source


def _remarks(report: Report) -> list[str]:
    """Failures, what was left out, and what methods warned of."""
    lines = [f"- failed: {row['name']}: {row['error']}" for row in report.rows if "error" in row]
    lines += [f"- not in the table: {name}: {reason}" for name, reason in report.left_out]
    for row in report.rows:
        kind = ", tuned" if row.get("tuned") else ""
        lines += [f"- {row['name']}{kind} warned: {note}" for note in row.get("notes", ())]
    return lines


def _estimate(found: dict[str, Any]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _missing(found: dict[str, Any]) -> str:
    return f" ({found['left_out']} queries left out)" if found["left_out"] else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points (cost, quality) that no other point beats in both, by cost.

    Example:
        >>> front([(1.0, 0.2), (2.0, 0.1), (3.0, 0.5)])
        [0, 2]
    """
    best, found = float("-inf"), []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def pareto_plot(report: Report, protocol: str = "expected"):
    """Quality against cost, the front of both, and the noise ceiling; needs the extra `plots`."""
    pyplot = require("matplotlib.pyplot", extra="plots")
    rows = [row for row in report.rows if "error" not in row]
    points = [(row["fit_passes"] + row["passes"], row[protocol]["value"]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for row, (cost, value) in zip(rows, points, strict=True):
        ends = [[value - row[protocol]["low"]], [row[protocol]["high"] - value]]
        color = "tab:orange" if row["tuned"] else "tab:blue"
        axes.errorbar(cost, value, yerr=ends, fmt="o", ms=4, lw=1, color=color)
    edge = front(points)
    axes.plot(*zip(*(points[i] for i in edge), strict=True), color="0.6", lw=1, zorder=0)
    for i in edge:
        name = rows[i]["name"] + (" (tuned)" if rows[i]["tuned"] else "")
        axes.annotate(
            name,
            points[i],
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )
    ceiling = report.facts["ceiling"]
    if ceiling and protocol == "expected":
        axes.axhline(ceiling["value"], ls="--", lw=1, color="0.4", label="noise ceiling")
    axes.plot([], [], "o", ms=4, color="tab:blue", label="untuned")
    axes.plot([], [], "o", ms=4, color="tab:orange", label="tuned on the other half")
    axes.set_xscale("log")
    axes.set_xlabel("cost in plain passes over the training data (fit and scores)")
    axes.set_ylabel("LDS, expected effect" if protocol == "expected" else "LDS, fixed run")
    axes.set_title(report.title)
    axes.legend(fontsize=8)
    return figure
