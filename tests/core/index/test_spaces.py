"""Rows of the index: their inner products are influences, and what is kept of them is what was asked for."""

from dataclasses import replace

import pytest
import torch

from headwater.core.capture import plan_batches
from headwater.core.curvature import EKFAC, KFAC, Dual, Identity, Layerwise
from headwater.core.damping import Damping, Inverse
from headwater.core.fit import fit
from headwater.core.gradients import Factored
from headwater.core.index import GradientIndex, LoGra, Whitened
from headwater.core.index.answers import project
from headwater.core.index.spaces import (
    Kept,
    SketchedSpace,
    WhitenedSpace,
    best_rectangle,
    heaviest,
    kept_share,
    rectangles,
)
from headwater.core.target import Loss
from headwater.trace import Influence
from tests.curvature_cases import EVERY, autograd_rows, case, shared, side_by_side
from tests.index_cases import EVERYTHING, LAYERWISE, built


@pytest.mark.parametrize("method", LAYERWISE, ids=lambda m: m.kind)
@pytest.mark.parametrize("name", EVERY)
def test_at_full_rank_the_scores_are_those_of_influence(name, method, tmp_path):
    fitted, index = built(tmp_path, name, method)
    queries = shared(name).query
    expected = Influence(damping=0.01, n_intervals=0).attribute(fitted, queries)
    found = index.attribute(fitted, queries, keep=len(fitted.train))
    assert found.kept is not None and sorted(found.kept) == list(range(len(fitted.train)))
    order = torch.tensor(found.kept).argsort()
    # rows are stored in float32
    torch.testing.assert_close(
        found.values[:, order],
        expected.values,
        rtol=1e-5,
        atol=1e-5 * float(expected.values.abs().max()),
    )
    own = Influence(damping=0.01).self_influence(fitted)
    place = torch.tensor(index.numbers()).argsort()
    torch.testing.assert_close(index.self_influence()[place], own, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_kept_coordinates_are_those_of_the_whole_row(name):
    """A restricted space is the whole one with columns left out, for gradients dense and factored."""
    fitted = shared(name).fitted(EKFAC())
    whole, few = EVERYTHING.spaces(fitted)[0], Whitened(rank=2, damping=0.01).spaces(fitted)[0]
    data = fitted.train
    from headwater.core.capture import sweep
    from headwater.core.gradients import CollectGradients
    from headwater.core.target import Loss

    collect = CollectGradients(fitted.followed)
    sweep(fitted.capture(), data, [collect], Loss(), batches=plan_batches(data, batch_size=3))
    for gradients in (collect.finish()[0], collect.finish()[0].dense()):
        for layer in fitted.followed:
            block = gradients.blocks[layer.name]
            full = whole(layer, block).view(len(block), *layer.shape)
            kept = few.kept[layer.name]
            expected = torch.stack([kept.block(row) for row in full])
            torch.testing.assert_close(few(layer, block), expected)
    assert sum(few.widths.values()) <= sum(4 * layer.shape[0] for layer in fitted.followed)
    again = {name: Kept.of(kept.record()) for name, kept in few.kept.items()}
    for name, kept in few.kept.items():
        for a, b in (
            (kept.out, again[name].out),
            (kept.in_, again[name].in_),
            (kept.chosen, again[name].chosen),
        ):
            assert (a is None and b is None) or torch.equal(a, b)


def test_random_mixtures_are_right_on_average_where_the_inverse_is_separable():
    """With one eigenvalue a layer the separable inverse is exact, and only the mixture errs."""
    fitted = shared("positions").fitted(KFAC())
    flat = replace(fitted, curvature=Layerwise(
        fitted.curvature.bases,
        {k: 0.3 * torch.ones_like(v) for k, v in fitted.curvature.sums.items()},
        torch.tensor([1.0]),
    ))  # fmt: skip
    rows = {s: project(flat, s, flat.train, Loss()) for s in EVERYTHING.spaces(flat)}
    (whole,) = (r @ r.mT for r in rows.values())
    facts = {"damping": vars(Damping(0.01)), "ranks": {x.name: [3, 3] for x in flat.followed}}
    grams = []
    for seed in range(40):
        space = SketchedSpace(list(flat.followed), flat.curvature, facts | {"seed": seed})
        r = project(flat, space, flat.train, Loss())
        grams.append(r @ r.mT)
    error = torch.stack(grams).mean(0) - whole
    spread = torch.stack(grams).std(0) / 40**0.5
    assert float(error.norm()) < 2.5 * float(spread.norm())  # entries are correlated
    assert float(error.norm()) < 0.4 * float(whole.norm())


def test_whole_sides_of_mixtures_with_a_separable_inverse_lose_nothing():
    fitted = shared("mlp").fitted(KFAC())
    sums = {k: torch.ones_like(v) for k, v in fitted.curvature.sums.items()}
    flat = replace(fitted, curvature=Layerwise(fitted.curvature.bases, sums, torch.tensor([1.0])))
    facts = {
        "damping": vars(Damping(0.5)),
        "seed": 0,
        "ranks": {x.name: list(x.shape[1:]) for x in flat.followed},
    }
    space = SketchedSpace(list(flat.followed), flat.curvature, facts)
    (whole,) = EVERYTHING.spaces(flat)
    a, b = (project(flat, s, flat.train, Loss()) for s in (space, whole))
    torch.testing.assert_close(a @ a.mT * 1.5, b @ b.mT * 1.01)


def test_logra_with_whole_sides_stores_gradients_and_scores_by_the_dense_empirical_fisher(tmp_path):
    for name in ("mlp", "lm", "conv"):
        fitted, index = built(tmp_path / name, name, Identity(), kind=LoGra(rank=None, damping=0.1))
        rows = autograd_rows(fitted, fitted.task.loss, fitted.train)
        order = torch.tensor(index.numbers()).argsort()
        stored = index.rows(torch.arange(index.n_rows))[order]
        expected = side_by_side(rows)
        torch.testing.assert_close(stored.double(), expected, rtol=1e-6, atol=1e-7)
        asked = autograd_rows(fitted, fitted.task.measurement, shared(name).query)
        n, total = len(fitted.train), 0.0
        for layer, g in rows.items():
            F = g.mT @ g / n + 0.1 * torch.eye(g.shape[1]).double()
            total = total - asked[layer] @ torch.linalg.solve(F, g.mT) / n
        found = index.attribute(fitted, shared(name).query, keep=n)
        place = torch.tensor(found.kept).argsort()
        scale = float(total.abs().max())
        torch.testing.assert_close(
            found.values[:, place].double(), total, rtol=1e-5, atol=1e-6 * scale
        )


def test_logra_of_some_rank_equals_its_formula_on_autograd_rows(tmp_path):
    kind = LoGra(rank=2, seed=3, damping="0.1 relative")
    fitted, index = built(tmp_path, "positions", Identity(), kind=kind)
    space, n = kind.spaces(fitted)[0], len(fitted.train)
    rows = autograd_rows(fitted, fitted.task.loss, fitted.train)
    asked = autograd_rows(fitted, fitted.task.measurement, shared("positions").query)
    total = 0.0
    for layer in fitted.followed:
        P_out, P_in = (None if p is None else p.double() for p in space.projection.sides(layer))

        def projected(g, layer=layer, P_out=P_out, P_in=P_in):
            G = g.unflatten(1, layer.block)
            G = G if P_out is None else P_out @ G
            return (G if P_in is None else G @ P_in.mT).flatten(1)

        p, q = projected(rows[layer.name]), projected(asked[layer.name])
        F = p.mT @ p / n
        F = F + 0.1 * torch.linalg.eigvalsh(F).mean() * torch.eye(len(F)).double()
        total = total - q @ torch.linalg.solve(F, p.mT) / n
    found = index.attribute(fitted, shared("positions").query, keep=n)
    place = torch.tensor(found.kept).argsort()
    torch.testing.assert_close(
        found.values[:, place].double(), total, rtol=1e-4, atol=1e-5 * float(total.abs().max())
    )


def test_asking_twice_gives_the_same_scores(tmp_path):
    """Damping is added to a copy of the eigenvalues."""
    for kind in (LoGra(rank=2), EVERYTHING):
        fitted, index = built(tmp_path / type(kind).__name__, "mlp", kind=kind)
        first, second = (index.attribute(fitted, shared("mlp").query).values for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [EVERYTHING, LoGra(rank=2)], ids=["whitened", "logra"])
def test_neither_padding_nor_batches_change_rows(kind, tmp_path):
    fitted, index = built(tmp_path / "one", "lm", kind=kind)
    longer = case("lm")
    longer.train.extra = 3
    other = fit(
        fitted.model, longer.train, fitted.task, curvature=EKFAC(), batch_size=1, check=False
    )
    # the same coordinates, other batches
    again = GradientIndex.build(
        type(fitted)(
            model=fitted.model, task=fitted.task, train=longer.train, followed=fitted.followed,
            curvature=fitted.curvature, facts=fitted.facts, batch_size=1,
        ),
        tmp_path / "two", kind=kind, dtype="float32",
    )  # fmt: skip
    assert other.batch_size == 1
    rows = [
        i.rows(torch.arange(i.n_rows))[torch.tensor(i.numbers()).argsort()] for i in (index, again)
    ]
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-6)


