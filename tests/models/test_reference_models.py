"""All small reference models: the checks of the core pass on them, and they train side by side."""

import pytest
import torch

from headwater.core.doctor import examine
from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification
from headwater.models.bottleneck import BottleneckMLP
from headwater.models.gpt import GPT
from headwater.models.vision import cnn, logistic_regression, mlp
from headwater.training.loop import example_losses, train
from headwater.training.optimizers import AdamW
from tests.curvature_cases import Tokens

IMAGES = {
    "logistic regression": lambda seed: logistic_regression(64, 3, seed=seed),
    "mlp": lambda seed: mlp([64, 12, 3], seed=seed),
    "cnn": lambda seed: cnn(8, 3, channels=(3, 4), seed=seed),
    "bottleneck": lambda seed: BottleneckMLP(64, 3, width=6, depth=2, seed=seed),
}


def gpt(seed=0, **options):
    return GPT(7, context=8, n_layers=2, dim=8, n_heads=2, seed=seed, **options)


def images(n=12):
    return TensorExamples(torch.randn(n, 64), torch.arange(n) % 3)


@pytest.mark.parametrize("name", IMAGES)
def test_the_checks_pass_on_image_models_and_everything_is_followed(name):
    found = examine(IMAGES[name](0), images(), Classification())
    assert found.ok, [c for c in found.checks if c.status == "fail"]
    assert found.coverage == 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_checks_pass_on_the_language_model_and_everything_is_followed(tied):
    found = examine(gpt(tied=tied), Tokens([[1, 2, 3, 4], [2, 3], [5, 1, 2, 6, 6]]), CausalLM())
    assert found.ok, [c for c in found.checks if c.status == "fail"]
    assert found.coverage == 1
    assert not any(layer.kind == "functional" for layer in found.layers)


@pytest.mark.parametrize("name", IMAGES)
def test_image_models_train_side_by_side(name):
    data, rule = images(), AdamW(lr=0.01, batch_size=4, epochs=3)
    models = [IMAGES[name](seed).double() for seed in range(2)]
    x, y = data.tensors[0].double(), data.tensors[1]
    everything = torch.arange(12).repeat(2, 1)
    together = train(models, x, y, subsets=everything, seeds=[0, 1], optimizer=rule)
    for i, model in enumerate(models):
        alone = train([model], x, y, subsets=everything[:1], seeds=[i], optimizer=rule)
        for key, value in alone.items():
            torch.testing.assert_close(together[key][i], value[0], rtol=1e-8, atol=1e-10)


def test_language_models_train_side_by_side():
    tokens = torch.randint(7, (6, 5))

    def loss(logits, targets):
        rows = example_losses(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        return rows.view(len(targets), -1).sum(1)

    models, rule = [gpt(seed).double() for seed in range(2)], AdamW(lr=0.01, batch_size=3, epochs=2)
    everything = torch.arange(6).repeat(2, 1)
    options = {"optimizer": rule, "loss": loss}
    together = train(models, tokens, tokens, subsets=everything, seeds=[0, 1], **options)
    for i, model in enumerate(models):
        alone = train([model], tokens, tokens, subsets=everything[:1], seeds=[i], **options)
        for key, value in alone.items():
            torch.testing.assert_close(together[key][i], value[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [*IMAGES, "gpt"])
def test_weights_come_from_the_seed_and_leave_the_callers_generator_alone(name):
    make = IMAGES.get(name, gpt)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    a, b, c = make(1).state_dict(), make(1).state_dict(), make(2).state_dict()
    assert torch.equal(torch.rand(1), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)
