import pytest
import torch
from torch import nn

from headwater.core.follow import evaluation_mode, follow
from headwater.core.layers import FUNCTIONAL
from headwater.core.task import Classification
from tests.cases import (
    CASES,
    CLASSES,
    Net,
    QuantizedLinear,
    assert_same,
    autograd,
    gradients,
    numbers,
)

TASK = Classification()


def net():
    return nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 20), nn.Linear(20, CLASSES)
    ).double()


def covered(followed):
    return {n for layer in followed for n in layer.parameters}


def test_trainable_parameters_are_followed_by_default():
    model, batch = net(), numbers(5)
    for p in model[0].parameters():
        p.requires_grad_(False)
    followed = follow(model, TASK, batch)
    assert [layer.name for layer in followed] == ["1", "3", "4"] and len(followed) == 3
    assert [(x.name, x.numel, x.why) for x in followed.left_out] == [
        ("0.weight", 30, "not asked for"),
        ("0.bias", 6, "not asked for"),
    ]
    inside, outside = 12 + 140 + 63, 36
    assert followed.coverage == pytest.approx(inside / (inside + outside))
    assert (
        covered(follow(model, TASK, batch, layers="all")) == dict(model.named_parameters()).keys()
    )
    model.requires_grad_(False)
    assert follow(model, TASK, batch).coverage == 1


@pytest.mark.parametrize(
    ("layers", "skip", "expected"),
    [
        ("0", (), {"0.weight", "0.bias"}),
        (["0", "3"], "3.bias", {"0.weight", "0.bias", "3.weight"}),
        (["*.weight"], ["1.*"], {"0.weight", "3.weight", "4.weight"}),
        ("all", ["3", "4"], {"0.weight", "0.bias", "1.weight", "1.bias"}),
        (["[01].bias"], (), {"0.bias", "1.bias"}),
    ],
)
def test_layers_are_chosen_and_skipped_by_patterns(layers, skip, expected):
    model, batch = net(), numbers(5)
    followed = follow(model, TASK, batch, layers=layers, skip=skip)
    assert covered(followed) == expected
    assert all(layer.kind != FUNCTIONAL for layer in followed)
    named = dict(model.named_parameters())
    assert {x.name: x.numel for x in followed.left_out} == {
        n: p.numel() for n, p in named.items() if n not in expected
    }
    actual = gradients(model, TASK, batch, followed)
    assert_same(actual, autograd(model, TASK.loss, batch, expected))


def test_matrices_with_a_long_side_are_left_out_and_named():
    followed = follow(net(), TASK, numbers(5), max_side=10)
    assert {x.name: x.why for x in followed.left_out} == {
        "3.weight": "a side of 20 exceeds max_side=10",
        "4.weight": "a side of 20 exceeds max_side=10",
    }
    assert covered(followed) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.bias", "4.bias"}


def test_long_parameters_outside_modules_are_left_out_as_well():
    model = Net(
        lambda self, x: self.a(x) + self.table.sum(0),
        a=nn.Linear(5, CLASSES),
        table=nn.Parameter(torch.zeros(40, CLASSES)),
    ).double()
    followed = follow(model, TASK, numbers(5), max_side=10)
    assert [x.name for x in followed.left_out] == ["table"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": "encoder"},
            r"layers='encoder' and skip=\[\] \(not asked for\).*0.bias, 0.weight",
        ),
        ({"skip": ["*"]}, r"skip=\['\*'\] \(skipped\)"),
    ],
)
def test_nothing_to_follow_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        follow(net(), TASK, numbers(5), **options)


def test_tied_and_reused_modules_are_reported():
    model, task, batch = CASES["tied embedding"].make()
    followed = follow(model, task, batch)
    assert followed.tied == (("embed", "head"),)
    assert [(x.name, x.kind, len(x.uses)) for x in followed] == [
        ("embed", "linear", 2),
        ("mix", "linear", 1),
        ("head.bias", "bias", 1),
    ]
    assert followed.coverage == 1
    model, task, batch = CASES["three times"].make()
    assert follow(model, task, batch).reused == (("a", 3),)


def test_a_bias_is_a_column_only_where_exactly_the_same_modules_use_it():
    model, task, batch = CASES["shared bias"].make()
    followed = follow(model, task, batch)
    assert {x.name: (x.kind, x.parameters) for x in followed} == {
        "a": ("linear", ("a.weight",)),
        "b": ("linear", ("b.weight",)),
        "head": ("linear", ("head.weight", "head.bias")),
        "a.bias": ("bias", ("a.bias",)),
        "c.bias": ("bias", ("c.bias",)),
    }


