"""The whole audit of small fits: sections, texts, outliers."""

import pytest
import torch

import headwater
from headwater.audit import Outliers, Subject, audit, outside
from headwater.audit.report import memorization
from headwater.core.curvature import EKFAC
from tests.curvature_cases import case


def test_a_classifiers_audit_has_labels_and_outliers_and_counts_each_pass_once():
    found = audit(case("mlp").fit(EKFAC()))
    assert [s.name for s in found.sections] == ["labels", "outliers"]
    assert {"label_score", "is_label_issue", "ood_score", "is_outlier_issue"} <= set(found.columns)
    # neighbours were looked at by the ranking already
    assert str(found.section("outliers").passes) == "0" and found.texts == {}
    assert str(found.passes) == found.facts["passes"]


def test_structure_is_looked_at_where_it_is_asked_for():
    found = audit(case("mlp").fit(EKFAC()), sections=("structure",))
    section = found.section("structure")
    assert "directions" in section.sentences[0] and section.passes.backward > 0
    assert len(section.tables[0].rows()) == 2
    with pytest.raises(ValueError, match="no section 'shape'; there are: outliers, memorization"):
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
    assert memorization(Subject(case("mlp").fit(EKFAC()))) is None


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
