import pytest
import torch

from headwater.models.bottleneck import BottleneckMLP


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("B_6-Wi_512", 24_657_374),
        ("B_12-Wi_512", 37_261_790),
        ("B_6-Wi_1024", 74_469_342),
        ("B_12-Wi_1024", 124_843_998),
    ],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = BottleneckMLP.named(name, 64 * 64 * 3, 11_230)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_without_contractions_the_network_is_linear():
    model = BottleneckMLP(5, 3, width=4, depth=3).double()
    for block in model.blocks:
        torch.nn.init.zeros_(block.contract.weight)
        torch.nn.init.zeros_(block.contract.bias)
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), model.head(model.embed(x)))


def test_a_block_is_the_published_formula():
    block = BottleneckMLP(5, 3, width=4, depth=1).double().blocks[0]
    torch.nn.init.normal_(block.norm.weight)
    x = torch.randn(7, 4, dtype=torch.float64)
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    middle = (normal * block.norm.weight) @ block.expand.weight.T + block.expand.bias
    gelu = middle * (1 + torch.erf(middle / 2**0.5)) / 2
    assert middle.shape[1] == 16
    torch.testing.assert_close(block(x), x + gelu @ block.contract.weight.T + block.contract.bias)


def test_images_are_flattened_and_other_sizes_refused():
    model = BottleneckMLP(16, 3, width=4, depth=1)
    image = torch.randn(2, 1, 4, 4)
    assert torch.equal(model(image), model(image.flatten(1)))
    with pytest.raises(ValueError, match="inputs of 16 numbers; got 9"):
        model(torch.zeros(2, 9))


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="such as 'B_6-Wi_512'; got 'B6'"):
        BottleneckMLP.named("B6", 4, 2)
