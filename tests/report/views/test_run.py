"""Views of a run folder: its own numbers, nothing outside it, and curves whose values are known."""

import json
import math

import pytest
import torch

from headwater.core.files import ArtifactDamaged, ArtifactMissing, read_json, write_json
from headwater.core.fit import Fit
from headwater.core.store import Artifact
from headwater.report.views import run
from headwater.report.views.folders import LeadsOut
from headwater.trace.timeline import Timeline
from headwater.training.verify import Verification
from tests import runs
from tests.report import samples


def test_the_overview_names_what_the_folder_holds(plain):
    view = run.overview(plain)
    assert (view["name"], view["n_train"], view["task"]) == ("plain", 48, "Classification")
    assert view["has"] == {
        "index": False,
        "heldout": True,
        "survey": True,
        "trajectory": False,
        "finetuned": False,
    }
    assert {t["name"] for t in view["traces"]} == {"trace", "lava"}
    asked = next(t for t in view["traces"] if t["name"] == "lava")["asked"]
    assert asked == [
        {
            "prompt": "When lava cools quickly at the surface, it forms",
            "completion": " a dark rock called basalt, which makes up most of the ocean floor.",
        }
    ]
    assert view["timelines"] == [{"id": "timeline", "name": "timeline"}]
    assert view["columns"] == ["title", "topic", "year"]
    assert json.loads(json.dumps(view, allow_nan=False)) == view


def test_coverage_adds_up_to_the_model(plain):
    coverage = run.overview(plain)["coverage"]
    assert coverage["share"] == 50 / 53  # 6 × 5 + 5 and 5 × 3 of these and 3 more
    states = {row["name"]: (row["parameters"], row["state"]) for row in coverage["rows"]}
    assert states == {"0": ("35", "followed"), "2": ("15", "followed"), "2.bias": ("3", "skipped")}


def test_a_fit_that_did_not_record_what_it_left_out_says_so(plain):
    artifact = Artifact.open(plain / "fit", kind="fit")
    del artifact.facts["left_out"]
    assert run._coverage(artifact)["followed"].endswith("what is left out is not recorded")


def test_costs_are_in_passes_and_seconds(plain):
    costs = {row["name"]: row for row in run.overview(plain)["costs"]}
    assert costs["fit"]["seconds"] == 155.0 and costs["fit"]["passes"] == pytest.approx(155 / 38)
    assert costs["survey"]["told"] == "1 pass over the data · 38.5 s"
    assert costs["verification trace-0000000000000007"]["told"] == "12 trainings"


def test_the_spectrum_is_that_of_the_fitted_curvature(plain):
    curves = {each["layer"]: each["points"] for each in run.spectrum(plain / "fit")}
    artifact = Artifact.open(plain / "fit", kind="fit")
    n = float(artifact.tensor("n_folds").sum())
    eigenvalues = artifact.tensor("sums:0").double().sum(0).flatten() / n
    ordered = eigenvalues.sort(descending=True).values
    assert curves["0"][0] == (round(1 / 35, 4), round(math.log10(float(ordered[0])), 3))
    assert curves["0"][-1] == (1.0, round(math.log10(float(ordered[-1])), 3))
    assert isinstance(Fit, type) and len(curves) == 2


def test_a_curve_of_known_eigenvalues_has_their_logarithms():
    values = torch.tensor([10.0 ** -(k / 100) for k in range(1000)], dtype=torch.float64)
    curve, told = run.points(values[torch.randperm(1000)])
    assert len(curve) <= 60 and curve[0] == (0.001, 0.0) and curve[-1] == (1.0, -9.99)
    assert all(y == pytest.approx(-(1000 * x - 1) / 100, abs=1e-3) for x, y in curve)
    assert told.startswith("1,000 eigenvalues from 1 down to 1e-10")
    assert run.points(torch.zeros(3)) == ([], "all of 3 eigenvalues are zero")
    assert "1 are zero" in run.points(torch.tensor([1.0, 1e-30]))[1]


def test_a_verification_has_its_own_numbers_and_its_control(plain):
    name = run.overview(plain)["verifications"][0]["id"]
    view = run.verification(plain, name)
    found = Verification.load(plain / "verify" / "trace" / f"{7:016x}.json")
    assert [row["predicted_value"] for row in view["rows"]] == [o.predicted for o in found.outcomes]
    assert [row["actual_value"] for row in view["rows"]] == [o.actual for o in found.outcomes]
    assert [row["control"] for row in view["rows"]] == [False, True, False] * 3
    assert (
        view["rows"][0]["predicted"] == "−0.410" and view["rows"][0]["spread"] == "[−0.43, −0.33]"
    )
    assert "moved 3 of 3 measurements further down" in view["told"]


def test_a_timeline_has_its_own_sums(plain):
    view = run.timeline(plain, "timeline")
    found = Timeline.load(plain / "timelines" / "timeline" / "data")
    for q, query in enumerate(view["queries"]):
        assert [s["net"] for s in query["segments"]] == found.net[:, q].tolist()
        assert [s["raised"] for s in query["segments"]] == found.raised[:, q].tolist()
        assert [len(s["strongest"]) for s in query["segments"]] == [5, 5, 5]
        assert query["segments"][0]["totals"]  # by the column that was asked for
    assert "to 1e-06 nats" in view["told"]


@pytest.mark.parametrize("name", ["../plain", "/etc/passwd", "", ".", "nothing", "trace/../../x"])
def test_names_come_from_the_listing_and_lead_nowhere_else(plain, name):
    for view in (run.trace, run.verification, run.timeline):
        with pytest.raises(ArtifactMissing, match="There is no"):
            view(plain, name)
    assert (plain / "run.json").is_file()


