"""Statistics of the anchor's data: what they are, from which passes, and that any split merges to the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headwater
from headwater.core.capture import Capture, plan_batches, sweep
from headwater.core.examples import TensorExamples
from headwater.core.function_space import (
    GateRecorder,
    GateStatistics,
    collect_statistics,
    statistics_of,
)
from headwater.core.gradients import CollectGradients
from headwater.core.target import Loss, fisher_target
from headwater.core.task import Classification

TASK = Classification()


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()


def examples(n: int = 50) -> TensorExamples:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64) + 0.5
    y = torch.randint(3, (n,), generator=generator)
    return TensorExamples(x, y, metadata={"label": y.tolist()})


def alike(a, b) -> bool:
    """Whether two statistics say the same of the same groups."""
    own, others = a.tensors(), b.tensors()
    return (a.groups, a.input_shape, own.keys()) == (
        b.groups,
        b.input_shape,
        others.keys(),
    ) and all(
        torch.allclose(value, others[name], rtol=1e-7, atol=1e-7) for name, value in own.items()
    )


@pytest.mark.parametrize("diagonal", [False, True])
def test_they_are_means_over_each_group(diagonal):
    net, train = network(), examples()
    x, y = train.tensors
    found = collect_statistics(net, TASK, train, by="label", diagonal=diagonal)
    assert found.groups == ("0", "1", "2") and found.passes == 1
    with torch.no_grad():
        gates = (net[0](x) > 0).double()
        deeper = (net[:4](x) > 0).double()
    for k in range(3):
        own = x[y == k]
        covariance = torch.cov(own.mT, correction=0)
        torch.testing.assert_close(found.mean[k], own.mean(0))
        torch.testing.assert_close(
            found.covariance[k], covariance.diagonal() if diagonal else covariance
        )
        torch.testing.assert_close(found.rates["1"][k], gates[y == k].mean(0))
        torch.testing.assert_close(found.rates["4"][k], deeper[y == k].mean(0))
    torch.testing.assert_close(found.shares, y.bincount().double() / len(y))


@pytest.mark.parametrize("diagonal", [False, True])
def test_groups_pool_to_the_whole(diagonal):
    net, train = network(), examples()
    apart = collect_statistics(net, TASK, train, by="label", diagonal=diagonal)
    whole = collect_statistics(net, TASK, train, diagonal=diagonal)
    assert alike(apart.pooled(), whole)
    assert alike(collect_statistics(net, TASK, train).diagonal(), whole.diagonal())
    assert not alike(apart, whole)


def test_dropout_is_off():
    dropping = network(0.9).train()
    found = collect_statistics(dropping, TASK, examples())
    assert alike(found, collect_statistics(network(), TASK, examples()))
    assert dropping.training


@settings(max_examples=10)
@given(st.integers(3, 50), st.integers(1, 49))
def test_any_split_merges_to_the_whole(batch_size, cut):
    net, train = network(), examples()
    groups = train.tensors[1]
    recorder = GateRecorder(net)
    plans = plan_batches(train, batch_size=batch_size)
    parts = []
    with recorder.watching():
        for some in (plans[: cut % len(plans)], plans[cut % len(plans) :]):
            part = GateStatistics(recorder, groups)
            sweep(Capture(net, TASK, []), train, [part], Loss(), batches=some)
            again = part.empty()
            again.load(part.tensors())
            parts.append(again)
    parts[1].merge(parts[0])
    assert alike(parts[1].finish(), collect_statistics(net, TASK, train, by="label"))


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_they_share_a_sweep_of_gradients(fisher):
    """Labels that are enumerated make several rows of an example, which count as one together."""
    net, train = network(), examples()
    fit = headwater.fit(net, train, TASK, curvature="identity")
    recorder = GateRecorder(net)
    found = GateStatistics(recorder, train.tensors[1])
    rows = CollectGradients(list(fit.followed))
    with recorder.watching():
        sweep(fit.capture(), train, [rows, found], fisher_target(fisher))
    assert alike(found.finish(), collect_statistics(net, TASK, train, by="label"))
    assert rows.n_rows >= len(train)


class Scaled(nn.Module):
    """A scale that only torch.func can follow, which runs the model once more for each example."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = network(), nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x):
        return self.net(x * self.scale)


def test_passes_for_single_examples_do_not_count():
    net, train = Scaled(), examples()
    fit = headwater.fit(net, train, TASK, curvature="identity")
    assert any(layer.kind == "functional" for layer in fit.followed)
    recorder = GateRecorder(net)
    found = GateStatistics(recorder)
    with recorder.watching():
        sweep(fit.capture(), train, [found], Loss())
    assert alike(found.finish(), collect_statistics(net, TASK, train))


@pytest.mark.parametrize("by", [None, "label"])
def test_a_dual_fit_holds_all_of_it(by):
    net, train = network(), examples()
    fit = headwater.fit(net, train, TASK, curvature="dual")
    found = statistics_of(fit, by=by)
    assert found.passes == 0
    assert alike(found, collect_statistics(net, TASK, train, by=by))


@pytest.mark.parametrize("curvature", ["ekfac", "dual"])
def test_a_fit_that_does_not_hold_it_costs_a_forward_pass(curvature):
    train = examples()
    net = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(4, 3)).double()
    found = statistics_of(headwater.fit(net, train, TASK, curvature=curvature))
    assert found.passes == 1
    assert alike(found, collect_statistics(net, TASK, train))


def test_groups_are_a_column_or_one_value_an_example():
    net, train = network(), examples()
    values = ["odd" if y % 2 else "even" for y in train.tensors[1].tolist()]
    assert collect_statistics(net, TASK, train, by=values).groups == ("even", "odd")
    with pytest.raises(ValueError, match="no metadata column 'topic'; they have label"):
        collect_statistics(net, TASK, train, by="topic")
    with pytest.raises(ValueError, match="one group for each of 50 examples; got 3"):
        collect_statistics(net, TASK, train, by=[0, 1, 2])


def test_an_accumulator_without_its_hooks_says_so():
    net, train = network(), examples()
    with pytest.raises(ValueError, match=r"recorder\.watching"):
        sweep(Capture(net, TASK, []), train, [GateStatistics(GateRecorder(net))], Loss())
