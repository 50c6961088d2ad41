"""Claims from a person's sample: what is read, what is refused, and that the promise is the calibrator's."""

import csv

import pytest
import torch

from headwater.audit import Findings, Section, Verified, controlled, write_sheet
from headwater.calibrate import draw_sample, select

N = 400
IDS = [f"e{i}" for i in range(N)]


def findings() -> tuple[Findings, torch.Tensor]:
    """Scores that put the wrong labels last, but for a few, and which those are."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.arange(N) < 80
    score = torch.rand(N, generator=generator).double() * 0.5 + 0.5 * (~wrong).double()
    columns = {
        "label_score": score,
        "is_label_issue": torch.zeros(N, dtype=torch.bool),
        "given_label": torch.zeros(N, dtype=torch.int64),
    }
    section = Section(name="labels", title="Labels", sentences=("None.", "By ranks."))
    return Findings(ids=IDS, columns=columns, sections=(section,)), wrong


def verified(wrong: torch.Tensor, n: int = 150) -> Verified:
    sample = draw_sample(N, n, seed=3).tolist()
    return Verified(ids=tuple(IDS[i] for i in sample), wrong=tuple(wrong[sample].tolist()))


def test_marks_are_the_claims_and_what_was_verified_to_be_wrong():
    found, wrong = findings()
    seen = verified(wrong)
    marked = controlled(found, seen, confidence_level=0.9, false_claims=0.3)
    sample = torch.tensor([IDS.index(i) for i in seen.ids])
    expected = select(
        found.columns["label_score"],
        sample,
        wrong[sample],
        share=0.3,
        alpha=0.1,
        suspicious="low",
    )
    assert len(expected) > 10
    assert torch.equal(marked.columns["is_claimed"], expected.selected)
    issues = torch.as_tensor(marked.columns["is_label_issue"])
    assert torch.equal(issues, expected.selected | (wrong & torch.isin(torch.arange(N), sample)))
    assert marked.section("claims").sentences == (expected.sentence,)
    assert "90 % confidence at most 30 %" in expected.sentence
    assert marked.facts["claims"]["alpha"] == 0.1 and marked.sections[1].sentences[1] == "By ranks."


def test_a_sample_among_the_most_doubtful_claims_among_them_and_more():
    found, wrong = findings()
    pool = found.columns["label_score"].argsort(stable=True)[:120]
    sample = draw_sample(120, 60, seed=3)
    seen = Verified(
        ids=tuple(IDS[i] for i in pool[sample].tolist()), wrong=tuple(wrong[pool[sample]].tolist())
    )
    marked = controlled(found, seen, false_claims=0.4, among=120)
    expected = select(
        found.columns["label_score"][pool],
        sample,
        wrong[pool[sample]],
        share=0.4,
        alpha=0.05,
        suspicious="low",
    )
    claimed = torch.as_tensor(marked.columns["is_claimed"])
    assert sorted(claimed.nonzero().flatten().tolist()) == sorted(pool[expected.selected].tolist())
    assert int(claimed.sum()) > 10
    with pytest.raises(ValueError, match="are not among the 50 most doubtful"):
        controlled(found, seen, among=50)
    with pytest.raises(ValueError, match="among must be from 1 to 400 examples; got 401"):
        controlled(found, seen, among=401)


def test_a_sheet_of_random_examples_is_written_without_scores_and_read_back(tmp_path):
    found, wrong = findings()
    path = write_sheet(found, tmp_path / "sheet.csv", 25, seed=1, texts=[f"t{i}" for i in range(N)])
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == ["id", "is_wrong", "given_label", "text"] and len(rows) == 25
    assert [r["id"] for r in rows] == [
        IDS[i]
        for i in found.columns["label_score"]
        .argsort(stable=True)[draw_sample(N, 25, seed=1)]
        .tolist()
    ]
    with pytest.raises(
        ValueError, match=r"sheet\.csv:1: is_wrong of 'e\d+' must be yes or no; got ''"
    ):
        Verified.read(path)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for k, row in enumerate(rows):
            said = ("yes" if k % 2 else "TRUE") if wrong[IDS.index(row["id"])] else "0"
            writer.writerow(row | {"is_wrong": said})
    seen = Verified.read(path)
    assert [wrong[IDS.index(i)].item() for i in seen.ids] == list(seen.wrong)


def test_json_lines_are_read_as_well(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"id": "a", "is_wrong": true}\n\n{"id": 7, "is_wrong": false}\n')
    assert Verified.read(path) == Verified(ids=("a", "7"), wrong=(True, False))
    path.write_text('{"id": "a", "wrong": true}\n')
    with pytest.raises(ValueError, match="expected the columns id and is_wrong; got 'id', 'wrong'"):
        Verified.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "v.jsonl"),
        (b"5", "v.jsonl"),
        (b"\x81\xff", "is not UTF-8"),
        (b"", "holds no rows"),
    ],
)
def test_what_is_no_table_of_outcomes_is_refused_with_its_name(tmp_path, content, message):
    path = tmp_path / "v.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Verified.read(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Verified.read(tmp_path / "nothing.csv")


def test_texts_of_a_sheet_are_no_formulas(tmp_path):
    found, _ = findings()
    path = write_sheet(found, tmp_path / "sheet.csv", 3, texts=["=HYPERLINK(1)"] * N)
    assert {row["text"] for row in csv.DictReader(path.open())} == {"'=HYPERLINK(1)"}


def test_a_draw_that_cannot_be_made_leaves_no_sheet(tmp_path):
    found, _ = findings()
    for options in ({"n": N + 1}, {"n": 5, "among": 3}, {"n": 5, "seed": -1}):
        with pytest.raises(ValueError, match="Expected"):
            write_sheet(found, tmp_path / "sheet.csv", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_sample_is_refused_by_name():
    found, wrong = findings()
    with pytest.raises(ValueError, match="such as 'nobody'"):
        controlled(found, Verified(ids=("e1", "nobody"), wrong=(True, False)))
    with pytest.raises(ValueError, match="'e1' was verified twice"):
        Verified(ids=("e1", "e1"), wrong=(True, True))
    with pytest.raises(ValueError, match="got 0 and 0"):
        Verified(ids=(), wrong=())
    with pytest.raises(ValueError, match=r"false_claims must lie between 0 and 1; got 1\.0"):
        controlled(found, verified(wrong), false_claims=1.0)
    with pytest.raises(ValueError, match="confidence_level must lie between 0 and 1"):
        controlled(found, verified(wrong), confidence_level=95.0)


@pytest.mark.slow
def test_false_claims_pass_their_share_no_more_often_than_promised():
    found, wrong = findings()
    # a worse ranking, so that there is something to get wrong
    noise = torch.rand(N, generator=torch.Generator().manual_seed(5)).double()
    broken, draws = 0, 300
    score = found.columns["label_score"] + 0.8 * noise
    for seed in range(draws):
        sample = draw_sample(N, 100, seed=seed)
        got = select(score, sample, wrong[sample], share=0.2, alpha=0.1, suspicious="low")
        broken += int((got.selected & ~wrong).sum()) > 0.2 * max(1, len(got))
    assert broken / draws <= 0.1 + 3 * (0.1 * 0.9 / draws) ** 0.5


def test_a_confidence_near_one_is_kept_as_it_was_asked_for():
    found, wrong = findings()
    told = controlled(found, verified(wrong), confidence_level=1 - 1e-14)
    assert told.facts["claims"]["alpha"] == pytest.approx(1e-14, rel=1e-2)
    assert "99.99999999 %" in told.section("claims").sentences[0]
