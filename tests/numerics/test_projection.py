"""Random projections repeat themselves from their seed and keep inner products."""

import pytest
import torch

from headwater.numerics.projection import project, random_matrix

KINDS = pytest.mark.parametrize("kind", ["rademacher", "gaussian"])


@KINDS
def test_any_block_of_columns_is_that_of_the_whole(kind):
    whole = random_matrix(5, range(300), seed=3, key=7, kind=kind)
    for start, stop in ((0, 1), (63, 65), (64, 128), (10, 299)):
        part = random_matrix(5, range(start, stop), seed=3, key=7, kind=kind)
        assert torch.equal(part, whole[:, start:stop])


@KINDS
def test_entries_are_independent_with_mean_zero_and_variance_one(kind):
    x = random_matrix(200, range(1000), kind=kind).double()
    # 200,000 entries: a mean is off by 1/447 and a product of two rows by 1/31 as a standard error
    assert abs(float(x.mean())) < 4 / 447 and abs(float(x.square().mean()) - 1) < 4 * 1.5 / 447
    gram = x @ x.mT / 1000
    off = gram[~torch.eye(200, dtype=torch.bool)]
    assert float(off.square().mean()) == pytest.approx(1 / 1000, rel=0.1)
    columns = x.mT @ x / 200
    off = columns[~torch.eye(1000, dtype=torch.bool)]
    assert float(off.square().mean()) == pytest.approx(1 / 200, rel=0.1)


@KINDS
def test_seeds_and_keys_make_other_matrices(kind):
    one = random_matrix(8, range(64), kind=kind)
    for other in ({"seed": 1}, {"key": 1}):
        assert float((one * random_matrix(8, range(64), kind=kind, **other)).mean().abs()) < 0.2


@KINDS
def test_inner_products_are_kept_on_average(kind):
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    both = torch.stack([x, y])
    found = torch.stack(
        [(p := project(both, 16, seed=seed, kind=kind))[0] @ p[1] for seed in range(2000)]
    )
    spread = float(found.std()) / 2000**0.5
    assert abs(float(found.mean() - x @ y)) < 4 * spread


def test_parts_of_a_vector_add_up():
    x = torch.randn(3, 500).double()
    parts = project(x[:, :130], 8) + project(x[:, 130:], 8, start=130)
    torch.testing.assert_close(parts, project(x, 8))


def test_what_cannot_be_is_refused():
    with pytest.raises((ValueError, TypeError), match="'gauss'"):
        random_matrix(2, range(3), kind="gauss")
    with pytest.raises(ValueError, match="one after the other"):
        random_matrix(2, range(0, 4, 2))
