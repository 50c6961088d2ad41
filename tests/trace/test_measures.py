"""Measures where the right answer is known: additive outcomes, ridge regression, planted truth."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from headwater.core.scores import Scores
from headwater.numerics.detection import auroc
from headwater.trace.measures import (
    additive_ceiling,
    leave_one_out,
    linear_datamodeling_score,
    mislabel_auc,
    query_loss_difference,
    random_like,
    removal,
    retrieval,
    ridge_datamodel,
    strongest,
)
from headwater.training.bank import RetrainingBank, random_masks
from headwater.training.loop import SGD, outputs, train

N, Q, K = 40, 6, 60


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def table(values, **more):
    ids = [f"e{i}" for i in range(values.shape[1])]
    queries = [f"q{i}" for i in range(len(values))]
    return Scores(
        values=values, query_ids=queries, train_ids=ids, **{"measurement": "margin", **more}
    )


def bank_of(effects, *, repeats=2, noise=0.0, k=K, **meta):
    """A bank whose outcomes are sums over the subset, plus noise of each run."""
    masks = random_masks(effects.shape[1], k)
    exact = (masks.double() @ effects.T)[:, None].expand(-1, repeats, -1)
    runs = exact + noise * normal(*exact.shape, seed=9)
    return RetrainingBank(masks=masks, measurements={"margin": runs.float()}, meta=meta)


# Linear datamodeling score


def test_a_perfect_oracle_of_sums_scores_one_and_its_opposite_minus_one():
    effects = normal(Q, N)
    bank = bank_of(effects)
    assert linear_datamodeling_score(table(effects), bank).lds.estimate.value == pytest.approx(1)
    opposite = linear_datamodeling_score(table(-effects), bank)
    assert opposite.lds.estimate.value == pytest.approx(-1)


def test_random_scores_are_zero_within_three_over_the_root_of_subsets():
    found = linear_datamodeling_score(table(normal(Q, N, seed=4)), bank_of(normal(Q, N)))
    assert found.lds.per_query.abs().max() < 3 / math.sqrt(K)
    # Six independent queries shrink the error of their mean by √6.
    assert abs(found.lds.estimate.value) < 3 / math.sqrt(K * Q)


def test_constant_predictions_have_no_score_and_are_counted():
    effects = normal(Q, N)
    scores = effects.clone()
    scores[1], scores[4] = 0.3, torch.nan
    found = linear_datamodeling_score(table(scores), bank_of(effects)).lds
    assert found.left_out == 2 and found.estimate.n == Q - 2
    assert found.per_query.isnan().nonzero().flatten().tolist() == [1, 4]
    assert found.estimate.value == pytest.approx(1)
    assert str(found).endswith("2 queries left out")


def test_a_score_is_told_with_its_protocol_and_ceiling():
    effects = normal(Q, N)
    free = linear_datamodeling_score(table(effects), bank_of(effects, noise=0.5))
    assert (free.protocol, free.alpha, free.n_subsets, free.n_repeats) == (
        "expected effect",
        0.5,
        K,
        2,
    )
    assert free.ceiling is not None and 0.9 < free.ceiling.value < 1
    # A perfect oracle reaches the ceiling, within the error of 60 subsets.
    assert free.lds.estimate.value == pytest.approx(free.ceiling.value, abs=0.02)
    fixed = linear_datamodeling_score(table(effects), bank_of(effects, repeats=1, same_run=True))
    assert fixed.protocol == "fixed run" and fixed.ceiling is None


def test_tuning_and_reporting_halves_do_not_touch():
    effects = normal(Q, N)
    bank = bank_of(effects)
    wrong = effects.clone()
    wrong[3:] *= -1
    subsets = torch.arange(0, K, 2)
    half = linear_datamodeling_score(
        table(wrong), bank, queries=torch.arange(3), subsets=subsets, n_samples=20
    )
    assert half.lds.estimate.value == pytest.approx(1) and half.n_subsets == K // 2
    other = linear_datamodeling_score(
        table(wrong), bank, queries=torch.arange(3, Q), subsets=subsets, n_samples=20
    )
    assert other.lds.estimate.value == pytest.approx(-1)


def test_what_cannot_be_compared_is_refused():
    effects = normal(Q, N)
    scores, bank = table(effects), bank_of(effects)
    with pytest.raises(ValueError, match=r"scores are of 'loss' and the bank holds \['margin'\]"):
        linear_datamodeling_score(table(effects, measurement="loss"), bank)
    with pytest.raises(ValueError, match=r"subsets are of 40 training examples.* are 6 × 39"):
        linear_datamodeling_score(table(effects[:, :39]), bank)
    with pytest.raises(ValueError, match="rank correlation over 9 subsets"):
        linear_datamodeling_score(scores, bank_of(effects, k=9))
    unfinished = bank_of(effects)
    unfinished.measurements["margin"][3:] = torch.nan
    with pytest.raises(ValueError, match="no finished round"):
        linear_datamodeling_score(scores, unfinished)


def test_a_bank_that_is_mostly_noise_is_warned_of():
    effects = normal(Q, N)
    with pytest.warns(UserWarning, match=r"noise ceiling of this bank is 0\.\d\d"):
        linear_datamodeling_score(table(effects), bank_of(effects, noise=30.0))


# Additive ceiling


def test_a_ridge_datamodel_recovers_sums_when_there_are_more_subsets_than_examples():
    effects = normal(Q, N)
    masks = random_masks(N, 5 * N)
    # Subsets of one size do not tell a constant in all effects from none.
    found = ridge_datamodel(masks, masks.double() @ effects.T)
    centered = effects - effects.mean(1, keepdim=True)
    torch.testing.assert_close(found, centered, rtol=0, atol=0.01)  # the least ridge is 1e-3


def test_the_ridge_equals_the_normal_equations():
    masks, y = random_masks(N, 30, seed=1), normal(30, Q)
    x = masks.double() - masks.double().mean(0)
    gram = x @ x.T
    rho = 0.7 * torch.linalg.eigvalsh(gram).clamp(min=0).mean()
    expected = torch.linalg.solve(x.T @ x + rho * torch.eye(N).double(), x.T @ (y - y.mean(0))).T
    torch.testing.assert_close(ridge_datamodel(masks, y, ridges=(0.7,)), expected)


def test_the_additive_ceiling_is_one_for_sums_and_low_for_pairs():
    effects, masks = normal(Q, N), random_masks(N, 6 * N)
    sums = masks.double() @ effects.T
    assert additive_ceiling(masks, sums, n_samples=20).estimate.value > 0.98
    sign = masks.double() * 2 - 1
    pairs = (sign[:, :12] * sign[:, 12:24]) @ normal(12, Q, seed=2)
    low = additive_ceiling(masks, pairs, n_samples=20).estimate
    assert low.value < 0.2
    with pytest.raises(ValueError, match="rank correlation over 7 subsets"):
        additive_ceiling(masks[:14], sums[:14])


# Ridge regression, where retraining has a closed form


def ridge_problem(seed=0):
    return normal(14, 3, seed=seed), normal(14, 1, seed=seed + 1), normal(5, 3, seed=seed + 2)


def ridge_fit(x, y, rho):
    """Minimum of the mean of (y - wx)²/2 over the examples plus ρ‖w‖²/2."""
    return torch.linalg.solve(x.T @ x / len(x) + rho * torch.eye(3).double(), x.T @ y / len(x))


def test_a_bank_of_ridge_regressions_equals_their_closed_form():
    x, y, x_query = ridge_problem()
    masks, rho = random_masks(14, 5), 0.5
    model = nn.Linear(3, 1, bias=False).double()
    rule = SGD(
        lr=0.3, momentum=0.5, weight_decay=rho, batch_size=7, epochs=400, schedule="constant"
    )
    trained = train(
        [model] * 5,
        x,
        y,
        subsets=torch.stack([mask.nonzero()[:, 0] for mask in masks]),
        seeds=range(5),
        optimizer=rule,
        loss=lambda out, target: mse_loss(out, target, reduction="none").sum(-1) / 2,
    )
    expected = torch.stack([x_query @ ridge_fit(x[m], y[m], rho) for m in masks])
    torch.testing.assert_close(outputs(model, trained, x_query), expected, rtol=0, atol=1e-8)


def test_leaving_one_out_of_a_ridge_regression_follows_the_hat_matrix():
    x, y, x_query = ridge_problem(3)
    n, rho = len(x), 0.2
    inverse = torch.linalg.inv(x.T @ x + rho * torch.eye(3).double())
    whole = inverse @ x.T @ y
    leverage = (x @ inverse * x).sum(1)
    residual = (y - x @ whole)[:, 0]
    # Adding example i moves the prediction by x_q' A⁻¹ x_i r_i / (1 - h_ii), the penalty held fixed.
    formula = (x_query @ inverse @ x.T) * (residual / (1 - leverage))
    without = []
    for i in range(n):
        rest = torch.arange(n) != i
        solved = torch.linalg.solve(
            x[rest].T @ x[rest] + rho * torch.eye(3).double(), x[rest].T @ y[rest]
        )
        without.append(x_query @ solved)
    brute = torch.stack(without)[:, :, 0]
    torch.testing.assert_close(formula, (x_query @ whole).T[0][:, None] - brute.T)
    found = leave_one_out(formula, (x_query @ whole).T, brute[:, None], n_samples=50)
    assert found.pearson.estimate.value == pytest.approx(1)
    assert found.spearman.estimate.value == pytest.approx(1)
    assert found.signal_to_noise.isnan().all()  # one seed tells nothing about noise


def test_leaving_one_out_tells_the_signal_from_the_noise_of_seeds():
    effects, repeats = normal(Q, N), 400
    noise = normal(N, repeats, Q, seed=5)
    whole = torch.zeros(repeats, Q)
    found = leave_one_out(effects, whole, noise - effects.T[:, None], n_samples=50)
    # The error of a mean of 400 unit normals is 1/20; their mean moves the ratio by 1 or so.
    assert (found.signal_to_noise - 20 * effects.abs()).abs().median() < 1.5
    assert found.pearson.estimate.value > 0.99
    with pytest.raises((TypeError, ValueError)):  # of annotations here, of the function elsewhere
        leave_one_out(effects.T, whole, noise)


def test_a_query_without_a_correlation_is_left_out_and_counted():
    effects = normal(Q, N)
    guess = effects.clone()
    guess[2] = 1.0
    found = leave_one_out(guess, torch.zeros(1, Q).double(), -effects.T[:, None], n_samples=20)
    assert found.pearson.left_out == found.spearman.left_out == 1
    assert found.pearson.estimate.value == pytest.approx(1) and found.pearson.estimate.n == Q - 1
    with pytest.raises(ValueError, match="None of 6 queries"):
        leave_one_out(torch.ones(Q, N), torch.zeros(1, Q), -effects.T[:, None])


# Removal


def additive(effects, start=4.0):
    """Training whose margins start where they should and fall by the effects of what is missing."""

    def retrain(weights, seed):
        return start + 0.01 * seed + effects @ (weights.double() - 1)

    return retrain


def test_removing_the_top_of_the_true_oracle_changes_each_query_by_the_sum_of_its_scores():
    effects = normal(Q, N)
    found = removal(additive(effects), table(effects), [1, 3], seeds=(0, 5))
    top = effects.topk(3).values.cumsum(1)[:, [0, 2]]
    torch.testing.assert_close(found.change, -top.T[:, :, None].expand(-1, -1, 2))
    assert found.queries == list(range(Q)) and found.left_out == 0
    change = found.mean_change(n_samples=50)
    assert [c.value for c in change] == pytest.approx((-top.mean(0)).tolist())


def test_the_true_oracle_flips_at_least_as_many_as_random():
    effects = normal(30, N)
    found = removal(additive(effects), table(effects), [1, 2, 4, 8])
    shares = zip(found.flipped_share(), found.flipped_share(control=True), strict=True)
    assert all(top.value >= control.value for top, control in shares)
    assert found.flipped[-1].double().mean() > 0.9 > found.control_flipped[-1].double().mean()
    # Support falls from 4 by the largest effects: the smallest k is where their sum reaches it.
    sums = effects.sort(descending=True).values.cumsum(1)[:, [0, 1, 3, 7]]
    for smallest, fallen in zip(found.smallest_k.tolist(), sums >= 4, strict=True):
        reached = fallen.nonzero().flatten().tolist()
        expected = [1, 2, 4, 8][reached[0]] if reached else math.nan
        assert smallest == pytest.approx(expected, nan_ok=True)


def test_queries_that_are_wrong_to_begin_with_are_left_out_and_counted():
    effects, start = normal(Q, N), torch.full((Q,), 4.0).double()
    start[2] = -1.0
    found = removal(additive(effects, start), table(effects), [1])
    assert found.queries == [0, 1, 3, 4, 5] and found.left_out == 1
    with pytest.raises(ValueError, match="No query is answered rightly"):
        removal(additive(effects, -4.0), table(effects), [1])


def test_examples_that_do_not_support_a_query_are_never_removed():
    values = torch.tensor([3.0, -1.0, 2.0, 0.0])
    assert strongest(values, 3).tolist() == [0, 2]
    effects = -normal(Q, N).abs()
    found = removal(additive(effects), table(effects), [5])
    assert found.change.abs().max() == 0 and found.control_change.abs().max() == 0


def test_a_removal_at_random_has_the_same_mix_of_classes():
    classes = torch.arange(30) % 3
    chosen, generator = torch.tensor([0, 3, 6, 1]), torch.Generator().manual_seed(0)
    for _ in range(20):
        other = random_like(chosen, classes, generator)
        assert classes[other].bincount(minlength=3).tolist() == [3, 1, 0]
        assert not set(other.tolist()) & set(chosen.tolist())
        assert len(set(other.tolist())) == 4


def test_the_query_loss_difference_is_that_of_the_removed_effects():
    effects = normal(Q, 200)
    losses = -effects  # an example that supports a query lowers its loss

    def retrain(weights, seed):
        return 1.0 + losses @ (weights.double() - 1)

    scores = table(losses, measurement="loss")
    found = query_loss_difference(retrain, scores, share=0.01)
    top = effects.topk(2).values.sum(1)
    # The control takes two others, whose effects are of either sign.
    control = found.per_query - top
    assert found.estimate.value > 2 and control.abs().max() < 5
    assert (control + effects.sort(descending=True).values[:, 2:].topk(2).values.sum(1) > 0).all()
    against = query_loss_difference(retrain, scores, share=0.01, side="opponents")
    assert against.estimate.value < -2


# Planted truth


def test_retrieval_of_planted_examples_by_hand():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    relevant = torch.tensor([[True, False, True, False, False], [False, True, False, False, False]])
    found = retrieval(scores, relevant, ks=(1, 3, 4), n_samples=20)
    assert [found.recall[k].per_query.tolist() for k in (1, 3, 4)] == [[0.5, 0], [1, 0], [1, 1]]
    assert found.mrr.per_query.tolist() == [1, 0.25]
    assert found.auc.per_query.tolist() == pytest.approx([5 / 6, 1 / 4])
    assert found.mrr.estimate.value == pytest.approx(0.625)


def test_queries_without_truth_or_with_equal_scores_are_left_out_and_counted():
    scores, relevant = normal(4, 9), torch.zeros(4, 9, dtype=torch.bool)
    relevant[:, 0] = True
    relevant[1], relevant[2] = False, True
    scores[3] = 2.0
    found = retrieval(scores, relevant, n_samples=20)
    assert [m.left_out for m in (found.mrr, found.auc, found.recall[10])] == [3, 3, 3]
    with pytest.raises(ValueError, match="nothing to measure"):
        retrieval(scores[1:], relevant[1:])


def test_equal_scores_count_half_in_the_auc():
    values = torch.tensor([1.0, 1.0, 0.0])
    assert auroc(values, torch.tensor([True, False, False])) == 0.75
    assert auroc(values, torch.zeros(3, dtype=torch.bool)).isnan()


def test_the_auc_of_mislabels_is_that_of_pairs_with_an_interval():
    wrong = torch.arange(200) < 40
    values = normal(200) + 1.5 * wrong.double()
    found = mislabel_auc(values, wrong, n_samples=200)
    assert found.value == pytest.approx(float(auroc(values, wrong)))
    # Two normals 1.5 apart: Φ(1.5/√2) = 0.856.
    assert found.low < 0.856 < found.high and found.high - found.low < 0.2
    assert mislabel_auc(-values, wrong, n_samples=20).value == pytest.approx(1 - found.value)
    with pytest.raises(ValueError, match="got 0 positives of 200"):
        mislabel_auc(values, torch.zeros(200, dtype=torch.bool))
