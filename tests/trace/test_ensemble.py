"""Ensembles average a method's scores over fits."""

import pytest
import torch

from headwater.core.curvature import EKFAC, Identity
from headwater.core.fit import fits_at
from headwater.numerics.ranks import spearman
from headwater.trace import Ensemble, GradientCosine, GradientDot, Influence
from headwater.trace.ensemble import centered_ranks
from tests.curvature_cases import case, shared
from tests.trace.test_tracin import checkpoints


def test_values_are_averaged():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    fits = fits_at(fitted, checkpoints(fitted))
    each = [GradientCosine().attribute(f, found.query, measurement="margin").values for f in fits]
    method = Ensemble(method=GradientCosine())
    scores = method.attribute(fitted, found.query, fits=fits, measurement="margin")
    torch.testing.assert_close(scores.values, torch.stack(each).mean(0))
    assert scores.measurement == "margin" and scores.facts["members"] == 3
    assert scores.facts["made_from"] == fitted.made_from


def test_each_model_is_given_what_is_its_own():
    """Weights 1 and 3 of the one query, averaged, are twice its scores."""
    found = shared("mlp")
    fitted = found.fitted(Identity())
    plain = GradientDot().attribute(fitted, found.query)
    n = len(plain.values)
    own = [{"weights": scale * torch.eye(n), "names": [*map(str, range(n))]} for scale in (1, 3)]
    ensemble = Ensemble(method=GradientDot())
    both = ensemble.attribute(fitted, found.query, fits=[fitted, fitted], own=own)
    torch.testing.assert_close(both.values, 2 * plain.values, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="options of each of 2 fits; got 1"):
        ensemble.attribute(fitted, found.query, fits=[fitted, fitted], own=own[:1])


def test_ranks_are_averaged():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    fits = fits_at(fitted, checkpoints(fitted))
    each = [centered_ranks(GradientCosine().attribute(f, found.query).values) for f in fits]
    scores = Ensemble(method=GradientCosine(), average="rank").attribute(
        fitted, found.query, fits=fits
    )
    torch.testing.assert_close(scores.values.double(), sum(each) / 3, rtol=1e-6, atol=1e-7)
    alone = Ensemble(method=GradientCosine(), average="rank").attribute(fitted, found.query)
    plain = GradientCosine().attribute(fitted, found.query)
    assert bool((spearman(alone.values, plain.values) > 1 - 1e-9).all()) and alone.unit == ""


def test_influence_keeps_its_unit_and_papers():
    found = case("mlp")
    fits = [case("mlp").fit(EKFAC(seed=s), weight_decay=0.1) for s in (0, 1)]
    scores = Ensemble(method=Influence(n_intervals=0)).attribute(fits[0], found.query, fits=fits)
    assert scores.unit == "nats" and "arXiv:2308.03296" in scores.facts["papers"]
    with pytest.raises(ValueError, match="same training examples"):
        Ensemble().attribute(fits[0], found.query, fits=[shared("lm").fitted(Identity())])


def test_a_method_that_keeps_some_scores_is_refused():
    found = shared("mlp")
    method = Ensemble(method=Influence(damping=0.1, keep=2))
    with pytest.raises(ValueError, match="ensemble needs the scores of all: leave out keep"):
        method.attribute(found.fitted(EKFAC()), found.query)
