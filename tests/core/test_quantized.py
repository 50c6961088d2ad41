"""Layers of a few bits: what they compute, what they keep, and that they come back from disk."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headwater.adapt import QuIP
from headwater.core.files import ArtifactError
from headwater.core.quantized import (
    QuantizedLinear,
    WeightMaterializer,
    held_dense,
    load_quantized,
    quantized_layers,
    replace_module,
    save_quantized,
)
from headwater.models.gpt import GPT

DOUBLE = torch.float64


def layer(bits: int = 3, *, turned: bool = True, bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (6, 10), generator=generator, dtype=torch.uint8)
    return QuantizedLinear(
        codes,
        bits=bits,
        shape=(6, 10),
        scale=torch.full((1 if turned else 6, 1), 0.3),
        zero=torch.full((1 if turned else 6, 1), 1.5),
        rescale=torch.rand(10, generator=generator) + 0.5 if turned else None,
        seeds=torch.tensor([3, 4]) if turned else None,
        bias=nn.Parameter(torch.randn(6, generator=generator)) if bias else None,
    )


every = pytest.mark.parametrize("turned", [False, True])


@every
def test_it_computes_with_its_dense_weight(turned):
    made, x = layer(turned=turned), torch.randn(2, 5, 10)
    torch.testing.assert_close(made(x), F.linear(x, made.materialize(), made.bias))
    with held_dense(nn.Sequential(made)):
        torch.testing.assert_close(made(x), F.linear(x, made.materialize(), made.bias))
    assert made._held is None
    assert isinstance(made, WeightMaterializer)


@every
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_those_of_the_dense_layer(turned, bits):
    made = layer(bits, turned=turned).double()
    x = torch.randn(4, 10, dtype=DOUBLE, requires_grad=True)
    dense = F.linear(x, made.materialize(), made.bias).square().sum()
    expected = torch.autograd.grad(dense, [x, made.bias])
    actual = torch.autograd.grad(made(x).square().sum(), [x, made.bias])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(made, (x,))
    assert torch.autograd.gradgradcheck(lambda x: made(x).square(), (x,))


def test_it_works_under_vmap_and_forward_mode():
    made, x = layer(), torch.randn(4, 10)
    W = made.materialize()
    gradient = torch.func.vmap(torch.func.grad(lambda row: made(row).square().sum() / 2))(x)
    torch.testing.assert_close(gradient, made(x) @ W)
    _, moved = torch.func.jvp(made, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(moved, F.linear(torch.ones_like(x), W))


def test_the_backward_pass_keeps_no_dense_weight():
    made, saved = layer(), []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        made(torch.randn(4, 10, requires_grad=True))
    assert torch.Size([6, 10]) not in saved and torch.Size([10, 6]) not in saved


def test_weights_are_buffers_and_the_bias_stays_a_parameter():
    made = layer()
    assert [n for n, _ in made.named_parameters()] == ["bias"]
    assert {n for n, _ in made.named_buffers()} == {"codes", "scale", "zero", "rescale", "seeds"}
    assert made.codes.dtype == torch.uint8 and made.codes.numel() == 24  # 60 codes, filled up to 64


def test_bits_count_all_that_is_needed():
    # 24 bytes of codes, a scale and a zero in float32, ten numbers of D, two seeds
    assert layer().bits_per_weight() == pytest.approx(8 * (24 + 4 + 4 + 40 + 16) / 60)
    assert layer(turned=False).bits_per_weight() == pytest.approx(8 * (24 + 24 + 24) / 60)
    assert layer().digest() == layer().digest() != layer(4).digest()


def test_half_of_a_turn_is_refused():
    with pytest.raises(ValueError, match="got one of them"):
        QuantizedLinear(
            None,
            bits=2,
            shape=(2, 2),
            scale=torch.ones(1, 1),
            zero=torch.ones(1, 1),
            seeds=torch.zeros(2, dtype=torch.int64),
        )


def small(seed: int = 0) -> GPT:
    return GPT(20, n_layers=2, dim=16, n_heads=2, context=8, seed=seed)


def quantized() -> nn.Module:
    model = small()
    for name, module in list(model.named_modules()):
        if name.endswith(("up", "query")):
            made, _ = QuIP(bits=3, seed=1).layer(name, module, torch.eye(16, dtype=DOUBLE))
            replace_module(model, name, made)
    return model


def test_a_model_comes_back_from_disk(tmp_path):
    model, ids = quantized(), torch.arange(8)[None]
    save_quantized(model, tmp_path / "q", facts={"note": "here"}, made_from={"model": "abc"})
    again = load_quantized(small(seed=9), tmp_path / "q")
    assert list(quantized_layers(again)) == list(quantized_layers(model))
    assert torch.equal(again(ids), model(ids))
    assert again.head.weight is again.embed.weight  # tied, as it was
    from headwater.core.fingerprint import fingerprint_model

    assert fingerprint_model(again) == fingerprint_model(model)


def test_a_copy_and_another_dtype_work():
    model, ids = quantized(), torch.arange(8)[None]
    torch.testing.assert_close(copy.deepcopy(model)(ids), model(ids))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16
    assert half.get_submodule("blocks.0.up").codes.dtype == torch.uint8


def test_another_architecture_is_refused(tmp_path):
    save_quantized(quantized(), tmp_path / "q")
    with pytest.raises(ValueError, match=r"quantized layer 'blocks.0.attention.query'"):
        load_quantized(nn.Sequential(nn.Linear(2, 2)), tmp_path / "q")
    other = GPT(20, n_layers=3, dim=16, n_heads=2, context=8)
    with pytest.raises(ValueError, match=r"differs from this GPT: .*blocks\.2"):
        load_quantized(other, tmp_path / "q")


def test_a_damaged_file_is_refused(tmp_path):
    save_quantized(quantized(), tmp_path / "q")
    shard = next((tmp_path / "q").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=shard.name):
        load_quantized(small(), tmp_path / "q")
