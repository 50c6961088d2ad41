"""Findings: columns, files, and the change set that they hand over."""

import json

import pytest
import torch

from headwater.audit import Findings, Passes, Section, Table
from headwater.audit.base import joined
from headwater.training.changes import ChangeSet


def picture() -> torch.Tensor:
    return torch.arange(12, dtype=torch.uint8).view(1, 3, 4)


def findings(**more) -> Findings:
    columns = {
        "label_score": torch.tensor([0.9, 0.2, 0.1, 0.4]).double(),
        "is_label_issue": torch.tensor([False, True, True, False]),
        "given_label": torch.tensor([0, 1, 2, 0]),
        "predicted_label": torch.tensor([0, 2, 2, 1]),
        "forgetting": torch.tensor([0.0, 1.0, torch.inf, 2.0]).double(),
        "note": ["a", "b", "<b>c", "d"],
    }
    section = Section(
        name="labels",
        title="Labels",
        sentences=("Two are wrong.",),
        tables=(Table(title="Measures", columns={"measure": ["loss"], "cost": ["0"]}),),
        columns=tuple(columns),
        shown=(2, 1),
        passes=Passes(forward=2),
        seconds=0.5,
        papers=("arXiv:1703.04730",),
    )
    given = {
        "ids": ["w", "x", "y", "z"],
        "columns": columns,
        "sections": (section,),
        "metadata": {"source": ["web", "web", "book", None]},
        "texts": {2: "<script>"},
        "facts": {"made_from": {"model": "m" * 32}},
    }
    return Findings(**given | more)


def test_the_most_doubtful_come_first_and_marked_ones_before_others():
    found = findings()
    assert found.issues == [2, 1] and found.top(3) == [2, 1, 3] and len(found) == 4
    assert found.passes == Passes(forward=2) and found.section("labels").shown == (2, 1)
    with pytest.raises(ValueError, match="no section 'outliers'; there are: labels"):
        found.section("outliers")


def test_a_change_set_relabels_where_another_label_is_known_and_removes_the_rest():
    changes = findings().change_set()
    assert changes == ChangeSet(name="the audit's changes", remove=("y",), relabel={"x": 2})
    assert findings().change_set(relabel=False).remove == ("y", "x")
    kept = findings().change_set(keep=("y",))
    assert kept.keep == ("y",) and kept.remove == () and kept.relabel == {"x": 2}


def test_pictures_are_saved_with_their_examples(tmp_path):
    findings(pictures={2: picture()}).save(tmp_path / "found")
    found = Findings.load(tmp_path / "found")
    assert list(found.pictures) == [2] and torch.equal(found.pictures[2], picture())


def test_findings_are_read_as_they_were_saved(tmp_path):
    found = findings()
    found.save(tmp_path / "audit")
    again = Findings.load(tmp_path / "audit")
    assert again.table() == found.table() and again.metadata == found.metadata
    assert again.sections == found.sections and again.texts == found.texts
    assert again.facts == found.facts and again.issues == found.issues
    assert again.columns["given_label"].dtype == torch.int64
    assert repr(again) == repr(found) and "Two are wrong." in repr(found)


def test_tables_are_written_for_other_programs(tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    found = findings()
    table = pyarrow.parquet.read_table(found.write(tmp_path / "audit.parquet"))
    assert table.to_pydict() == found.table()
    rows = pyarrow.csv.read_csv(found.write(tmp_path / "sub" / "audit.csv"))
    assert rows.column("id").to_pylist() == found.ids
    with pytest.raises(ValueError, match=r"ends in \.parquet"):
        found.write(tmp_path / "audit.xlsx")


def test_a_column_of_another_length_is_refused():
    with pytest.raises(
        ValueError, match="'loss' must have one value for each of 4 examples; got 1"
    ):
        findings(columns={"loss": torch.zeros(1)})


def test_findings_of_the_same_examples_join(tmp_path):
    other = Findings(ids=["w", "x", "y", "z"], columns={"ood_score": torch.ones(4)})
    both = joined([findings(), other])
    assert set(both.columns) == {*findings().columns, "ood_score"} and len(both.sections) == 1
    with pytest.raises(ValueError, match="give a column 'ood_score'"):
        joined([other, other])
    with pytest.raises(ValueError, match="of the same examples"):
        joined([other, Findings(ids=["w"], columns={})])


def test_a_change_set_is_json_that_people_can_edit(tmp_path):
    changes = ChangeSet(name="mine", remove=("a",), relabel={"b": 3}, keep=("c",))
    changes.save(tmp_path / "changes.json")
    assert ChangeSet.load(tmp_path / "changes.json") == changes
    (tmp_path / "changes.json").write_text(json.dumps({"remove": ["a"]}))
    assert ChangeSet.load(tmp_path / "changes.json").remove == ("a",)
    (tmp_path / "changes.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no change set"):
        ChangeSet.load(tmp_path / "changes.json")


def test_passes_add_up_and_read_well():
    total = Passes(forward=1) + Passes(backward=2, trainings=1)
    assert str(total) == "1 forward, 2 with gradients, 1 training"
    assert total - Passes(backward=2) == Passes(forward=1, trainings=1) and str(Passes()) == "0"