def test_a_link_out_of_the_folder_is_not_followed(plain, tmp_path):
    copy = runs.plain_run(tmp_path / "copy", n=16)
    (copy / "traces" / "outside").symlink_to(plain / "traces" / "trace")
    outside = plain / "verify" / "trace" / f"{7:016x}.json"
    (copy / "verify" / "trace" / "outside.json").symlink_to(outside)
    assert "outside" not in run.trace_folders(copy)
    assert [v["id"] for v in run.overview(copy)["verifications"]] == ["trace-0000000000000007"]


def test_the_draft_of_changes_is_shown_change_by_change(plain):
    ids = read_json(plain / "changes.json")["remove"]
    view = run.changes(plain)
    assert [(c["id"], c["action"]) for c in view["changes"]] == [(i, "remove") for i in ids]
    assert view["changes"][0]["number"] == 0


def test_weights_labels_and_notes_of_a_draft_are_told(plain, tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    told = {"a": {"number": 3, "note": "\u202e"}}
    weights = {"a": 2.0, "b": 3.5}
    write_json(
        place / "changes.json",
        {"name": "x", "relabel": {"c": 1}, "keep": ["d"], "weights": weights, "about": told},
    )
    view = {c["id"]: c for c in run.changes(place)["changes"]}
    assert view["a"] == {
        "id": "a",
        "number": 3,
        "action": "duplicate",
        "weight": 2.0,
        "note": "⟨RLO⟩",
    }
    assert (view["b"]["action"], view["b"]["weight"]) == ("upweight", 3.5)
    assert (view["c"]["action"], view["c"]["label"]) == ("relabel", "1")
    assert view["d"]["action"] == "keep"
    assert run.changes(tmp_path) is None


def test_hostile_text_is_visible_in_every_view(hostile):
    overview = run.overview(hostile)
    views = [
        overview,
        *(run.trace(hostile, t["name"]) for t in overview["traces"]),
        *(run.verification(hostile, v["id"]) for v in overview["verifications"]),
        *(run.timeline(hostile, t["name"]) for t in overview["timelines"]),
    ]
    texts = json.dumps([_without_ids(v) for v in views], ensure_ascii=False, allow_nan=False)
    assert not [c for c in "\x00\x07\x1b\u202e\u2028\ufeff" if c in texts]
    assert "⟨RLO⟩" in texts


def _without_ids(value):
    if isinstance(value, dict):
        return {k: _without_ids(v) for k, v in value.items() if k not in ("id", "copy_ids")}
    return [_without_ids(v) for v in value] if isinstance(value, list) else value


def test_a_folder_without_a_record_is_no_run(tmp_path):
    with pytest.raises(ArtifactMissing, match="does not exist"):
        run.overview(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_damaged_is_told_or_left_out_and_the_rest_is_shown(tmp_path):
    place = runs.plain_run(tmp_path / "run", n=16)
    (place / "verify" / "trace" / "half.json").write_text('{"outcomes": [')
    (place / "verify" / "trace" / "other.json").write_text("[1]")
    (place / "corpus" / "table-00000.parquet").write_bytes(b"no table")
    next((place / "fit").glob("*.safetensors")).write_bytes(b"short")
    view = run.overview(place)
    assert [v["id"] for v in view["verifications"]] == ["trace-0000000000000007"]
    assert view["facts"][0][0] == "The fit cannot be read" and view["spectrum"] == []
    assert not view["has"]["survey"] and view["n_train"] == samples.answer(0).n_train
    assert {t["name"] for t in view["traces"]} == {"trace", "lava"}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("facts", [1]),
        ("measurement", 3),
        ("protocol", None),
        ("predicted", "abc"),
        ("actual", None),
        ("change", 3),
    ],
)
def test_a_verification_of_other_types_is_left_out(tmp_path, part, value):
    place = runs.plain_run(tmp_path / "run", n=16)
    path = next((place / "verify" / "trace").glob("*.json"))
    content = json.loads(path.read_text())
    (content if part in content else content["outcomes"][0])[part] = value
    path.write_text(json.dumps(content))
    assert run.overview(place)["verifications"] == []
    with pytest.raises(ArtifactDamaged, match="holds no verification; make it again"):
        run.verification(place, f"trace-{path.stem}")


@pytest.mark.parametrize(
    "record",
    [
        {"fit": [1], "cost": [1], "timelines": [1]},
        {"fit": 3, "cost": "x", "timelines": {"timeline": [3]}},
        {"fit": {"model": "a" * 5_000}},
    ],
)
def test_a_record_of_other_shapes_hides_no_result(tmp_path, record):
    place = runs.plain_run(tmp_path / "run", n=16)
    (place / "run.json").write_text(json.dumps(record))
    assert len(run.overview(place)["traces"]) == 2
    assert run.timeline(place, "timeline")["queries"]


def test_folders_that_lead_out_of_the_run_are_not_read(tmp_path):
    other, place = runs.plain_run(tmp_path / "other", n=16), runs.plain_run(tmp_path / "run", n=16)
    for name in ("traces", "verify", "timelines", "corpus", "changes.json"):
        (place / name).rename(tmp_path / name)
        (place / name).symlink_to(other / name)
    view = run.overview(place)
    assert view["traces"] == view["verifications"] == view["timelines"] == []
    assert not view["has"]["survey"] and view["columns"] == []
    with pytest.raises(LeadsOut, match=r"changes.json' is a link that leads out of the run"):
        run.changes(place)
