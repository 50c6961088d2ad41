"""The benchmark on a workload of seconds: protocols, halves, resuming, tables."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from headwater.bench import (
    WORKLOADS,
    Data,
    Entry,
    Plan,
    Workload,
    entries,
    fashion_mnist_workload,
    markdown,
    pareto_plot,
    run_workload,
)
from headwater.bench import run as engine
from headwater.bench.entries import chosen
from headwater.bench.image_workloads import rotated
from headwater.bench.run import Bench, grouped, knob, label
from headwater.bench.text_workloads import next_token_loss, word_ids
from headwater.bench.workloads import FAST
from headwater.core.curvature import EKFAC
from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification
from headwater.models.gpt import GPT
from headwater.models.vision import logistic_regression, mlp
from headwater.trace import Ensemble, GradientDot, Influence, Random, Source, TracIn, Unrolling
from headwater.training.loop import outputs, stack
from headwater.training.optimizers import SGD, AdamW

pytestmark = pytest.mark.thorough

N, Q, K = 60, 12, 24


def blobs() -> Data:
    """Two overlapping clouds of points; every tenth label is wrong."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N + Q) % 2
    x = torch.randn(N + Q, 4, generator=generator) + 1.5 * y[:, None]
    wrong = torch.arange(N) % 10 == 0
    labels = torch.where(wrong, 1 - y[:N], y[:N])
    return Data(
        train=TensorExamples(x[:N], labels),
        queries=TensorExamples(x[N:], y[N:]),
        wrong=wrong,
    )


