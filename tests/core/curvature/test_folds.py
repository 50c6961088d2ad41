"""Replicates with eigenbases of their own: each is the fit of the data without its fold."""

import pytest
import torch

from headwater.core.curvature import EKFAC, Layerwise
from headwater.core.curvature.folds import affordable
from headwater.core.damping import Damping, Inverse
from headwater.core.fit import fit
from headwater.core.follow import follow
from headwater.trace.influence import query_gradients
from tests.curvature_cases import case

FUNCTION = Inverse(Damping(0.05))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_a_replicate_is_the_fit_without_its_fold(name):
    found, folds = case(name), 3
    whole = found.fit(EKFAC(folds=folds, own_bases=True))
    gradients = query_gradients(whole, found.train)
    plain = found.fit(EKFAC(folds=folds, own_bases=False)).curvature
    # the same factors and draws; eigenvectors may differ in sign, what they do may not
    expected = plain.apply(gradients, FUNCTION).to_matrix()
    actual = whole.curvature.apply(gradients, FUNCTION).to_matrix()
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    for k, replicate in enumerate(whole.curvature.replicates()):
        kept = (found.train.keys % folds != k).nonzero().squeeze(1).tolist()
        alone = fit(
            found.model,
            found.train.subset(kept),
            found.task,
            curvature=EKFAC(folds=1, own_bases=False),
        )
        assert replicate.n_examples == len(kept)
        torch.testing.assert_close(
            replicate.apply(gradients, FUNCTION).to_matrix(),
            alone.curvature.apply(gradients, FUNCTION).to_matrix(),
            rtol=1e-8,  # float64 sums in another order, through an eigendecomposition
            atol=1e-10,
        )


def test_replicates_come_back_from_tensors():
    made = case("mlp").fit(EKFAC(folds=3, own_bases=True)).curvature
    again = Layerwise.from_tensors(made.tensors(), made.facts)
    assert len(again.replicates()) == 3
    for mine, theirs in zip(again.replicates(), made.replicates(), strict=True):
        assert mine.n_examples == theirs.n_examples
        for name, e in theirs.eigenvalues.items():
            assert torch.equal(mine.eigenvalues[name], e)


def test_own_bases_are_the_default_only_where_they_fit():
    found = case("mlp")
    layers = list(follow(found.model, found.task, found.train.batch([0, 1])).layers)
    assert affordable(layers, 5) and not affordable(layers, 1)
    assert not affordable(layers, 5, limit=100)
    assert found.fit(EKFAC()).curvature.others and not found.fit(EKFAC(folds=1)).curvature.others
