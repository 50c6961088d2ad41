"""The mean curvature of one model with several weights."""

from dataclasses import replace

import pytest
import torch

from headwater.core.curvature import EKFAC, KFAC, Dense, Dual, FitContext, Identity
from headwater.core.fit import fits_at
from tests.curvature_cases import block_matrices, case, dense_gauss_newton


def several(name: str):
    """A fit, and the same at two weights that differ much."""
    fitted = case(name).fit(Identity())
    states = [{k: v * s for k, v in fitted.model.state_dict().items()} for s in (1.0, 0.3)]
    return fitted, list(fits_at(fitted, states))


def context(fitted, at, folder=None):
    first, *rest = (each.capture() for each in at)
    return FitContext(first, fitted.train, fitted.batches(fitted.train), None, folder, rest)


@pytest.mark.parametrize("method", [Dense(), Dual(cut=0.0)])
def test_exact_forms_are_the_mean_of_the_matrices(method):
    fitted, at = several("mlp")
    expected = sum(dense_gauss_newton(each) for each in at) / 2
    curvature = method.fit(context(fitted, at))
    spectrum = curvature.spectra()["all layers"].sort().values
    torch.testing.assert_close(spectrum, torch.linalg.eigvalsh(expected), rtol=1e-8, atol=1e-10)
    assert curvature.n_examples == 2 * len(fitted.train)


@pytest.mark.parametrize("name", ["mlp", "positions", "lm"])
def test_ekfac_corrects_the_mean_in_one_basis(name):
    fitted, at = several(name)
    curvature = EKFAC(fisher="exact", cut=0.0, folds=1).fit(context(fitted, at))
    mean = sum(dense_gauss_newton(each) for each in at) / 2
    start = 0
    for layer in fitted.followed:
        block = mean[start : start + layer.numel, start : start + layer.numel]
        start += layer.numel
        Q_A, Q_G = curvature.bases[layer.name]
        Q = torch.kron(Q_G.contiguous(), Q_A.contiguous())
        found = curvature.eigenvalues[layer.name].flatten().double()
        torch.testing.assert_close((Q.mT @ block @ Q).diagonal(), found)


def test_kfac_of_the_same_weights_twice_is_kfac():
    fitted, at = several("mlp")
    method = KFAC(fisher="exact", cut=0.0)
    once, twice = (method.fit(context(fitted, some)) for some in (at[:1], [at[0], at[0]]))
    fits = [replace(fitted, curvature=c) for c in (once, twice)]
    one, two = (block_matrices(each) for each in fits)
    for name, block in one.items():
        torch.testing.assert_close(two[name], block)


@pytest.mark.parametrize("method", [EKFAC(folds=1), Dual()])
def test_a_killed_fit_goes_on_with_the_weights_it_was_at(method, tmp_path):
    fitted, at = several("mlp")
    whole, here = method.fit(context(fitted, at)), context(fitted, at, tmp_path)
    calls = []

    def die(*step):
        calls.append(step)
        if len(calls) == 2:  # one batch with the first weights, then one with the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.fit(replace(here, progress=die))
    for name, tensor in method.fit(here).tensors().items():
        torch.testing.assert_close(tensor, whole.tensors()[name])


def test_a_tolerance_would_stop_at_the_first_weights():
    fitted, at = several("mlp")
    with pytest.raises(ValueError, match="uses all data with each; pass tolerance=None"):
        EKFAC(tolerance=0.1).fit(context(fitted, at))
