"""Forward passes over a dataset: order, padding and pooling."""

import pytest
import torch
from torch import nn

from headwater.core.capture import plan_batches
from headwater.core.curvature import Identity
from headwater.core.forward import evaluate, last_module, representations
from headwater.core.prediction import Categorical
from headwater.core.task import FunctionTask
from tests.curvature_cases import Tokens, shared


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_values_come_in_the_order_of_the_examples(batch_size):
    found = shared("lm")
    plans = plan_batches(found.train, batch_size=batch_size)
    losses = evaluate(found.model, found.train, found.task.loss, batches=plans)
    expected = [found.task.loss(found.model, found.train.batch([i])) for i in range(4)]
    torch.testing.assert_close(losses, torch.cat(expected).detach())


def test_the_representation_is_what_the_head_reads():
    found = shared("mlp")
    fitted = found.fitted(Identity())
    assert last_module(found.model, found.task, found.train.batch([0])) == "2"
    x = found.train.batch(range(len(found.train)))[0]
    h = representations(found.model, found.task, found.train, batches=fitted.batches(found.train))
    torch.testing.assert_close(h, found.model[:2](x).detach())


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_does_not_count(pool):
    found = shared("lm")
    sequences = found.train.sequences

    def of(extra, size):
        data = Tokens(sequences, extra=extra)
        plans = plan_batches(data, batch_size=size)
        return representations(found.model, found.task, data, batches=plans, pool=pool)

    alone = of(0, 1)
    torch.testing.assert_close(of(3, 4), alone)
    batch = Tokens(sequences).batch([0])
    seen = []
    hook = found.model.head.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    found.task.predict(found.model, batch)
    hook.remove()
    expected = seen[0][0].mean(0) if pool == "mean" else seen[0][0, -1]
    torch.testing.assert_close(alone[0], expected)


def test_another_module_and_wrong_names():
    found = shared("conv")
    plans = plan_batches(found.train)
    h = representations(found.model, found.task, found.train, batches=plans, module="second")
    seen = found.model.first(found.train.batch([0, 1])[0]).tanh().detach()
    torch.testing.assert_close(h[:2], seen.mean((2, 3)))
    with pytest.raises(ValueError, match="no module 'third'"):
        representations(found.model, found.task, found.train, batches=plans, module="third")
    with pytest.raises(ValueError, match="no linear"):
        tokens = torch.tensor([[1]])
        last_module(
            nn.Embedding(3, 2), FunctionTask(predict_with=lambda m, b: Categorical(m(b), b)), tokens
        )
