import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical as Reference
from torch.distributions import Normal

from headwater.core.prediction import IGNORE, Categorical, Gaussian


def categorical(batch=4, pos=3, vocab=5, ignored=True):
    logits = 2 * torch.randn(batch, pos, vocab, dtype=torch.float64)
    labels = torch.randint(vocab, (batch, pos))
    if ignored:
        labels[0, 1], labels[2, :] = IGNORE, IGNORE
    return Categorical(logits, labels)


def gaussian(batch=4, pos=2, dim=3):
    mean, target = torch.randn(2, batch, pos, dim, dtype=torch.float64)
    mask = torch.ones(batch, pos, dtype=torch.bool)
    mask[1, 0] = False
    return Gaussian(mean, target, mask)


def test_categorical_losses_are_negative_log_probabilities_of_the_labels():
    p = categorical()
    expected = -Reference(logits=p.logits).log_prob(p.labels.clamp(min=0)) * p.mask
    torch.testing.assert_close(p.token_loss(), expected)
    torch.testing.assert_close(p.loss(), expected.sum(1))


def test_gaussian_losses_are_negative_log_probabilities_but_for_a_constant():
    p = gaussian()
    constant = Normal(0.0, 1.0).log_prob(torch.zeros(()))
    expected = (constant - Normal(p.mean, 1).log_prob(p.target)).sum(-1) * p.mask
    # The constant is a float32 number.
    torch.testing.assert_close(p.token_loss(), expected, rtol=1e-6, atol=1e-6)


def test_a_margin_is_the_log_odds_of_the_label():
    p = categorical()
    label = Reference(logits=p.logits).log_prob(p.labels.clamp(min=0)).exp()
    expected = ((label / (1 - label)).log() * p.mask).sum(1)
    torch.testing.assert_close(p.margin(), expected)


def test_half_precision_logits_are_scored_in_single_precision():
    p = Categorical(torch.randn(2, 3, 7).bfloat16(), torch.randint(7, (2, 3)))
    assert p.token_loss().dtype == torch.float32
    torch.testing.assert_close(p.loss(), Categorical(p.logits.float(), p.labels).loss())


@pytest.mark.parametrize("make", [categorical, gaussian])
def test_the_hessian_product_is_that_of_autograd(make):
    p = make()

    def loss(outputs):
        same = {"mean": outputs} if isinstance(p, Gaussian) else {"logits": outputs}
        return type(p)(**(vars(p) | same)).loss().sum()

    v = torch.randn_like(p.outputs)
    _, expected = torch.autograd.functional.hvp(loss, p.outputs, v)
    torch.testing.assert_close(p.hessian_product(v), expected)


@pytest.mark.parametrize("make", [categorical, gaussian])
def test_all_rows_together_make_the_hessian(make):
    p = make()
    rows = p.rows(cut=0.0)
    outputs = p.outputs.clone().requires_grad_()
    hessian = torch.zeros(outputs.numel(), outputs.numel(), dtype=torch.float64)
    same = {"mean": outputs} if isinstance(p, Gaussian) else {"logits": outputs}
    p = type(p)(**(vars(p) | same))
    for example, position, label, weight in zip(
        rows.example, rows.position, rows.label, rows.weight, strict=True
    ):
        n = len(outputs)
        value = p.row_value(position.expand(n), label.expand(n))[example]
        v = torch.autograd.grad(value, outputs, retain_graph=True)[0].flatten()
        hessian += weight * torch.outer(v, v)
    assert rows.lost == 0
    probe = torch.randn_like(outputs)
    product = p.hessian_product(probe).detach()
    torch.testing.assert_close((hessian @ probe.flatten()).view_as(probe), product)


