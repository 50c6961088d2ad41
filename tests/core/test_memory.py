"""Batches that do not fit into memory are halved, and nothing else changes."""

import warnings

import pytest
import torch
from torch import nn

import headwater
from headwater.core.capture import Capture, plan_batches, sweep
from headwater.core.curvature import EKFAC, KFAC, CurvatureMethod, Dual, Preconditioned
from headwater.core.examples import TensorExamples
from headwater.core.follow import follow
from headwater.core.gradients import CollectGradients
from headwater.core.memory import is_out_of_memory
from headwater.core.projection import ProjectGradients, TwoSided
from headwater.core.scoring import Norms, PairScores, TokenScores
from headwater.core.target import Loss
from headwater.trace import Influence
from tests.cases import TASK

pytestmark = pytest.mark.thorough

LIMIT = 5  # examples that memory suffices for


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        ctx.kind = kind
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if len(g) > LIMIT:
            raise ctx.kind("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return g, None


class Short(nn.Module):
    """Runs out of memory in the backward pass, where the rows of later layers are handed over already."""

    kind: type[Exception] | None = None

    def forward(self, x):
        return x if self.kind is None else _Short.apply(x, self.kind)


def case(kind: type[Exception] | None) -> tuple[nn.Module, TensorExamples]:
    torch.manual_seed(0)
    short = Short()
    model = nn.Sequential(nn.Linear(5, 6), short, nn.Tanh(), nn.Linear(6, 3)).double()
    data = TensorExamples(torch.randn(37, 5).double(), torch.randint(3, (37,)))
    short.kind = kind
    return model, data


KINDS = [torch.OutOfMemoryError, MemoryError, RuntimeError]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [EKFAC(), KFAC(), Dual()], ids=lambda m: m.kind)
def test_a_fit_in_halves_is_the_fit_but_for_rounding(kind: type, method: CurvatureMethod, tmp_path):
    found = []
    for error in (None, kind):
        model, data = case(error)
        queries = data.subset([0, 9, 18])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit = headwater.fit(model, data, TASK, curvature=method, batch_size=16)
            scores = Influence(damping=0.1).attribute(fit, queries, by_layer=True)
            own = Influence(damping=0.1).self_influence(fit)
        found.append([*fit.curvature.tensors().values(), scores.values, scores.by_layer, own])
        messages = [str(w.message) for w in said if "Out of memory" in str(w.message)]
        assert bool(messages) == (error is not None)
        assert len(messages) <= 6  # once a sweep at most
    for plain, halved in zip(*found, strict=True):
        torch.testing.assert_close(halved, plain, rtol=1e-5, atol=1e-7)


def test_the_warning_names_the_size_that_works():
    model, data = case(torch.OutOfMemoryError)
    capture = Capture(model, TASK, follow(model, TASK, data.batch([0, 1])))
    with pytest.warns(UserWarning) as said:
        sweep(capture, data, [Norms(len(data))], Loss(), batches=plan_batches(data, batch_size=16))
    (warning,) = said
    assert str(warning.message) == (
        "Out of memory with a batch of 16 examples; the sweep goes on with at most 4 examples. "
        "Results differ by rounding only."
    )


def test_rows_of_an_unfinished_batch_are_forgotten():
    found = []
    for error in (None, torch.OutOfMemoryError):
        model, data = case(error)
        capture = Capture(model, TASK, follow(model, TASK, data.batch([0, 1])))
        layers = list(capture.layers.values())
        queries = CollectGradients(layers)
        sweep(capture, data.subset(range(4)), [queries], Loss())
        asked = Preconditioned(queries.finish()[0])
        every = [
            PairScores(asked, len(data), by_layer=["0", "3"]),
            TokenScores(asked, len(data), 1),
            ProjectGradients(layers, TwoSided(2), len(data)),
            Norms(len(data)),
            CollectGradients(layers),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sweep(capture, data, every, Loss(), batches=plan_batches(data, batch_size=16))
        *rest, collected = every
        gradients, indices, _ = collected.finish()
        assert indices.tolist() == list(range(37))
        tensors = [t for a in rest for t in a.tensors().values()]
        found.append([*tensors, gradients.to_matrix()])
    for plain, halved in zip(*found, strict=True):
        torch.testing.assert_close(halved, plain, rtol=1e-6, atol=1e-7)


def test_a_single_example_that_does_not_fit_is_named(monkeypatch):
    monkeypatch.setitem(globals(), "LIMIT", 0)
    model, data = case(None)
    capture = Capture(model, TASK, follow(model, TASK, data.batch([0, 1])))
    model[1].kind = torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError) as caught:
        sweep(capture, data, [Norms(len(data))], Loss(), batches=plan_batches(data, batch_size=4))
    assert caught.value.__notes__ == ["Even example '0' alone does not fit into memory."]


def test_other_errors_are_no_lack_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    text = (
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    )
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))
