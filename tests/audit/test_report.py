"""The whole audit of small fits: sections, texts, outliers."""

import pytest
import torch

import headwater
from headwater.audit import Outliers, Subject, audit, outside
from headwater.audit.curvature_spectrum import spectrum
from headwater.audit.memorization import owed_to_itself
from headwater.audit.report import complexity, memorization, recital
from headwater.calibrate import complexity as of_examples
from headwater.core.curvature import EKFAC
from headwater.core.tempering import fit_at_temperature
from headwater.models.vision import mlp
from headwater.numerics.ranks import spearman
from headwater.training.loop import outputs, train
from headwater.training.optimizers import SGD
from tests.curvature_cases import case


def test_a_classifiers_audit_has_labels_and_outliers_and_counts_each_pass_once():
    found = audit(case("mlp").fit(EKFAC()))
    assert [s.name for s in found.sections] == [
        "labels",
        "outliers",
        "memorization",
        "overconfidence",
    ]
    assert {"label_score", "is_label_issue", "ood_score", "is_outlier_issue"} <= set(found.columns)
    # neighbours were looked at by the ranking already
    assert str(found.section("outliers").passes) == "0" and found.texts == {}
    assert str(found.section("memorization").passes) == "0"  # self-influence was
    assert str(found.passes) == found.facts["passes"]


def test_structure_is_looked_at_where_it_is_asked_for():
    found = audit(case("mlp").fit(EKFAC()), sections=("structure",))
    section = found.section("structure")
    assert "directions" in section.sentences[0] and section.passes.backward > 0
    assert len(section.tables[0].rows()) == 2
    with pytest.raises(ValueError, match="no section 'shape'; there are: outliers, complexity"):
        audit(case("mlp").fit(EKFAC()), sections=("shape",))


def test_short_texts_are_not_tried_for_recitation_and_long_ones_are():
    subject = Subject(case("lm").fit(EKFAC()))
    lengths = sorted(subject.fit.train.lengths)
    found = memorization(subject)
    assert found is not None and "none was tried" in found.sections[0].sentences[0]
    model = subject.fit.model
    masked = type(model).forward
    model.forward = lambda ids: masked(model, ids, torch.ones_like(ids))  # all tokens are real
    found = memorization(subject, prefix=2, suffix=lengths[-1] - 2)
    tried = [d for d in found.columns["recitation_distance"] if d is not None]
    assert len(tried) == lengths.count(lengths[-1]) and all(0 <= d <= 1 for d in tried)
    assert memorization(Subject(case("regression").fit(EKFAC()))) is None
    assert recital(Subject(case("regression").fit(EKFAC()))) is None


def test_a_far_input_is_an_outlier_and_scores_lowest():
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1.0, 0.0]) + 0.05 * torch.randn(60, 2, generator=generator)
    x[17] = torch.tensor([-1.0, 0.3])
    model = torch.nn.Linear(2, 2)
    fit = headwater.fit(
        model, (x, torch.zeros(60, dtype=torch.long)), headwater.Classification(), curvature="ekfac"
    )
    found = Outliers().audit(fit)
    assert int(found.columns["ood_score"].argmin()) == 17
    assert bool(found.columns["is_outlier_issue"][17])
    assert int(found.columns["is_outlier_issue"].sum()) < 6
    assert found.sections[0].shown[0] == 17


def test_tukeys_fence_lies_one_and_a_half_quartile_distances_above_the_upper_quartile():
    values = torch.arange(9.0)  # quartiles 2 and 6, fence at 12
    assert not outside(torch.cat([values, torch.tensor([12.0])])).any()
    assert outside(torch.cat([values, torch.tensor([14.0])])).tolist() == [False] * 9 + [True]


def test_inputs_of_which_the_model_knows_little_are_ranked_by_if_comp_at_no_further_cost():
    fit = case("mlp").fit(EKFAC())
    found = audit(fit, sections=("complexity",))
    section = found.section("complexity")
    assert str(section.passes) == "0"
    expected = of_examples(fit_at_temperature(fit, 3.0, curvature=EKFAC(folds=1)), fit.train)
    torch.testing.assert_close(found.columns["complexity"], expected.unlabelled)
    torch.testing.assert_close(found.columns["complexity_score"], expected.confidence().exp())
    assert section.shown[0] == int(expected.confidence().argmin())
    marked = torch.as_tensor(found.columns["is_complexity_issue"])
    assert torch.equal(marked, outside(-expected.confidence()))
    assert complexity(Subject(case("lm").fit(EKFAC()))) is None


