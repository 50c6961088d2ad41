"""Temperature scaling finds the temperature of the least loss and changes nothing but confidence."""

import pytest
import torch

import headwater
from headwater.calibrate.temperature import HIGHEST, LOWEST, TemperatureScaling, best_temperature
from headwater.core.task import Classification, Regression
from headwater.numerics.calibration import log_losses
from tests.cases import mlp, mlp_data


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_is_that_of_the_least_loss(scale):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 5, generator=generator, dtype=torch.float64) * 2
    y = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    found = best_temperature(scale * z, y)
    grid = torch.logspace(-1.3, 1.3, 2001, dtype=torch.float64)
    losses = torch.stack([log_losses((scale * z / t).softmax(1), y).mean() for t in grid])
    assert found == pytest.approx(float(grid[losses.argmin()]), rel=2e-3)


def test_limits_hold_where_no_temperature_is_best():
    z = torch.tensor([[3.0, 0.0], [2.0, 1.0]]).double()
    assert best_temperature(z, torch.tensor([0, 0])) == pytest.approx(LOWEST)
    assert best_temperature(z, torch.tensor([1, 1])) == pytest.approx(HIGHEST)


def test_predictions_are_softened_logits_of_the_model():
    torch.manual_seed(0)
    fit = headwater.fit(mlp(), mlp_data(20), Classification(), curvature="identity")
    predictor = TemperatureScaling().calibrate(fit, mlp_data(30))
    queries = mlp_data(6)
    found = predictor.predict(queries)
    logits = fit.model(queries.tensors[0]).detach()
    torch.testing.assert_close(found.probabilities, (logits / predictor.temperature).softmax(1))
    assert found.predicted.tolist() == logits.argmax(1).tolist()
    assert found.table()["given_label"] == queries.tensors[1].tolist()
    assert set(found.measures()) == {"accuracy", "ece", "nll", "brier"}
    assert "6 examples of 3 classes" in repr(found)
    assert "guo2017calibration" in headwater.cite(found)


def test_a_model_without_classes_is_refused():
    x, _ = mlp_data(9).tensors
    fit = headwater.fit(mlp(), (x, torch.zeros(9, 3).double()), Regression(), curvature="identity")
    with pytest.raises(ValueError, match="Expected a classifier"):
        TemperatureScaling().calibrate(fit, fit.train)