TINY = Workload(
    name="tiny",
    title="blobs: logistic regression",
    load=blobs,
    model=lambda seed: logistic_regression(4, 2, seed=seed),
    recipe=(SGD(lr=0.1, momentum=0.5, weight_decay=0.05, batch_size=10, epochs=8),),
    subsets=K,
    repeats=2,
    seeds=2,
    checkpoints=2,
)
PLAIN = Influence(n_intervals=0)
TUNED = Entry(
    name="EK-FAC",
    method=PLAIN,
    curvature=EKFAC(fisher="exact", own_bases=False),
    choices=tuple(replace(PLAIN, damping=d) for d in (0.01, 0.05, 100.0)),
)
EVERY = [
    Entry(name="random", method=Random()),
    Entry(name="gradient dot", method=GradientDot()),
    TUNED,
    Entry(name="TracIn", method=TracIn(), needs="checkpoints"),
    Entry(name="EK-FAC", method=Ensemble(method=PLAIN), curvature=TUNED.curvature, needs="models"),
    Entry(name="unrolling", method=Unrolling(), needs="trajectory"),
    Entry(
        name="SOURCE",
        method=Ensemble(method=Source(segments=1)),
        curvature=TUNED.curvature,
        needs="trajectories",
    ),
]
PLAN = Plan(left_out=0.1, n_samples=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def report(folder):
    return run_workload(TINY, folder, EVERY, left_out=[("LESS", "no moments")], plan=PLAN)


def row(report, name, *, tuned=False):
    return next(r for r in report.rows if r["name"] == name and r.get("tuned", False) == tuned)


def test_every_entry_has_a_row_as_it_comes_and_one_for_its_tuned_knob(report):
    names = [(r["name"], r["tuned"]) for r in report.rows]
    assert sorted(names) == sorted(
        [
            ("random", False),
            ("gradient dot", False),
            ("EK-FAC", False),
            ("EK-FAC", True),
            ("TracIn", False),
            ("EK-FAC, 2 models", False),
            ("unrolling", False),
            ("SOURCE, 2 models", False),
        ]
    )


def test_unrolling_leads_on_its_own_run_and_random_is_at_zero(report):
    """The run is smooth, so leaving a tenth out is nearly linear; 12 subsets give random a deviation of 0.3 a query."""
    assert row(report, "unrolling")["fixed"]["value"] > 0.95
    assert abs(row(report, "random")["fixed"]["value"]) < 0.4
    assert row(report, "EK-FAC")["fixed"]["value"] > row(report, "random")["fixed"]["high"]
    assert row(report, "EK-FAC")["expected"]["value"] > 0.5
    assert report.facts["metasmoothness"] > 0.9
    assert 0.5 < report.facts["ceiling"]["value"] <= 1


def test_models_of_halves_that_learned_nothing_are_told(report, folder, tmp_path):
    told = f"of the queries rightly, those of halves {100 * report.facts['halves_right']:.1f} %."
    assert told in markdown(report) and report.facts["halves_right"] > 0.5
    assert not any("hardly learned" in text for text in report.facts["warnings"])
    idle = replace(TINY, recipe=(replace(TINY.recipe[0], lr=1e-6),), model=_against)
    facts = Bench(idle, tmp_path, replace(PLAN, subsets=20, seeds=1)).facts()
    assert facts["halves_right"] == facts["right"] < 0.25  # they are all the initial model
    assert any("have hardly learned" in text for text in facts["warnings"])
    facts["right"] = 0.0
    assert "answers 0.0 % of the queries" in markdown(replace(report, facts=facts))


def _against(seed: int) -> torch.nn.Module:
    """A model that takes each cloud for the other."""
    model = logistic_regression(4, 2, seed=seed)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.copy_(torch.tensor([-3.0, 3.0]))
    return model


def test_knobs_are_tuned_on_one_half_and_every_row_is_reported_on_the_other(report, folder):
    bench = Bench(TINY, folder / "tiny", PLAN)
    (q, k), (q_report, k_report) = bench.halves["tune"], bench.halves["report"]
    assert sorted([*q.tolist(), *q_report.tolist()]) == list(range(Q))
    assert sorted([*k.tolist(), *k_report.tolist()]) == list(range(K))
    found = row(report, "EK-FAC", tuned=True)
    best = max(found["choices"], key=lambda c: c[1])[0]
    assert found["knob"] == best and len(found["choices"]) == 3
    for each in report.rows:
        assert each["expected"]["n"] + each["expected"]["left_out"] == Q // 2


def test_costs_are_in_passes_and_fits_count_only_where_there_is_one(report):
    for each in report.rows:
        assert each["passes"] > 0 and each["memory"] >= 0
    assert row(report, "gradient dot")["fit_passes"] == 0
    assert row(report, "EK-FAC")["fit_passes"] > 0
    assert row(report, "EK-FAC, 2 models")["fit_passes"] > 0


def test_wrong_labels_are_looked_for_by_queries_and_by_self_influence(report):
    found = row(report, "EK-FAC")
    assert found["auc_self"]["value"] > 0.8 and found["auc_queries"]["value"] > 0.8
    assert "auc_self" not in row(report, "gradient dot")
    assert report.facts["loss_auc"]["value"] > 0.8


def test_a_killed_run_goes_on_and_a_finished_one_is_read(folder, report, monkeypatch):
    rows = folder / "tiny" / "rows"
    (rows / "tracin.json").unlink()
    trained, measured = [], []
    original, train_model = Bench._measure, engine.train_model

    def followed(*inputs, **options):
        return train_model(*inputs, **options | {"progress": lambda *step: trained.append(step)})

    monkeypatch.setattr(engine, "train_model", followed)

    def counted(self, entry):
        measured.append(entry.name)
        return original(self, entry)

    monkeypatch.setattr(Bench, "_measure", counted)
    again = run_workload(TINY, folder, EVERY, plan=PLAN)
    assert measured == ["TracIn"] and not trained
    same = [r for r in again.rows if r["name"] != "TracIn"]
    assert same == [r for r in report.rows if r["name"] != "TracIn"]
    assert again.facts == report.facts
    assert row(again, "TracIn")["expected"] == row(report, "TracIn")["expected"]
    other = [replace(EVERY[0], method=Random(seed=1))]
    run_workload(TINY, folder, other, plan=PLAN)
    assert measured == ["TracIn", "random"]  # the same name, another method


def test_a_method_that_fails_is_listed_and_the_others_go_on(folder):
    broken = Entry(name="LESS without moments", method=_Broken())
    found = run_workload(TINY, folder, [EVERY[0], broken], plan=PLAN)
    assert found.rows[1] == {"name": "LESS without moments", "error": "there is nothing to do it"}
    assert "- failed: LESS without moments: there is nothing to do it" in markdown(found)


class _Broken(Random):
    def attribute(self, fit, queries, **options):
        raise ValueError("there is nothing\n to do it")


def test_the_table_has_protocol_ceiling_rows_and_what_is_missing(report):
    text = markdown(report)
    assert text.startswith("## blobs: logistic regression")
    assert "noise ceiling of the expected effect: 0." in text
    assert "24 random halves (alpha 0.5), 2 retrainings" in text
    assert "- not in the table: LESS: no moments" in text
    assert "| **random** |" in text and "tuned: damping" in text
    assert "untuned: damping 0.05 = weight decay" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 8 and len({line.count("|") for line in lines}) == 1
    values = [float(line.split("|")[3].split()[0]) for line in lines[2:]]
    assert values == sorted(values, reverse=True)


def test_the_plot_shows_every_row_and_the_ceiling(report):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    axes = pareto_plot(report).axes[0]
    assert len(axes.containers) == 8 and axes.get_xscale() == "log"
    assert any(line.get_label() == "noise ceiling" for line in axes.lines)
    pyplot.close("all")


def test_stages_keep_their_share_in_every_subset_and_rates_follow_them(tmp_path):
    data = blobs()
    parts = (torch.arange(20), torch.arange(20, N))
    two = replace(
        TINY,
        load=lambda: replace(data, parts=parts),
        recipe=(TINY.recipe[0], replace(TINY.recipe[0], lr=0.05)),
        seeds=1,
        subsets=20,
    )
    bench = Bench(two, tmp_path, PLAN)
    masks = bench.bank().masks
    assert masks[:, :20].sum(1).tolist() == [10] * 20
    assert masks[:, 20:].sum(1).tolist() == [20] * 20
    rates = bench.options(EVERY[3])["rates"]
    assert rates.shape == (3, N)  # one checkpoint in the first stage, two in the second
    assert (rates[0, :20] > 0).all() and (rates[0, 20:] == 0).all()
    assert (rates[1:, 20:] > 0).all() and (rates[1:, :20] == 0).all()
    # A stage's horizon is the sum of its learning rates over 1 - μ, shared by its examples.
    first = sum(bench.models[0][1].lr[: 8 * 2]) / 0.5
    assert rates[0].sum().item() == pytest.approx(first)


def test_workloads_are_known_by_their_names_and_hold_the_humble_baselines():
    assert set(FAST) <= set(WORKLOADS)
    every, left_out = entries(WORKLOADS["wikipedia-gpt"])
    names = {entry.name for entry in every}
    assert {"BM25", "embedding similarity", "random"} <= names
    assert not names & {name for name, _ in left_out}
    for workload in WORKLOADS.values():
        assert "random" in {entry.name for entry in entries(workload)[0]}
    labels = [label(entry, 5) for entry in entries(WORKLOADS["digits-mlp"])[0]]
    assert len(set(labels)) == len(labels)


def test_entries_are_chosen_by_words_in_their_names():
    every, _ = entries(WORKLOADS["digits-mlp"])
    assert {e.name for e in chosen(every, ["trak", "lissa"])} == {"TRAK", "LiSSA"}
    assert chosen(every, []) == every
    with pytest.raises(ValueError, match="called 'nothing'; there are: random"):
        chosen(every, ["nothing"])
    kinds = [repr(e.curvature) for e in grouped(every)]
    assert sum(a != b for a, b in pairwise(kinds)) == len(set(kinds)) - 1
    assert knob(Ensemble(method=PLAIN)) == "damping auto" and knob(Random()) == ""


def test_words_that_are_not_frequent_are_zero():
    ids, words = word_ids(["a b a", "b a c", "a"], length=3, n_words=3)
    assert ids.tolist() == [[1, 2, 1], [2, 1, 0]] and words == ["a b a", "b a c"]


def test_the_bank_and_the_task_ask_the_same_of_a_language_model():
    model = GPT(20, context=6, n_layers=1, dim=8, n_heads=2, tied=False).double()
    ids = torch.randint(20, (5, 6), generator=torch.Generator().manual_seed(0))
    side_by_side = outputs(model, stack([model]), ids)[0]
    expected = CausalLM().loss(model, (ids, ids))
    torch.testing.assert_close(next_token_loss(side_by_side, ids), expected)
    x = torch.randn(4, 6, dtype=torch.float64)
    net, y = mlp((6, 3)).double(), torch.arange(4) % 3
    margin = Classification(measurement_of="margin").measurement(net, (x, y))
    torch.testing.assert_close(TINY.measure(net(x), y), margin)
    assert replace(TINY, recipe=(AdamW(),)).adaptive and not TINY.adaptive


def test_turned_images_come_back_after_four_quarters():
    x = torch.rand(3, 64)
    quarter = rotated(x, 90.0)
    torch.testing.assert_close(quarter.view(3, 8, 8), x.view(3, 8, 8).rot90(1, (1, 2)))
    assert rotated(x, 45.0).sum() < x.sum()  # corners are lost


def test_fashion_mnist_is_a_workload_when_its_folder_is_given(tmp_path):
    workload = fashion_mnist_workload(tmp_path)
    with pytest.raises(FileNotFoundError, match="install the Debian package dataset-fashion-mnist"):
        workload.load()


def test_a_report_on_disk_is_json(folder, report):
    found = json.loads((folder / "tiny" / "report.json").read_text())
    assert found["name"] == "tiny" and found["facts"]["train"] == N