@given(cut=st.floats(0.0, 0.5))
def test_the_share_that_a_cut_loses_is_that_of_the_trace(cut):
    torch.manual_seed(0)
    p = categorical()
    rows, probabilities = p.rows(cut), p.logits.softmax(-1) * p.mask[..., None]
    assert bool((rows.weight >= cut).all())
    gradients = probabilities[..., None, :] - torch.eye(
        5
    )  # of the loss of each label in the logits
    each = probabilities * gradients.square().sum(-1)
    lost = each[probabilities < cut].sum() / each.sum()
    assert rows.lost == pytest.approx(float(lost), abs=1e-12)
    fisher = torch.diag_embed(probabilities) - torch.einsum("bti,btj->btij", *2 * [probabilities])
    trace = fisher.diagonal(dim1=-2, dim2=-1).sum()
    assert rows.trace == pytest.approx(float(trace), abs=1e-12)
    assert gaussian().rows(cut).trace == 21  # identity matrices at seven positions


def test_labels_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0], dtype=torch.float64)
    n = 40_000
    p = Categorical(logits.expand(n, 1, 4), torch.zeros(n, 1).long())
    counts = torch.bincount(p.sample(torch.arange(n), 0).labels.flatten(), minlength=4)
    expected = n * logits.softmax(0)
    assert counts[2] == 0
    # A binomial count stays within five standard deviations.
    assert bool(((counts - expected).abs() <= 5 * expected.sqrt()).all())


def test_a_class_without_probability_at_the_end_is_never_drawn():
    logits = torch.tensor([0.0, -torch.inf])
    p = Categorical(logits.expand(5000, 1, 2), torch.ones(5000, 1).long())
    assert not p.sample(torch.arange(5000), 1).labels.any()


def test_gaussian_targets_are_drawn_around_the_mean():
    n = 20_000
    mean = torch.randn(1, 1, 2, dtype=torch.float64).expand(n, 1, 2)
    p = Gaussian(mean, mean, torch.ones(n, 1, dtype=torch.bool))
    noise = (p.sample(torch.arange(n), 0).target - mean).squeeze(1)
    # Standard errors are 1 / √20000 = 0.007, and for the variance √2 of that.
    torch.testing.assert_close(noise.mean(0), torch.zeros(2).double(), rtol=0, atol=0.035)
    torch.testing.assert_close(noise.T.cov(), torch.eye(2).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("make", [categorical, gaussian])
def test_draws_depend_on_example_and_seed_not_on_the_batch(make):
    p, keys = make(), torch.tensor([11, 12, 13, 14])
    drawn, order = p.sample(keys, 5).target, torch.tensor([3, 1, 0])

    def part(x):
        return x[order] if isinstance(x, torch.Tensor) else x

    some = type(p)(**{k: part(v) for k, v in vars(p).items()})
    assert torch.equal(some.sample(keys[order], 5).target, drawn[order])
    assert torch.equal(p.sample(keys, 5).target, drawn)
    assert not torch.equal(p.sample(keys, 6).target, drawn)
    assert not torch.equal(p.sample(keys + 1, 5).target, drawn)


@pytest.mark.parametrize("left", [0, 2])
def test_draws_do_not_depend_on_padding(left):
    p = categorical(ignored=False)
    pad = (0, 0, left, 4 - left)
    wide = Categorical(
        torch.nn.functional.pad(p.logits, pad, value=3.0),
        torch.nn.functional.pad(p.labels, pad[2:], value=IGNORE),
    )
    keys = torch.arange(4)
    drawn = wide.sample(keys, 0).labels
    assert torch.equal(drawn[:, left : left + 3], p.sample(keys, 0).labels)
    assert bool((drawn != IGNORE).sum() == 12)


def test_positions_and_coordinates_of_an_example_are_drawn_apart():
    p = Categorical(torch.zeros(1, 50, 1000), torch.zeros(1, 50).long())
    assert p.sample(torch.tensor([3]), 0).labels.unique().numel() > 40
    mean = torch.zeros(1, 3, 2)
    q = Gaussian(mean, mean, torch.ones(1, 3, dtype=torch.bool))
    assert q.sample(torch.tensor([3]), 0).target.unique().numel() == 6
