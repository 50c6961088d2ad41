"""Claims with a bound on the false ones: "these 137 are wrong, with at most 10 % false claims at 95 % confidence".

A person looks at some training examples that were drawn at random (`write_sheet`, `Verified.read`) and says which
labels are wrong. `headwater.calibrate.claims` then claims the most doubtful of the others, as many as the promise
allows. It holds whatever the ranking is worth; a good one claims more.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headwater.audit.base import Findings, Section
from headwater.calibrate import draw_sample, select

WRONG = "is_wrong"  # the column that a person fills in
_YES, _NO = ("1", "true", "yes", "y", "wrong"), ("0", "false", "no", "n", "right")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a person found of some training examples.

    Args:
        ids: Their ids.
        wrong: Whether the label is wrong.

    Raises:
        ValueError: There is none, or one is named twice.
    """

    ids: tuple[str, ...]
    wrong: tuple[bool, ...]

    def __post_init__(self):
        if not self.ids or len(self.ids) != len(self.wrong):
            raise ValueError(
                f"Expected verified examples with an outcome each; got {len(self.ids)} and {len(self.wrong)}."
            )
        if len(set(self.ids)) < len(self.ids):
            twice = next(i for i in self.ids if self.ids.count(i) > 1)
            raise ValueError(f"Example {twice!r} was verified twice; name each once.")

    @classmethod
    def read(cls, path: str | Path) -> "Verified":
        """Read a CSV or JSONL file with the columns `id` and `is_wrong` (true or false, 1 or 0, yes or no).

        Raises:
            ValueError: A column or an outcome is missing; the message names the row.
        """
        path = Path(path)
        ids, wrong = [], []
        for number, row in enumerate(_rows(path), start=1):
            if "id" not in row or WRONG not in row:
                raise ValueError(
                    f"{path}, row {number}: expected the columns id and {WRONG}; got {', '.join(map(str, row))}."
                )
            said = str(row[WRONG]).strip().lower()
            if said not in (*_YES, *_NO):
                raise ValueError(
                    f"{path}, row {number}: {WRONG} of {row['id']!r} must be yes or no; got {row[WRONG]!r}. Every "
                    "example that was drawn must be looked at, else the sample is no random one."
                )
            ids.append(str(row["id"]))
            wrong.append(said in _YES)
        return cls(ids=tuple(ids), wrong=tuple(wrong))


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix in (".jsonl", ".ndjson"):
            return [json.loads(line) for line in file if line.strip()]
        return list(csv.DictReader(file))


def write_sheet(
    findings: Findings, path: str | Path, n: int, *, seed: int = 0, texts: Sequence[str] = ()
) -> Path:
    """Write a CSV file of n examples drawn at random, for a person to fill in the column `is_wrong`.

    Neither scores nor predictions are shown, which would sway the person.

    Args:
        findings: Of which examples.
        path: The file.
        n: How many to draw.
        seed: Seed of the draw.
        texts: How all examples read, where they have texts.
    """
    path = Path(path)
    given = findings.columns.get("given_label")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        labelled = ["given_label"] if given is not None else []
        writer.writerow(["id", WRONG, *labelled, *(["text"] if texts else [])])
        for i in draw_sample(len(findings), n, seed=seed).tolist():
            label = [int(given[i])] if given is not None else []
            writer.writerow([findings.ids[i], "", *label, *([texts[i]] if texts else [])])
    return path


def controlled(
    findings: Findings,
    verified: Verified,
    *,
    confidence_level: float = 0.95,
    false_claims: float = 0.1,
) -> Findings:
    """The findings with labels marked by claims that keep a promise, and the verified wrong ones.

    Args:
        findings: With a column `label_score`.
        verified: Examples drawn at random, and what was found.
        confidence_level: Probability that the promise is kept.
        false_claims: Share of the claims that may be false.

    Returns:
        Findings whose `is_label_issue` marks the claims and what was verified to be wrong, with a column `is_claimed`
        and a section that says the promise.

    Raises:
        ValueError: A verified example is unknown, or a level is not between 0 and 1.
    """
    for name, value in (("confidence_level", confidence_level), ("false_claims", false_claims)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1; got {value}.")
    number = {name: i for i, name in enumerate(findings.ids)}
    unknown = [i for i in verified.ids if i not in number]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(verified.ids)} verified examples are not in the training data, such as "
            f"{unknown[0]!r}."
        )
    looked_at = torch.tensor([number[i] for i in verified.ids])
    outcome = torch.tensor(verified.wrong)
    score = torch.as_tensor(findings.columns["label_score"]).double()
    found = select(
        score,
        looked_at,
        outcome,
        share=false_claims,
        alpha=round(1 - confidence_level, 12),
        suspicious="low",
    )
    wrong = found.selected.clone()
    wrong[looked_at[outcome]] = True
    section = Section(
        name="claims",
        title="Claims with error control",
        sentences=(found.sentence,),
        columns=("is_claimed",),
        shown=tuple(findings.top(0)),
        papers=tuple(found.papers),
    )
    labels = findings.section("labels")
    told = replace(
        labels,
        sentences=(
            f"{int(wrong.sum()):,} of {len(findings):,} labels are marked: {int(found.selected.sum()):,} claimed with "
            f"error control, and {int(outcome.sum()):,} that were verified to be wrong.",
            *labels.sentences[1:],
        ),
    )
    rest = tuple(told if s.name == "labels" else s for s in findings.sections)
    at = [s.name for s in rest].index("labels")
    columns = findings.columns | {"is_label_issue": wrong, "is_claimed": found.selected}
    facts = findings.facts | {"claims": found.facts, "marked_by": found.sentence}
    return replace(
        findings, columns=columns, sections=(*rest[:at], section, *rest[at:]), facts=facts
    )