def test_pca_sides_are_leading_eigenvectors_and_need_factors(tmp_path):
    fitted, _ = built(tmp_path, "mlp", kind=LoGra(rank=2, init="pca"))
    space = LoGra(rank=2, init="pca").spaces(fitted)[0]
    layer = fitted.followed.layers[0]
    P_out, _ = space.projection.sides(layer)
    Q_G = fitted.curvature.bases[layer.name][1]
    assert all(any(torch.equal(row, q) for q in Q_G.mT) for row in P_out)
    dual = shared("mlp").fitted(Dual())
    for kind in (LoGra(init="pca"), Whitened()):
        with pytest.raises(ValueError, match="eigenbasis for each layer"):
            kind.spaces(dual)


def test_a_curvature_without_leading_directions_is_refused_below_full_rank():
    fitted = shared("mlp").fitted(Identity())
    with pytest.raises(ValueError, match="LoGra"):
        Whitened(rank=2, damping=0.1).spaces(fitted)[0]


def test_damping_that_only_a_curvature_could_give_is_refused_by_logra():
    with pytest.raises(ValueError, match="curvature of its own"):
        LoGra(damping="auto").spaces(shared("mlp").fitted(EKFAC()))


def test_wide_rows_of_few_examples_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="the damping decides most"):
        built(tmp_path, "mlp", kind=LoGra(rank=4))


