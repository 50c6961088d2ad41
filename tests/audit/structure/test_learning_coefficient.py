"""The local learning coefficient, held to the closed form of a quadratic loss."""

import math

import pytest
import torch
from torch import nn

from headwater.audit.structure import learning_coefficient
from headwater.audit.structure.learning_coefficient import langevin
from tests.structure_cases import fitted


def regression(n: int = 100, d: int = 4, *, twice: bool = False):
    """Least squares; with `twice` two of the inputs are one, so that a direction changes nothing."""
    torch.manual_seed(0)
    x = torch.randn(n, d, dtype=torch.float64)
    if twice:
        x[:, 1] = x[:, 0]
    y = x @ torch.randn(d, 1, dtype=torch.float64) + 0.1 * torch.randn(n, 1, dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y, driver="gelsd").solution.mT)
    return fitted(model, x, y), x.mT @ x / n


@pytest.mark.parametrize("twice", [False, True])
def test_a_quadratic_loss_has_its_closed_form(twice):
    fit, H = regression(twice=twice)
    n, gamma = 100, 1.0
    h = torch.linalg.eigvalsh(H)
    precision = n / math.log(n) * h + gamma
    expected = 0.5 * float((n / math.log(n) * h / precision).sum())
    found = learning_coefficient(
        fit, gamma=gamma, lr=0.01, steps=400, burn_in=50, n_chains=4, seed=1
    )
    # Langevin with steps of size ε has variance 1 / (precision (1 - ε precision / 4)): 10 % too much here
    steps = 0.5 * float((n / math.log(n) * h / (precision * (1 - 0.01 * precision / 4))).sum())
    assert expected < steps < 1.2 * expected
    assert found.estimate.low - 0.15 < steps < found.estimate.high + 0.15
    assert found.n_parameters == 4 and found.losses.shape == (4, 400)
    assert found.passes == 1 + 4 * 400


def test_a_direction_that_changes_nothing_lowers_it():
    options = {"gamma": 1.0, "lr": 0.01, "steps": 300, "burn_in": 50, "seed": 2}
    regular, singular = (
        learning_coefficient(regression(twice=twice)[0], **options) for twice in (False, True)
    )
    assert singular.estimate.value < regular.estimate.value - 0.2


def test_a_chain_repeats_itself_and_another_seed_does_not():
    def run(seed):
        return langevin(
            lambda p, step: (float(p["w"].square().sum()), {"w": 2 * p["w"]}),
            {"w": torch.zeros(3, dtype=torch.float64)},
            n=10,
            beta=1.0,
            gamma=0.0,
            lr=0.01,
            steps=5,
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_the_model_is_left_as_it_was():
    fit, _ = regression()
    before = fit.model.weight.detach().clone()
    learning_coefficient(fit, steps=5, burn_in=1, n_chains=2, batch_size=10)
    assert torch.equal(before, fit.model.weight)


def test_too_large_steps_and_wrong_options_are_refused():
    fit, _ = regression()
    with pytest.raises(FloatingPointError, match=r"diverged at step .*smaller"):
        learning_coefficient(fit, lr=1e6, steps=400, burn_in=1, n_chains=2)
    with pytest.raises(ValueError, match="burn_in < steps"):
        learning_coefficient(fit, steps=10, burn_in=10)
