import pytest
import torch
from torch import nn

from headwater.models.vision import cnn, logistic_regression, mlp


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


def test_a_convolutional_network_is_its_layers_written_out():
    net = cnn(6, 4, channels=(2, 3))
    x = torch.randn(5, 36)
    h = x.view(5, 1, 6, 6)
    for i, size in ((1, 3), (4, 1)):
        h = torch.nn.functional.conv2d(h, net[i].weight, net[i].bias, padding=1).clamp(min=0)
        h = h[..., : 2 * size, : 2 * size].unflatten(2, (size, 2)).unflatten(4, (size, 2))
        h = h.mean((3, 5))
    torch.testing.assert_close(net(x), h.flatten(1) @ net[-1].weight.T + net[-1].bias)


def test_images_too_small_for_the_stages_are_refused():
    with pytest.raises(ValueError, match="3 stages halve images of 4 pixels to nothing"):
        cnn(4, 2, channels=(1, 1, 1))