def test_columns_are_chosen_by_the_influence_they_carry():
    fitted = shared("mlp").fitted(EKFAC())
    share = kept_share(Whitened(rank=2, damping=0.01).spaces(fitted)[0], fitted)
    by_eigenvalue = Whitened(rank=2, damping=0.01, choose="eigenvalue").spaces(fitted)[0]
    assert share >= kept_share(by_eigenvalue, fitted) - 1e-12
    assert 0 < share < 1
    assert kept_share(EVERYTHING.spaces(fitted)[0], fitted) == pytest.approx(1)


def test_the_best_rectangle_of_a_product_is_its_largest_factors():
    u, v = torch.rand(9).double(), torch.rand(7).double()
    rows, columns = best_rectangle(torch.outer(u, v), 3, 2)
    assert rows.tolist() == u.topk(3).indices.tolist()
    assert columns.tolist() == v.topk(2).indices.tolist()


def test_the_inverse_of_a_relative_damping_is_taken_layer_by_layer(tmp_path):
    fitted, index = built(tmp_path, "mlp", kind=Whitened(rank=None, damping="0.3 relative"))
    expected = Influence(damping="0.3 relative", n_intervals=0).attribute(
        fitted, shared("mlp").query
    )
    found = index.attribute(fitted, shared("mlp").query, keep=len(fitted.train))
    place = torch.tensor(found.kept).argsort()
    torch.testing.assert_close(found.values[:, place], expected.values, rtol=1e-4, atol=1e-6)
    assert Inverse(Damping(0.3, "relative"))(torch.ones(1), 2.0).item() == pytest.approx(1 / 1.6)


def test_empty_rows_are_refused():
    for make in (lambda: Whitened(rank=0), lambda: LoGra(ranks={"a": (0, 2)})):
        with pytest.raises(ValueError, match="1 or more"):
            make()


class Bottleneck(torch.nn.Module):
    """A layer with an encoder, a bottleneck of zeros and a decoder beside it, as LoGra is drawn in its paper."""

    def __init__(self, layer, P_out, P_in, n):
        super().__init__()
        self.layer, self.P_out, self.P_in = layer, P_out, P_in
        # one bottleneck for each example, so that one backward pass gives every gradient
        self.B = torch.nn.Parameter(torch.zeros(n, len(P_out), len(P_in), dtype=torch.float64))

    def forward(self, x):
        one = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)  # the bias as the last column
        added = (one @ self.P_in.mT) @ self.B.mT @ self.P_out
        return self.layer(x) + added


