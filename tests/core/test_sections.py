"""Models cut into sections, and biases as a constant activation."""

import pytest
import torch
from torch import nn

import headwater
from headwater.core.sections import Sections, default_nodes, join, split, steps_of


@pytest.mark.parametrize(
    "shapes",
    [[(5,)], [(3, 5)], [(3, 5), (3, 2)], [(4, 2, 3)], [(4, 2, 3), (1, 2, 3)], [(2, 2, 2, 2)]],
)
def test_parts_side_by_side_come_apart_again(shapes):
    parts = tuple(torch.randn(6, *shape) for shape in shapes)
    x = join(parts)
    assert x.ndim == 3 and x.shape[0] == 6
    for part, again in zip(parts, split(x, shapes), strict=True):
        assert torch.equal(part, again)


def test_channels_are_the_dimension_and_sites_the_positions():
    x = torch.arange(24.0).reshape(1, 4, 2, 3)
    assert torch.equal(join((x,))[0, 4], x[0, :, 1, 1])


def sections(model: nn.Module, nodes=None) -> Sections:
    steps = steps_of(model)
    return Sections(model, headwater.Regression(), steps, nodes or default_nodes(steps))


def test_the_constant_scales_every_bias_of_a_section():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    cut = sections(model, ["0"])
    x, c = torch.randn(5, 4).double(), torch.randn(5, 1).double()
    batch = (x, torch.zeros(5, 3).double())
    with cut.hooks(), torch.no_grad():
        (here, _) = cut.forward(batch)
        out = cut.run(0, torch.cat([x, c], 1)[:, None], here, batch)[:, 0]
    first, _, second = model
    h = (x @ first.weight.mT + c * first.bias).tanh()
    expected = torch.cat([h @ second.weight.mT + c * second.bias, c], 1)
    torch.testing.assert_close(out, expected)
    # outside of a section the model is as it was
    torch.testing.assert_close(model(x), second(first(x).tanh()))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.BatchNorm1d(6)], ids=["layer", "batch"])
def test_a_norm_s_shift_is_a_bias_too(norm):
    torch.manual_seed(0)
    for p in norm.parameters():
        nn.init.normal_(p)
    if isinstance(norm, nn.BatchNorm1d):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    model = nn.Sequential(norm, nn.Linear(6, 2)).double().eval()
    cut, x = sections(model, ["0"]), torch.randn(5, 6).double()
    batch = (x, torch.zeros(5, 2).double())
    with cut.hooks(), torch.no_grad():
        (here, _) = cut.forward(batch)
        zero = cut.run(0, torch.cat([x, 0 * x[:, :1]], 1)[:, None], here, batch)[:, 0, :2]
    model[1].bias.data.zero_()
    if isinstance(norm, nn.BatchNorm1d):
        norm.running_mean.zero_()
    norm.bias.data.zero_()
    torch.testing.assert_close(zero, model(x))


def test_sections_one_after_the_other_are_the_model_and_share_its_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 5), nn.Dropout()), nn.Linear(5, 3)
    ).double()
    cut, x = sections(model), torch.randn(5, 4).double()
    assert cut.names == ("0", "2.0", "3", "output")
    batch = (x, torch.zeros(5, 3).double())
    cut.check(batch)
    with cut.hooks(), torch.no_grad():
        found = cut.forward(batch)
        outputs = cut.rest(1, found[1].f, found, batch)
    torch.testing.assert_close(outputs[:, 0], model.eval()(x))
    assert sum(cut.share(n) for n in range(3)) == pytest.approx(1)


def test_whole_numbers_are_no_node_layer():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2)).double()
    steps, ids = steps_of(model), torch.randint(5, (3, 2))
    with pytest.raises(ValueError, match=r"Embedding.*no supported kind"):
        Sections(model, headwater.Regression(), steps, ["0"])
    cut = Sections(model, headwater.Regression(), steps, ["1"])
    cut.check((ids, torch.zeros(3, 2).double()))
