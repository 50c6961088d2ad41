"""Rows read off somebody else's pass equal projected gradients by autograd, one example after the other."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from headwater.core.capture import LayerError
from headwater.core.follow import follow
from headwater.core.listening import Listener
from headwater.core.projection import TwoSided
from headwater.core.task import Classification
from tests.cases import CASES, Net, autograd, mlp, numbers

FOLLOWED = {name: case for name, case in CASES.items() if name != "without gradient"}
TASK = Classification()


def listened(model, task, batch, projection, *, late=False, skip=(), scale=1.0):
    """Rows of each layer, and those of autograd."""
    followed = follow(model, task, batch, skip=skip)
    listener = Listener(model, task, followed, projection)
    if late:
        listener._two_sided = None
    n = len(task.loss(model, batch))
    with listener.hooks(), listener.listening(n) as rows:
        (task.loss(model, batch).sum() * scale).backward()
    whole = autograd(model, task.loss, batch)
    expected = {}
    for layer in followed:
        G = layer.from_parameters({p: whole[p] for p in layer.parameters}) * scale
        P_out, P_in = (None if p is None else p.double() for p in projection.sides(layer))
        G = G if P_out is None else P_out @ G
        expected[layer.name] = (G if P_in is None else G @ P_in.mT).flatten(1)
    return rows, expected


@pytest.mark.parametrize("rank", [2, 100])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", FOLLOWED)
def test_rows_equal_projected_gradients_of_autograd(name, late, rank):
    model, task, batch = FOLLOWED[name].make()
    skip = list(FOLLOWED[name].functional)
    if len(skip) == len(list(model.parameters())):
        pytest.skip("nothing is left to follow")
    before = [p.detach().clone() for p in model.parameters()]
    rows, expected = listened(model, task, batch, TwoSided(rank), late=late, skip=skip)
    assert rows.keys() == expected.keys()
    for layer, value in expected.items():
        torch.testing.assert_close(rows[layer], value, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_training_pass_keeps_its_gradients():
    (model, task, batch) = CASES["tied embedding"].make()
    task.loss(model, batch).mean().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    listener = Listener(model, task, follow(model, task, batch), TwoSided(2))
    with listener.hooks(), listener.listening(4):
        task.loss(model, batch).mean().backward()
    assert all(torch.equal(p.grad, plain[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_passes_outside_of_a_block_are_not_seen():
    model, batch = mlp(), numbers(5)
    listener = Listener(model, TASK, follow(model, TASK, batch), TwoSided(2))
    with listener.hooks():
        TASK.loss(model, batch).sum().backward()
        with listener.listening(4) as rows:
            with torch.no_grad():
                model(batch[0])  # an evaluation in between
            TASK.loss(model, batch).sum().backward()
        first = {k: v.clone() for k, v in rows.items()}
        with listener.listening(4) as rows:
            TASK.loss(model, batch).sum().backward()
    assert all(torch.equal(rows[k], v) for k, v in first.items())


def test_parameters_without_a_module_are_refused_by_name():
    model, task, batch = CASES["outside modules"].make()
    with pytest.raises(ValueError, match=r"gain, shift need a pass of their own.*skip="):
        Listener(model, task, follow(model, task, batch), TwoSided(2))


def test_a_pass_without_backward_is_refused():
    model, batch = mlp(), numbers(5)
    listener = Listener(model, TASK, follow(model, TASK, batch), TwoSided(2))
    with (
        listener.hooks(),
        pytest.raises(LayerError, match="No gradient came"),
        listener.listening(4),
    ):
        TASK.loss(model, batch)
    with listener.hooks(), pytest.raises(LayerError, match="did not run"), listener.listening(4):
        pass


def test_two_passes_in_one_block_are_refused():
    model, batch = mlp(), numbers(5)
    listener = Listener(model, TASK, follow(model, TASK, batch), TwoSided(2))
    with (
        listener.hooks(),
        pytest.raises(LayerError, match="ran again after its gradient"),
        listener.listening(4),
    ):
        for _ in range(2):
            TASK.loss(model, batch).sum().backward()


def test_another_number_of_examples_is_refused():
    model, batch = mlp(), numbers(5)
    listener = Listener(model, TASK, follow(model, TASK, batch), TwoSided(2))
    with (
        listener.hooks(),
        pytest.raises(LayerError, match=r"reads \(4, 5\).* 3 examples"),
        listener.listening(3),
    ):
        TASK.loss(model, batch).sum().backward()


def checkpointed(reentrant):
    def run(self, x):
        def body(h):
            return self.b(self.a(h).tanh()).tanh()

        if not self.training:  # as transformers does
            return self.head(body(x))
        return self.head(checkpoint(body, x.clone().requires_grad_(), use_reentrant=reentrant))

    return Net(run, a=nn.Linear(5, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 3)).double().train()


def test_recomputed_activations_are_not_counted_twice():
    model, batch = checkpointed(False), numbers(5)
    rows, expected = listened(model, TASK, batch, TwoSided(2))
    for layer, value in expected.items():
        torch.testing.assert_close(rows[layer], value, rtol=1e-10, atol=1e-10)


def test_reentrant_checkpointing_is_refused():
    model, batch = checkpointed(True), numbers(5)
    listener = Listener(model, TASK, follow(model, TASK, batch), TwoSided(2))
    with (
        listener.hooks(),
        pytest.raises(LayerError, match="use_reentrant=False"),
        listener.listening(4),
    ):
        TASK.loss(model, batch).sum().backward()