def test_hooked_rows_equal_the_gradients_of_a_bottleneck_beside_each_layer(tmp_path):
    kind = LoGra(rank=2, seed=1)
    fitted, index = built(tmp_path, "positions", Identity(), kind=kind)
    space, n = kind.spaces(fitted)[0], len(fitted.train)
    model = case("positions").model
    x, y = fitted.train.batch(range(n))
    plain = model(x)
    for i, layer in enumerate(fitted.followed):
        sides = (p.double() for p in space.projection.sides(layer))
        model.layers[i] = Bottleneck(model.layers[i], *sides, n)
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
    torch.testing.assert_close(model(x), plain)  # zeros change nothing
    gradients = torch.autograd.grad(loss, [layer.B for layer in model.layers])
    expected = torch.cat([g.flatten(1) for g in gradients], dim=1)
    order = torch.tensor(index.numbers()).argsort()
    stored = index.rows(torch.arange(n))[order]
    torch.testing.assert_close(stored.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_heaviest_coordinates_of_all_layers_are_kept():
    """Without a limit on columns they are those of a plain sort."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (1, 6, 9), "b": (2, 4, 5), "c": (1, 3, 1)}
    weights = {k: torch.rand(s, generator=generator) for k, s in shapes.items()}
    found = heaviest(weights, 30, reach=9)
    least = torch.cat([w.flatten() for w in weights.values()]).sort(descending=True).values[29]
    for name, w in weights.items():
        mask = torch.zeros_like(w)
        kept = found[name]
        ones = kept.block(w)
        assert float(ones.min()) >= float(least) and len(ones) == int((w >= least).sum())
        assert mask.shape == w.shape
    few = heaviest(weights, 30, reach=2)
    for name, w in weights.items():
        used = [
            w.shape[i] if c is None else c.shape[1]
            for i, c in ((1, few[name].out), (2, few[name].in_))
        ]
        assert min(used) <= 2
    assert sum(len(k.block(weights[n])) for n, k in few.items()) == 30


def test_every_order_of_contraction_gives_the_same_rows():
    layer = shared("positions").fitted(EKFAC()).followed.layers[0]
    fitted = shared("positions").fitted(EKFAC())
    for n_out, n_in in ((1, layer.shape[2]), (layer.shape[1], 1), (2, 2)):
        kept = {
            x.name: Kept(
                torch.arange(min(n_out, x.shape[1]))[None],
                torch.arange(min(n_in, x.shape[2]))[None],
            )
            for x in fitted.followed
        }
        space = WhitenedSpace(list(fitted.followed), fitted.curvature, Damping(0.1), kept)
        for pos in (1, 4, 50):
            block = Factored(
                torch.randn(3, pos, layer.shape[2]).double(),
                torch.randn(3, pos, layer.shape[1]).double(),
            )
            torch.testing.assert_close(space(layer, block), space(layer, block.dense()))


def under_a_hyperbola(out: int, in_: int, height: float, seed: int) -> torch.Tensor:
    """Chosen coordinates as eigenvalues give them: long along both axes, in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.randperm(out, generator=generator), torch.randperm(in_, generator=generator)
    return (i[:, None] + 1) * (j + 1) <= height


@pytest.mark.parametrize("height", [0, 1, 5, 30, 300, 2400])
def test_rectangles_hold_every_chosen_coordinate_once(height):
    mask = under_a_hyperbola(60, 40, height, seed=height)
    parts = rectangles(mask)
    assert torch.equal(sum(part.int() for part in parts), mask.int())
    assert len(parts) > 1 or height in (0, 1, 2400)


def test_coordinates_along_both_axes_are_those_of_the_whole_row_in_their_order():
    fitted = shared("positions").fitted(EKFAC())
    layers = list(fitted.followed)
    kept, whole = {}, {layer.name: Kept() for layer in layers}
    for layer in layers:
        mask = torch.zeros(layer.shape[1:], dtype=torch.bool)
        mask[1] = mask[:, 2] = True
        assert len(rectangles(mask)) == 2
        kept[layer.name] = Kept(chosen=mask.flatten().nonzero().flatten())
    few, every = (
        WhitenedSpace(layers, fitted.curvature, Damping(0.1), chosen) for chosen in (kept, whole)
    )
    for layer in layers:
        for pos in (1, 4, 50):
            a, g = (torch.randn(3, pos, d).double() for d in (layer.shape[2], layer.shape[1]))
            block = Factored(a, g)
            expected = every(layer, block)[:, kept[layer.name].chosen]
            torch.testing.assert_close(few(layer, block), expected)
            torch.testing.assert_close(few(layer, block.dense()), expected)
