"""QuIP on whole models: from a fit, block by block, resumed, refused, and traced afterwards."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import headwater
from headwater.adapt import QuIP, round_weight
from headwater.adapt.base import chosen_layers, weight_of
from headwater.core.blocks import BlockByBlock, block_names
from headwater.core.capture import plan_batches
from headwater.core.curvature import EKFAC, KFAC
from headwater.core.examples import DatasetExamples, TensorExamples
from headwater.core.files import ArtifactMismatch
from headwater.core.forward import input_moments
from headwater.core.quantized import QuantizedLinear, quantized_layers
from headwater.core.task import CausalLM, Classification
from headwater.models.gpt import GPT
from headwater.numerics.ranks import spearman

DOUBLE = torch.float64


def texts(n: int = 24, *, padded: bool = False) -> DatasetExamples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (n, 8), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, 5:] = 0
        ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    return DatasetExamples(
        [
            {"input_ids": i, "attention_mask": m, "labels": y}
            for i, m, y in zip(ids, mask, labels, strict=True)
        ]
    )


def gpt() -> GPT:
    model = GPT(20, n_layers=2, dim=16, n_heads=2, context=8).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def inputs_of(model: nn.Module, name: str, examples: DatasetExamples) -> Tensor:
    """Second moment of what a module reads at real positions, straight from a hook."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    batch = examples.batch(range(len(examples)))
    CausalLM().loss(model, batch)
    handle.remove()
    x = seen[0][batch["attention_mask"].bool()]
    return x.mT @ x / len(x)


@pytest.mark.parametrize("curvature", [EKFAC(), EKFAC(folds=1, own_bases=False), KFAC()])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fit_holds_the_second_moments_without_the_bias(curvature, padded, tmp_path):
    model, examples = gpt(), texts(padded=padded)
    fit = headwater.fit(
        model, examples, CausalLM(), curvature=curvature, layers="all", folder=tmp_path / "fit"
    )
    again = headwater.load(tmp_path / "fit", model, examples, CausalLM())
    for name in ("blocks.0.attention.key", "blocks.1.up", "blocks.1.down"):
        layer = next(x.name for x in fit.followed if name in [u.module for u in x.uses])
        A = fit.curvature.activation_covariance(layer)
        expected = inputs_of(model, name, examples)
        torch.testing.assert_close(A[:-1, :-1], expected, rtol=1e-8, atol=1e-8)
        assert float(A[-1, -1]) == pytest.approx(1.0)  # what the bias reads
    torch.testing.assert_close(again.curvature.activation_covariance(name), A)


@pytest.mark.parametrize("padded", [False, True])
def test_block_by_block_reads_what_changed_blocks_return(padded):
    model, examples = gpt(), texts(padded=padded)
    plans = plan_batches(examples, batch_size=7)
    blocks = BlockByBlock(model, CausalLM(), examples, plans)
    assert blocks.names == ["blocks.0", "blocks.1"]
    assert blocks.n_positions == (8 * 12 + 5 * 12 if padded else 8 * 24)
    names = ["blocks.0.attention.query", "blocks.0.attention.value", "blocks.0.down"]
    found = blocks.moments(names)
    for name in names:
        expected = inputs_of(model, name, examples)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9)
    assert found[names[0]] is found[names[1]]  # one tensor, one matrix
    with torch.no_grad():
        model.blocks[0].down.weight.mul_(1.5)
    blocks.advance()
    expected = inputs_of(model, "blocks.1.up", examples)  # of the changed model
    torch.testing.assert_close(
        blocks.moments(["blocks.1.up"])["blocks.1.up"], expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("padded", [False, True])
def test_second_moments_come_from_one_forward_pass_too(padded):
    model, examples = gpt(), texts(padded=padded)
    plans, names = plan_batches(examples, batch_size=7), chosen_layers(model)
    found = input_moments(model, CausalLM(), examples, names, batches=plans)
    for name in names:
        expected = inputs_of(model, name, examples)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9)
    fit = headwater.fit(model, examples, CausalLM(), curvature="kfac", layers="all")
    given, fitted = (QuIP(bits=2).adapt(model, source) for source in (found, fit))
    assert given.relative_proxy == pytest.approx(fitted.relative_proxy, rel=1e-3)
    with pytest.raises(ValueError, match=r"no second moment of what 'blocks\.0\.attention\.query'"):
        QuIP(bits=2).adapt(model, {})


