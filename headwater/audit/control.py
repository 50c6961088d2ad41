"""Claims with a bound on the false ones: "these 137 are wrong, with at most 10 % false claims at 95 % confidence".

A person looks at some training examples that were drawn at random (`write_sheet`, `Verified.read`) and says which
labels are wrong. `headwater.calibrate.claims` then claims the most doubtful of the others, as many as the promise
allows. It holds whatever the ranking is worth; a good one claims more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from headwater.audit.base import Findings, Section
from headwater.calibrate import draw_sample, select
from headwater.core.files import write_bytes
from headwater.data.text import cell, csv_bytes, read_rows
from headwater.numerics.batch_ranks import decimal

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
        """Read a CSV, JSONL or Parquet file with the columns `id` and `is_wrong` (true or false, 1 or 0, yes or no).

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no table, or a column or an outcome is missing; the message names the row.
        """
        ids, wrong = [], []
        for where, row in read_rows(path):
            if "id" not in row or WRONG not in row:
                raise ValueError(
                    f"{where}: expected the columns id and {WRONG}; got {', '.join(map(repr, row))}."
                )
            said = str(row[WRONG]).strip().lower()
            if said not in (*_YES, *_NO):
                raise ValueError(
                    f"{where}: {WRONG} of {row['id']!r} must be yes or no; got {row[WRONG]!r}. Every "
                    "example that was drawn must be looked at, else the sample is no random one."
                )
            ids.append(str(row["id"]))
            wrong.append(said in _YES)
        return cls(ids=tuple(ids), wrong=tuple(wrong))


def doubtful(findings: Findings, among: int | None = None) -> Int[Tensor, " pool"]:
    """Numbers of the `among` examples of lowest `label_score`, of which a sample is drawn; of all when left out.

    Raises:
        ValueError: There are not so many.
    """
    n = len(findings) if among is None else among
    if not 1 <= n <= len(findings):
        raise ValueError(f"among must be from 1 to {len(findings)} examples; got {n}.")
    score = torch.as_tensor(findings.columns["label_score"]).double()
    return score.argsort(stable=True)[:n]


def write_sheet(
    findings: Findings,
    path: str | Path,
    n: int,
    *,
    among: int | None = None,
    seed: int = 0,
    texts: Sequence[str] = (),
) -> Path:
    """Write a CSV file of n examples drawn at random, for a person to fill in the column `is_wrong`.

    Neither scores nor predictions are shown, which would sway the person.

    Args:
        findings: Of which examples.
        path: The file.
        n: How many to draw.
        among: Draw from so many of the most doubtful examples, and claim among them; more is claimed for the same work
            where few labels are wrong.
        seed: Seed of the draw.
        texts: How all examples read, where they have texts.
    """
    path = Path(path)
    given = findings.columns.get("given_label")
    pool = doubtful(findings, among)
    drawn = pool[draw_sample(len(pool), n, seed=seed)].tolist()
    columns: dict[str, list] = {"id": [findings.ids[i] for i in drawn], WRONG: [""] * len(drawn)}
    if given is not None:
        columns["given_label"] = [int(given[i]) for i in drawn]
    if texts:
        columns["text"] = [cell(texts[i]) for i in drawn]
    write_bytes(path, csv_bytes(columns))
    return path


def controlled(
    findings: Findings,
    verified: Verified,
    *,
    confidence_level: float = 0.95,
    false_claims: float = 0.1,
    among: int | None = None,
) -> Findings:
    """The findings with labels marked by claims that keep a promise, and the verified wrong ones.

    Args:
        findings: With a column `label_score`.
        verified: Examples drawn at random, and what was found.
        confidence_level: Probability that the promise is kept.
        false_claims: Share of the claims that may be false.
        among: Of how many of the most doubtful examples the verified ones are a random sample; all when left out.
            Claims are made among them. Choose it before the sample is looked at.

    Returns:
        Findings whose `is_label_issue` marks the claims and what was verified to be wrong, with a column `is_claimed`
        and a section that says the promise.

    Raises:
        ValueError: A verified example is unknown or not among the most doubtful, or a level is not between 0 and 1.
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
    pool = doubtful(findings, among)
    place = {i: k for k, i in enumerate(pool.tolist())}
    beyond = [i for i in verified.ids if number[i] not in place]
    if beyond:
        raise ValueError(
            f"{len(beyond)} verified examples, such as {beyond[0]!r}, are not among the {len(pool)} most doubtful; "
            "give the `among` that the sample was drawn with."
        )
    looked_at = torch.tensor([number[i] for i in verified.ids])
    outcome = torch.tensor(verified.wrong)
    score = torch.as_tensor(findings.columns["label_score"]).double()
    found = select(
        score[pool],
        torch.tensor([place[i] for i in looked_at.tolist()]),
        outcome,
        share=false_claims,
        alpha=float(1 - decimal(confidence_level)),
        suspicious="low",
    )
    claimed = torch.zeros(len(findings), dtype=torch.bool)
    claimed[pool[found.selected]] = True
    wrong = claimed.clone()
    wrong[looked_at[outcome]] = True
    section = Section(
        name="claims",
        title="Claims with error control",
        sentences=(found.sentence,),
        columns=("is_claimed",),
        papers=tuple(found.papers),
    )
    labels = findings.section("labels")
    told = replace(
        labels,
        sentences=(
            f"{int(wrong.sum()):,} of {len(findings):,} {findings.judged} are marked: {int(claimed.sum()):,} claimed "
            f"with error control, and {int(outcome.sum()):,} that were verified to be wrong.",
            *labels.sentences[1:],
        ),
    )
    rest = tuple(told if s.name == "labels" else s for s in findings.sections)
    at = [s.name for s in rest].index("labels")
    columns = findings.columns | {"is_label_issue": wrong, "is_claimed": claimed}
    facts = findings.facts | {"claims": found.facts, "marked_by": found.sentence}
    return replace(
        findings, columns=columns, sections=(*rest[:at], section, *rest[at:]), facts=facts
    )