@pytest.mark.parametrize("name", ["weight used elsewhere", "another forward", "sequence first"])
def test_without_the_proof_what_a_layer_seems_to_be_is_believed(name):
    model, task, batch = CASES[name].make()
    believed = follow(model, task, batch, prove=False)
    actual = gradients(model, task, batch, believed)
    expected = autograd(model, task.loss, batch, actual)
    wrong = {n for n, x in expected.items() if not torch.allclose(actual[n], x)}
    proven = {x.name: x for x in follow(model, task, batch)}
    assert wrong
    for layer in believed:
        if wrong & set(layer.parameters):
            assert proven.get(layer.name) != layer


def test_sequence_first_modules_are_followed_along_the_other_axis():
    model, task, batch = CASES["sequence first"].make()
    axes = {x.name: [use.axis for use in x.uses] for x in follow(model, task, batch) if x.uses}
    assert axes["body.layers.0.linear1"] == axes["body.layers.1.norm2"] == [1]
    assert axes["lift"] == axes["head"] == [0]


def test_what_all_examples_read_alike_is_followed_for_each():
    def run(self, x):
        positions = torch.arange(x.shape[1])[None]
        return self.head((self.a(x) + self.p(positions)).tanh().sum(1))

    model = Net(run, a=nn.Linear(5, 6), p=nn.Embedding(3, 6), head=nn.Linear(6, CLASSES)).double()
    batch = numbers(3, 5)
    followed = follow(model, TASK, batch)
    assert {x.name: x.uses[0].axis for x in followed} == {"a": 0, "p": None, "head": 0}
    assert_same(gradients(model, TASK, batch, followed), autograd(model, TASK.loss, batch))


def test_where_outputs_cannot_be_repeated_for_each_example_torch_func_is_used():
    def run(self, x):
        row = self.p(torch.zeros(1).long())
        return self.a(x) + row.view(CLASSES)  # exactly one row

    model = Net(run, a=nn.Linear(5, CLASSES), p=nn.Embedding(1, CLASSES)).double()
    batch = numbers(5)
    followed = follow(model, TASK, batch)
    assert [x.name for x in followed if x.kind == FUNCTIONAL] == ["p.weight"]
    assert_same(gradients(model, TASK, batch, followed), autograd(model, TASK.loss, batch))


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_weights_made_of_other_parameters_are_followed_through_these(norm):
    linear = nn.Linear(5, CLASSES)
    utils = nn.utils.parametrizations
    linear = utils.weight_norm(linear) if norm == "weight" else nn.utils.weight_norm(linear)
    model, batch = nn.Sequential(linear).double(), numbers(5)
    followed = follow(model, TASK, batch)
    assert followed.coverage == 1 and not followed.left_out
    assert_same(gradients(model, TASK, batch, followed), autograd(model, TASK.loss, batch))


def test_quantized_weights_are_left_out_skipped_or_too_long_by_name():
    model = nn.Sequential(nn.Linear(5, 6), QuantizedLinear(6, CLASSES)).double()
    model[1].weight = model[1].weight.to(torch.int8)
    batch = numbers(5)
    for options, why in [
        ({}, "quantized; ask for it by name"),
        ({"layers": ["0", "1.weight"], "skip": "1.weight"}, "skipped"),
        ({"layers": ["0", "1"], "max_side": 5}, "a side of 6 exceeds max_side=5"),
    ]:
        left_out = {
            x.name: (x.numel, x.why) for x in follow(model, TASK, batch, **options).left_out
        }
        assert left_out["1.weight"] == (18, why)


def test_packed_weights_that_are_parameters_are_quantized_ones():
    model = nn.Sequential(nn.Linear(5, 6), QuantizedLinear(6, CLASSES)).double()
    packed = nn.Parameter(model[1].weight.to(torch.int8), requires_grad=False)
    del model[1].weight
    model[1].weight = packed
    batch = numbers(5)
    followed = follow(model, TASK, batch, layers="all")
    assert covered(followed) == {"0.weight", "0.bias", "1.bias"}
    assert [x.name for x in followed.left_out] == ["1.weight"]
    assert covered(follow(model, TASK, batch, layers=["1"])) == {"1.weight", "1.bias"}


def test_modes_are_restored_one_by_one():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_to_leave_the_fast_path(dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, CLASSES))
    x, y = torch.randn(4, 40), torch.randint(CLASSES, (4,))
    followed = follow(model.to(dtype), TASK, (x.to(dtype), y))
    assert [layer.kind for layer in followed] == ["linear", "norm", "linear"]