def test_models_whose_blocks_are_no_chain_are_refused():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, x):
            return self.parts[1](x + self.parts[0](x))

    data = TensorExamples(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"do not read one another.*statistics of a fit"):
        QuIP(bits=4).adapt(Skips(), data, task=Classification())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("incoherence", [False, True])
def test_the_layer_holds_what_was_rounded(bits, incoherence):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator, dtype=DOUBLE)
    H, module = x.mT @ x / 200, nn.Linear(24, 12, dtype=DOUBLE)
    method = QuIP(bits=bits, incoherence=incoherence, measure=True)
    layer, row = method.layer("a", module, H)
    error = layer.materialize(DOUBLE) - module.weight.detach()
    proxy = float(((error @ H) * error).sum())
    assert row["proxy"] == pytest.approx(proxy, rel=1e-5)  # scales are kept in float32
    plain = (x @ module.weight.detach().mT).square().sum(1).mean()
    outputs = (x @ error.mT).square().sum(1).mean() / plain
    assert row["relative_proxy"] == pytest.approx(float(outputs), rel=1e-5)
    assert row["bits_per_weight"] == pytest.approx(layer.bits_per_weight())
    assert layer.bias is module.bias
    assert 1 <= row["mu_H"] <= 24**0.5 and 0 < row["trace_ratio"] <= 1
    assert (layer.seeds is not None) is incoherence