N, DECAY = 40, 1e-2


def random_labels():
    """Points whose labels say nothing, so that a network can only learn them by heart."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 6, generator=generator), torch.randint(3, (N,), generator=generator)


def trained(subsets):
    """Networks trained on these examples, all of them in each step."""
    x, y = random_labels()
    n = subsets.shape[1]
    rule = SGD(
        lr=0.1, momentum=0.9, weight_decay=DECAY, batch_size=n, epochs=400, schedule="constant"
    )
    models = [mlp([6, 32, 3], seed=0)] * len(subsets)
    return train(models, x, y, subsets=subsets, seeds=[0] * len(subsets), optimizer=rule)


def by_heart(curvature="ekfac"):
    """A network that has learnt random labels, and a fit of it."""
    model, task = mlp([6, 32, 3], seed=0), headwater.Classification()
    state = trained(torch.arange(N)[None])
    model.load_state_dict({name: p[0] for name, p in state.items()})
    return headwater.fit(model, random_labels(), task, curvature=curvature, weight_decay=DECAY)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["ekfac", "dual"])
def test_what_labels_learnt_by_heart_owe_is_near_what_retraining_without_them_takes(curvature):
    fit, (x, y) = by_heart(curvature), random_labels()
    found = audit(fit, sections=("memorization",)).columns["memorization"]
    without = torch.stack([torch.arange(N)[torch.arange(N) != i] for i in range(N)])
    said = outputs(fit.model, trained(without), x).softmax(-1)[torch.arange(N), torch.arange(N)]
    left = said.gather(1, y[:, None])[:, 0].double()
    actual = Subject(fit).final.probability - left
    assert float(actual.mean()) > 0.4
    # one training each, and a line carried far: levels and order, not single values
    assert float(found.mean()) == pytest.approx(float(actual.mean()), abs=0.15)
    assert float(spearman(found[None], actual[None])) > 0.6


def test_labels_learnt_by_heart_are_told_with_the_weights_that_serve_them():
    fit = by_heart()
    found = audit(fit, sections=("memorization", "recital"))
    subject = Subject(fit)
    own = torch.as_tensor(found.columns["self_influence"])
    owed = owed_to_itself(subject.final.loss, own)
    torch.testing.assert_close(found.columns["memorization"], owed)
    n = int((owed >= 0.25).sum())
    assert 5 <= n < N
    assert (
        found.section("memorization").sentences[0].startswith(f"{n} of 40 labels owe 0.25 or more")
    )
    assert found.section("memorization").shown[0] == int(owed.argmax())
    known = owed.argsort(descending=True, stable=True)[:n].tolist()
    others = [i for i in range(N) if owed[i] < 0.25]
    sets = {"clean": fit.train.subset(others), "memorized": fit.train.subset(known)}
    expected = spectrum(fit, sets)
    told = found.section("recital")
    assert f"{expected.sensitivity('memorized'):.2f} times as active" in told.sentences[0]
    table = told.tables[0].columns
    assert table["ratio"] == pytest.approx(expected.table()["ratio"], rel=1e-5)
    assert table["layer"] == ["0"] * 4 + ["2"] * 4


def test_a_fit_without_factors_says_why_its_weights_are_not_told():
    told = recital(Subject(by_heart("dual")))
    assert told is not None and told.sections[0].tables == ()
    assert "cannot be told: This fit holds a dual curvature" in told.sections[0].sentences[0]


def test_too_few_examples_learnt_by_heart_say_nothing_of_the_weights():
    told = recital(Subject(case("lm").fit(EKFAC())))
    assert (
        told is not None
        and "0 of the training examples are learnt by heart" in (told.sections[0].sentences[0])
    )
    assert told.sections[0].tables == ()
