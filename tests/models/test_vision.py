import pytest
import torch
from torch import nn

from headwater.models.vision import logistic_regression, mlp


def test_an_mlp_has_biases_and_a_relu_between_each_two_layers():
    model = mlp([5, 4, 3, 2])
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        "0.weight": (4, 5),
        "0.bias": (4,),
        "2.weight": (3, 4),
        "2.bias": (3,),
        "4.weight": (2, 3),
        "4.bias": (2,),
    }


def test_the_seed_decides_the_weights_and_nothing_else_does():
    first = mlp([5, 4, 2], seed=1).state_dict()
    torch.rand(7)
    again, other = mlp([5, 4, 2], seed=1).state_dict(), mlp([5, 4, 2], seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_global_random_state_stays_as_it_was():
    before = torch.get_rng_state()
    mlp([5, 4, 2], seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_logistic_regression_is_one_linear_layer():
    model = logistic_regression(5, 3)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        "0.weight": (3, 5),
        "0.bias": (3,),
    }


def test_a_single_width_is_refused():
    with pytest.raises(ValueError, match=r"input and an output width; got \[5\]"):
        mlp([5])