def test_one_huge_input_does_not_spoil_a_layer():
    """As behind massive activations: D would make its column stand out, and the grid would cut it off."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 144, generator=generator, dtype=DOUBLE)
    W[5, 7] = 20
    x = torch.randn(1000, 144, generator=generator, dtype=DOUBLE)
    x[::200, 7] = 3e5
    H = x.mT @ x / len(x)
    found = {
        rescale: round_weight(W, H, bits=4, rounding="ldlq", seeds=(1, 2), rescale=rescale).facts
        for rescale in ("auto", "always", "never")
    }
    assert found["always"]["mu_W_turned"] > 8 > found["auto"]["mu_W_turned"]
    assert found["auto"] == found["never"]
    assert found["auto"]["relative_proxy"] < found["always"]["relative_proxy"] / 100
    plain = {
        rescale: round_weight(
            W.clamp(-3, 3), torch.eye(144, dtype=DOUBLE), bits=4, seeds=(1, 2), rescale=rescale
        )
        for rescale in ("auto", "always")
    }
    assert plain["auto"].facts == plain["always"].facts


def test_better_methods_err_less_and_more_bits_too():
    model, examples = gpt(), texts()
    fit = headwater.fit(model, examples, CausalLM(), curvature="ekfac", layers="all")

    def error(**options) -> float:
        return QuIP(**options).adapt(model, fit).relative_proxy

    for incoherence in (False, True):
        errors = [
            error(bits=3, rounding=r, incoherence=incoherence)
            for r in ("ldlq_rg", "ldlq", "nearest")
        ]
        assert errors == sorted(errors)
    by_bits = [error(bits=bits) for bits in (4, 3, 2)]
    assert by_bits == sorted(by_bits) and by_bits[0] < 0.05


def test_the_model_is_copied_and_the_seed_decides():
    model, examples = gpt(), texts()
    before = copy.deepcopy(model.state_dict())
    found, again, other = (
        QuIP(bits=3, seed=seed).adapt(model, examples, task=CausalLM()) for seed in (0, 0, 1)
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not quantized_layers(model) and len(quantized_layers(found.model)) == 12
    one, two, three = (r.model.blocks[0].up for r in (found, again, other))
    assert one.digest() == two.digest() != three.digest()
    assert found.model.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert found.model.head.weight is found.model.embed.weight
    assert "12 layers" in repr(found) and "block by block" in repr(found)
    assert found.table()["layer"][0] == "blocks.0.attention.query"


def test_a_killed_run_goes_on_layer_by_layer(tmp_path, monkeypatch):
    model, examples, seen = gpt(), texts(), []
    whole = QuIP(bits=2).adapt(model, examples, task=CausalLM())

    def stop(done: int, total: int, note: str) -> None:
        seen.append(note)
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QuIP(bits=2).adapt(model, examples, task=CausalLM(), folder=tmp_path / "w", progress=stop)
    kept = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("manifest.json")}
    assert len(kept) == 7
    made: list[str] = []
    layer_of = QuIP.layer

    def counted(self, name, module, H):
        made.append(name)
        return layer_of(self, name, module, H)

    monkeypatch.setattr(QuIP, "layer", counted)
    found = QuIP(bits=2).adapt(model, examples, task=CausalLM(), folder=tmp_path / "w")
    assert len(made) == 12 - 7 and not set(made) & set(kept)
    for name, layer in quantized_layers(whole.model).items():
        other = found.model.get_submodule(name)
        assert isinstance(other, QuantizedLinear) and other.digest() == layer.digest()
    drop = {"seconds"}
    rows = [[{k: v for k, v in r.items() if k not in drop} for r in q.rows] for q in (whole, found)]
    assert rows[0] == rows[1]
    assert not list((tmp_path / "w").rglob("manifest.json"))


def test_a_fit_of_another_checkpoint_is_refused():
    model, examples = gpt(), texts()
    fit = headwater.fit(model, examples, CausalLM(), curvature="ekfac", layers="all")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].up.weight[0, 0] += 1e-6
    with pytest.raises(ArtifactMismatch, match="made from another model"):
        QuIP().adapt(other, fit)


def test_fits_without_the_statistics_are_refused_with_what_to_do():
    small = nn.Sequential(nn.Linear(4, 3))
    data = TensorExamples(torch.randn(9, 4), torch.randint(3, (9,)))
    fit = headwater.fit(small, data, Classification(), curvature="dual")
    with pytest.raises(ValueError, match=r"'dual', holds no activation covariances.*calibration"):
        QuIP().adapt(small, fit)
    model, examples, task = gpt(), texts(), CausalLM()
    fit = headwater.fit(model, examples, task, curvature="identity", layers="all")
    with pytest.raises(
        ValueError, match=r"holds no activation covariance of 'blocks.0.attention.query'.*ekfac"
    ):
        QuIP().adapt(model, fit)
    fit = headwater.fit(model, examples, task, curvature=KFAC(approximation="reduce"), layers="all")
    with pytest.raises(ValueError, match="factors of approximation='reduce'"):
        QuIP().adapt(model, fit)
    fit = headwater.fit(model, examples, task, curvature="ekfac", layers=["blocks.1.*"])
    with pytest.raises(ValueError, match=r"does not follow 'blocks.0.attention.query'"):
        QuIP().adapt(model, fit)


def test_broken_second_moments_name_the_layer():
    module = nn.Linear(3, 2)
    for H in (torch.full((3, 3), torch.nan), torch.eye(4), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="Layer 'up' cannot be quantized: "):
            QuIP().layer("up", module, H.double())


def test_too_few_positions_are_warned_of():
    with pytest.warns(
        UserWarning, match=r"8 positions of data give the 64 inputs of 'blocks.0.down'"
    ):
        QuIP(bits=4, rounding="nearest").adapt(gpt(), texts(1), task=CausalLM())


def test_a_fit_on_few_vectors_and_given_moments_of_lower_rank_are_warned_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    data = TensorExamples(torch.randn(9, 8), torch.randint(3, (9,)))
    fit = headwater.fit(model, data, Classification(), curvature="kfac")
    with pytest.warns(UserWarning, match="9 positions of data give the 12 inputs of '2'"):
        QuIP(bits=4).adapt(model, fit)
    x = torch.randn(40, 12, dtype=DOUBLE)
    whole = {"0": x[:, :8].mT @ x[:, :8], "2": x.mT @ x}
    short = whole | {"2": x[:5].mT @ x[:5]}
    with pytest.warns(UserWarning, match="second moment of what '2' reads is of lower rank"):
        QuIP(bits=4).adapt(model, short)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(QuIP(bits=4).adapt(model, whole).rows) == 2


def test_options_that_make_no_sense_are_refused():
    for options, message in (
        ({"bits": 8}, "bits must be 2, 3 or 4; got 8"),
        ({"stochastic": True}, "Stochastic rounding goes with"),
        ({"damping": 0.0}, "positive damping"),
    ):
        with pytest.raises(ValueError, match=message):
            QuIP(**options)
    with pytest.raises(ValueError, match=r"need their task"):
        QuIP().adapt(gpt(), texts())


def test_layers_are_those_of_the_blocks_and_never_tied():
    model = gpt()
    assert block_names(model) == ["blocks.0", "blocks.1"]
    assert len(chosen_layers(model)) == 12 and "head" not in chosen_layers(model)
    assert chosen_layers(model, ["blocks.*.up"]) == ["blocks.0.up", "blocks.1.up"]
    with pytest.raises(ValueError, match=r"no linear layers of head to quantize.*head share"):
        chosen_layers(model, ["head"])
    untied = GPT(20, n_layers=1, dim=8, n_heads=2, tied=False)
    assert chosen_layers(untied, ["head"]) == ["head"]
    mlp = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert chosen_layers(mlp) == ["0", "2"]


def test_an_mlp_is_quantized_from_its_fit_and_block_by_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorExamples(torch.randn(60, 8), torch.randint(3, (60,)))
    fit = headwater.fit(model, data, Classification(), curvature="kfac")
    for source in (fit, data):
        found = QuIP(bits=4).adapt(model, source, task=Classification())
        x = data.tensors[0]
        gap = (found.model(x) - model(x)).norm() / model(x).norm()
        assert float(gap) < 0.2


def test_stochastic_rounding_is_offered_and_repeats_itself():
    model, examples = gpt(), texts()
    method = QuIP(bits=3, rounding="ldlq", stochastic=True)
    one, two = (method.adapt(model, examples, task=CausalLM()) for _ in range(2))
    plain = replace(method, stochastic=False).adapt(model, examples, task=CausalLM())
    digests = [r.model.blocks[1].down.digest() for r in (one, two, plain)]
    assert digests[0] == digests[1] != digests[2]
    assert one.relative_proxy > plain.relative_proxy


def test_conv1d_weights_are_the_other_way_round():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    module = transformers.Conv1D(6, 4)
    assert weight_of(module).shape == (6, 4)
    layer, _ = QuIP(bits=4, rounding="nearest", incoherence=False).layer(
        "c", module, torch.eye(4, dtype=DOUBLE)
    )
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), module(x), rtol=0, atol=0.02)


def test_a_quantized_model_is_followed_and_traced():
    model, train = gpt().float(), texts()
    fit = headwater.fit(model, train, CausalLM(), curvature="ekfac", layers="all")
    found = QuIP(bits=4).adapt(model, fit)
    after = headwater.fit(found.model, train, CausalLM(), curvature="ekfac", layers=["*"])
    assert after.followed.coverage == 1.0 and not after.followed.left_out
    queries = texts().subset(range(6))
    scores = [
        headwater.trace.Influence(damping="0.1 relative").attribute(f, queries).values
        for f in (fit, after)
    ]
    assert float(spearman(*scores).mean()) > 0.6


def test_the_quantized_weight_has_the_gradient_of_the_effective_weight():
    """Capture's gradient of a quantized layer is autograd's in the dense weight that it stands for."""
    model, train = gpt(), texts(4)
    found = QuIP(bits=3).adapt(model, texts(), task=CausalLM())
    dense = copy.deepcopy(found.model)
    for name, layer in quantized_layers(dense).items():
        linear = nn.Linear(layer.in_features, layer.out_features, dtype=DOUBLE)
        with torch.no_grad():
            linear.weight.copy_(layer.materialize(DOUBLE))
            linear.bias.copy_(layer.bias)
        parent, _, last = name.rpartition(".")
        setattr(dense.get_submodule(parent), last, linear)
    options = {"curvature": "identity", "layers": ["blocks.*.up.weight", "blocks.*.up"]}
    scores = [
        headwater.trace.GradientDot()
        .attribute(headwater.fit(m, train, CausalLM(), **options), train)
        .values
        for m in (found.model, dense)
    ]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_results_cite_the_paper():
    found = QuIP(bits=4, rounding="nearest").adapt(gpt(), texts(), task=CausalLM())
    assert "chee2023quip" in headwater.cite(found)


def test_the_relative_error_of_turned_gaussian_weights_is_the_known_one():
    W = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    for bits, expected in ((2, 0.215), (3, 0.042), (4, 0.0119)):
        found = round_weight(
            W, torch.eye(128, dtype=DOUBLE), bits=bits, rounding="nearest", seeds=(1, 2)
        )
        assert found.facts["weight_error"] == pytest.approx(expected, rel=0.05)
