"""Influence against closed forms, dense matrices and refitting; its tables, groups and intervals."""

import pytest
import torch
from torch import Tensor, nn

from headwater.core.capture import sweep
from headwater.core.curvature import EKFAC, KFAC, Dense, Diagonal, Dual, Identity, Layerwise
from headwater.core.damping import Damping, Inverse
from headwater.core.examples import TensorExamples
from headwater.core.fit import fit
from headwater.core.scores import significance
from headwater.core.scoring import PairScores
from headwater.core.target import Loss
from headwater.core.task import Classification, Regression
from headwater.numerics.resampling import jackknife_interval
from headwater.trace import Influence
from headwater.trace.influence import inner_products, query_gradients, refine, score
from tests.curvature_cases import (
    EVERY,
    Case,
    Tokens,
    autograd_rows,
    block_matrices,
    blocks_of,
    case,
    dense_gauss_newton,
    loss_gradients,
    shared,
    side_by_side,
)

LAM, RHO = 0.05, 0.01
EXACT = {"fisher": "exact", "cut": 0.0}


def prediction(p) -> Tensor:
    """The prediction itself, which is linear in the weights of a linear model."""
    return p.mean.sum((1, 2))


class Ridge:
    """Linear regression with a ridge penalty, solved in closed form."""

    def __init__(self, n: int = 30, dim: int = 4):
        torch.manual_seed(0)
        self.x = torch.randn(n, dim).double()
        self.y = self.x @ torch.randn(dim).double() + torch.randn(n).double()
        self.queries, self.n = torch.randn(3, dim).double(), n
        self.theta = self.solve(torch.ones(n).double())

    def hessian(self, weights: Tensor) -> Tensor:
        return (self.x * weights[:, None]).mT @ self.x / self.n + LAM * torch.eye(
            self.x.shape[1]
        ).double()

    def solve(self, weights: Tensor) -> Tensor:
        """The minimizer of (1/N) Σ w_n ½ (x_n θ - y_n)² + ½ λ |θ|²."""
        return torch.linalg.solve(self.hessian(weights), self.x.mT @ (weights * self.y) / self.n)

    def fit(self, curvature):
        model = nn.Linear(self.x.shape[1], 1, bias=False).double()
        model.weight.data = self.theta[None]
        return fit(model, (self.x, self.y), Regression(), curvature=curvature, weight_decay=LAM)

    def scores(self, curvature) -> Tensor:
        """Influence on the predictions, in float64."""
        fitted, method = self.fit(curvature), Influence()
        queries = TensorExamples(self.queries, torch.zeros(3).double())
        gradients = query_gradients(fitted, queries, prediction)
        prepared, _ = method._prepare(fitted, fitted.curvature, gradients, fitted.damping(), None)
        scores = -inner_products(fitted, prepared, fitted.train).finish() / self.n
        public = method.attribute(fitted, queries, measurement=prediction)
        assert public.facts["damping"]["value"] == LAM and public.measurement == "prediction"
        torch.testing.assert_close(public.values.double(), scores, rtol=1e-5, atol=1e-7)  # float32
        return scores


@pytest.mark.parametrize("curvature", [Dense(), Dual(), KFAC(**EXACT), EKFAC(**EXACT)])
def test_ridge_regression_equals_the_closed_form_the_derivative_and_leaving_one_out(curvature):
    ridge, ones = Ridge(), torch.ones(30).double()
    scores = ridge.scores(curvature)
    residual = ridge.x @ ridge.theta - ridge.y
    H = ridge.hessian(ones)
    closed = -(ridge.queries @ torch.linalg.solve(H, (residual[:, None] * ridge.x).mT)) / ridge.n
    torch.testing.assert_close(scores, closed, rtol=1e-9, atol=1e-12)
    leverage = (ridge.x * torch.linalg.solve(H, ridge.x.mT).mT).sum(1) / ridge.n
    for n in (0, 7, 29):
        step = 1e-4 * nn.functional.one_hot(torch.tensor(n), 30)
        change = ridge.queries @ (ridge.solve(ones + step) - ridge.solve(ones - step)) / 2e-4
        # the central difference errs by its step squared, 1e-8
        torch.testing.assert_close(scores[:, n], change, rtol=1e-6, atol=1e-12)
        without = ridge.solve(ones - nn.functional.one_hot(torch.tensor(n), 30))
        removed = ridge.queries @ (without - ridge.theta)
        torch.testing.assert_close(
            -scores[:, n] / (1 - leverage[n]), removed, rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "curvature", [Dense(), Dual(cut=0.0), EKFAC(**EXACT)], ids=lambda c: c.kind
)
def test_equals_a_dense_solve(name, curvature):
    found = shared(name)
    fitted = found.fitted(curvature)
    queries, train = loss_gradients(fitted, found.query), loss_gradients(fitted)
    if curvature.kind == "ekfac":
        matrix = torch.block_diag(*block_matrices(fitted).values())
    else:
        matrix = dense_gauss_newton(fitted)
    system = matrix + RHO * torch.eye(len(matrix)).double()
    expected = -(queries @ torch.linalg.solve(system, train.mT)) / len(found.train)
    scores = Influence(damping=RHO).attribute(fitted, found.query)
    torch.testing.assert_close(
        scores.values.double(), expected, rtol=1e-5, atol=1e-7
    )  # kept in float32
    assert scores.query_ids == found.query.ids and scores.train_ids == found.train.ids
    assert scores.metadata == found.train.metadata and scores.measurement == "loss"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("curvature", [Identity(), EKFAC()], ids=lambda c: c.kind)
def test_conjugate_gradients_equal_the_dense_solve(name, curvature):
    found = shared(name)
    fitted = found.fitted(curvature)
    gradients = query_gradients(fitted, found.query)
    solved, facts = refine(fitted, gradients, Damping(RHO), steps=400, tolerance=1e-9)
    matrix = dense_gauss_newton(fitted)
    system = matrix + RHO * torch.eye(len(matrix)).double()
    expected = torch.linalg.solve(system, gradients.to_matrix().mT).mT
    torch.testing.assert_close(solved.to_matrix(), expected, rtol=1e-6, atol=1e-6)
    assert facts["cg_residual"] <= 1e-9 and 0 < facts["cg_steps"] < 400


def test_refined_scores_tell_their_steps_and_residual():
    found = shared("mlp")
    exact = Influence(damping=RHO).attribute(found.fitted(Dense()), found.query).values
    fitted, plain = found.fitted(EKFAC()), Influence(damping=RHO)
    refined = Influence(damping=RHO, cg_steps=100, cg_tolerance=1e-8).attribute(fitted, found.query)
    torch.testing.assert_close(refined.values, exact, rtol=1e-4, atol=1e-6)
    assert (plain.attribute(fitted, found.query).values - exact).norm() > 0.01 * exact.norm()
    assert refined.facts["cg_residual"] <= 1e-8 and refined.low is None
    one = Influence(damping="0.1 relative", cg_steps=1).attribute(fitted, found.query)
    assert one.facts["cg_steps"] == 1


def double_scores(fitted, queries, method=None) -> Tensor:
    """Scores before they are rounded to single precision."""
    method = method or Influence(damping=RHO)
    prepared, _ = method._prepare(
        fitted,
        fitted.curvature,
        query_gradients(fitted, queries),
        fitted.damping(method.damping),
        None,
    )
    return inner_products(fitted, prepared, fitted.train).finish()


@pytest.mark.parametrize(
    "curvature",
    # with a single draw the factors have null spaces, of which rounding picks the basis
    [EKFAC(draws=8), Dual(fisher="mc"), KFAC(draws=8), Diagonal()],
    ids=lambda c: c.kind,
)
@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_batches_and_padding_change_nothing(curvature, precision):
    tolerance = 1e-9 if precision == torch.float64 else 1e-5
    found = case("lm")
    found.model.to(precision)
    extended = [Tokens(x.sequences, extra=3) for x in (found.train, found.query)]
    scores = [
        double_scores(
            Case(found.model, found.task, train, query).fit(curvature, batch_tokens=n), query
        )
        for train, query, n in ((found.train, found.query, 4096), (*extended, 4096), (*extended, 6))
    ]
    scale = scores[0].abs().max()
    for other in scores[1:]:
        torch.testing.assert_close(other / scale, scores[0] / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("curvature", [EKFAC(), Dual(), Dense()], ids=lambda c: c.kind)
def test_a_model_in_single_precision_scores_like_one_in_double(curvature):
    found = case("mlp")
    double = double_scores(found.fit(curvature), found.query)
    found.model.float()
    x, y = found.train.tensors
    single = Case(
        found.model,
        found.task,
        TensorExamples(x.float(), y),
        TensorExamples(found.query.tensors[0].float(), found.query.tensors[1]),
    )
    scores = double_scores(single.fit(curvature), single.query)
    # eight digits in the products and a condition of some hundreds leave five
    torch.testing.assert_close(
        scores / double.abs().max(), double / double.abs().max(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["mlp", "short positions", "lm"])
@pytest.mark.parametrize("curvature", [EKFAC(), Dual()], ids=lambda c: c.kind)
def test_layers_add_up_to_the_total(name, curvature):
    found = shared(name)
    fitted = found.fitted(curvature)
    method = Influence(damping=RHO)
    scores = method.attribute(fitted, found.query, by_layer=True)
    assert scores.layers == [layer.name for layer in fitted.followed]
    torch.testing.assert_close(scores.by_layer.sum(0), scores.values, rtol=1e-4, atol=1e-6)
    alone = method.attribute(fitted, found.query)
    torch.testing.assert_close(scores.values, alone.values, rtol=1e-4, atol=1e-6)
    if curvature.kind == "ekfac":
        applied = fitted.curvature.apply(
            query_gradients(fitted, found.query), Inverse(Damping(RHO))
        )
        rows = autograd_rows(fitted, found.task.loss, found.train)
        for part, name in zip(scores.by_layer, scores.layers, strict=True):
            expected = -(applied.blocks[name].flatten(1) @ rows[name].mT) / len(found.train)
            torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("curvature", [EKFAC(), Dual()], ids=lambda c: c.kind)
def test_keeping_the_strongest_gives_the_same_scores_intervals_and_totals(curvature):
    found = shared("lm")
    train, fitted = found.train, found.fitted(curvature)
    options = {"damping": RHO, "n_intervals": 2}
    asked = {"by_layer": True, "group_by": "source", "control": found.query}
    whole = Influence(**options).attribute(fitted, found.query, **asked)
    kept = Influence(**options, keep=2).attribute(fitted, found.query, **asked)
    columns = kept.kept
    assert whole.kept is None and columns is not None and kept.n_train == len(train)
    assert len(columns) <= 2 * 2 * len(found.query) and kept.train_ids == [
        train.ids[i] for i in columns
    ]
    for q, (mine, its) in enumerate(zip(kept.top(2), whole.top(2), strict=True)):
        assert [kept.index(i) for i in mine] == its
        low, high = (torch.tensor(x) for x in (mine, its))
        torch.testing.assert_close(kept.low[q, low], whole.low[q, high], rtol=1e-4, atol=1e-6)
    for name in ("values", "significance"):
        torch.testing.assert_close(
            getattr(kept, name), getattr(whole, name)[:, columns], rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(kept.by_layer, whole.by_layer[:, :, columns], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kept.layer_totals, whole.layer_totals, rtol=1e-4, atol=1e-6)
    mine, its = kept.by("source"), whole.by("source")
    assert (mine.names, mine.counts) == (its.names, its.counts) == (["a", "b"], mine.counts)
    for name in ("raised", "lowered", "net"):
        torch.testing.assert_close(getattr(mine, name), getattr(its, name), rtol=1e-4, atol=1e-6)
    assert kept.metadata["source"] == [train.metadata["source"][i] for i in columns]


@pytest.mark.parametrize("name", ["mlp", "lm"])
@pytest.mark.parametrize("keep", [None, 1])
def test_some_examples_have_the_scores_they_have_among_all(name, keep):
    found = shared(name)
    fitted, chosen = found.fitted(EKFAC()), [3, 0, 2]
    prepared = fitted.curvature.prepare(
        query_gradients(fitted, found.query), Inverse(Damping(RHO)), fitted.n_rows
    )
    whole = score(fitted, prepared, by_layer=True)
    some = score(fitted, prepared, by_layer=True, among=chosen, keep=keep)
    assert set(some["kept"]) <= set(chosen) and some["n_train"] == len(found.train)
    assert some["train_ids"] == [found.train.ids[i] for i in some["kept"]]
    for key in ("values", "by_layer"):
        tolerance = 1e-12 if key == "values" else 1e-6  # parts of layers are kept in float32
        torch.testing.assert_close(
            some[key], whole[key][..., some["kept"]], rtol=tolerance, atol=tolerance
        )
    if keep is None:
        assert some["kept"] == chosen
    method = Influence(damping=RHO, keep=keep, n_intervals=1)
    scores = method.attribute(fitted, found.query, among=chosen)
    assert scores.low is not None and set(scores.kept) <= set(chosen)


def test_examples_that_are_not_there_cannot_be_scored():
    found = shared("mlp")
    for among, what in (([0, 99], "there is no example 99 among 18"), ([], "got none")):
        with pytest.raises(ValueError, match=what):
            Influence(damping=RHO).attribute(found.fitted(EKFAC()), found.query, among=among)


def test_a_matrix_that_does_not_fit_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("headwater.trace.influence.available_memory_bytes", lambda: 100)
    found = shared("mlp")
    with pytest.raises(ValueError, match="Pass keep=100 to keep the strongest"):
        Influence(damping=RHO).attribute(found.fitted(EKFAC()), found.query)


@pytest.mark.parametrize("curvature", [EKFAC(), Dual()], ids=lambda c: c.kind)
def test_tokens_and_the_rest_add_up_to_the_score(curvature):
    found = shared("lm")
    fitted, method = found.fitted(curvature), Influence(damping=RHO)
    scores = method.attribute(fitted, found.query)
    parts, elsewhere = method.tokens(fitted, found.query, [3, 0, 2])
    torch.testing.assert_close(
        parts.sum(2) + elsewhere, scores.values[:, [3, 0, 2]], rtol=1e-4, atol=1e-6
    )
    assert parts.shape == (2, 3, 5) and not bool(parts[:, 0, 2:].any())  # nothing on padding
    assert bool(elsewhere.any())  # the gains of the norm have no positions


def test_groups_and_contrasts_are_linear_combinations():
    found = shared("mlp")
    fitted, method = found.fitted(EKFAC()), Influence(damping=RHO)
    each = method.attribute(fitted, found.query).values
    weights = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]])
    found_groups = method.attribute(
        fitted, found.query, weights=weights, names=["both", "contrast"]
    )
    torch.testing.assert_close(found_groups.values, weights @ each, rtol=1e-4, atol=1e-6)
    assert found_groups.query_ids == ["both", "contrast"]
    unnamed = method.attribute(fitted, found.query, weights=weights)
    assert unnamed.query_ids == ["0", "1"] and torch.equal(unnamed.values, found_groups.values)
    parts, rest = method.tokens(fitted, found.query, [0, 1], weights=weights)
    assert parts.shape == (2, 2, 1)
    torch.testing.assert_close(
        parts[:, :, 0] + rest, found_groups.values[:, :2], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
def test_low_rank_queries_at_full_rank_are_exact_and_lose_little_below(name):
    found = shared(name)
    fitted = found.fitted(EKFAC())
    whole = Influence(damping=RHO, n_intervals=0).attribute(fitted, found.query).values
    full = Influence(damping=RHO, rank=99, n_intervals=0).attribute(fitted, found.query).values
    torch.testing.assert_close(full, whole, rtol=1e-5, atol=1e-7)
    errors = [
        (
            Influence(damping=RHO, rank=r, n_intervals=0).attribute(fitted, found.query).values
            - whole
        ).norm()
        for r in (1, 2)
    ]
    assert errors[1] < whole.norm()


@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
def test_a_first_stage_of_all_terms_is_exact(name):
    found = shared(name)
    fitted = found.fitted(EKFAC())
    whole = Influence(damping=RHO, n_intervals=0).attribute(fitted, found.query).values
    staged = Influence(damping=RHO, terms=99, n_intervals=0).attribute(fitted, found.query).values
    torch.testing.assert_close(staged, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "curvature", [EKFAC(), KFAC(), Diagonal(), Identity(), Dual(), Dense()], ids=lambda c: c.kind
)
@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
def test_self_influence_is_the_diagonal_and_never_negative(name, curvature):
    found = shared(name)
    fitted, method = found.fitted(curvature), Influence(damping=RHO, n_intervals=0)
    own = method.self_influence(fitted)
    pairs = method.attribute(fitted, found.train).values.diagonal()
    # adding an example lowers its own loss, so the score of the loss is minus the self-influence
    torch.testing.assert_close(own, -pairs, rtol=1e-4, atol=1e-6)
    assert bool((own >= 0).all())


def test_measurements_have_their_signs():
    found = shared("mlp")
    fitted, method = found.fitted(Dense()), Influence(damping=RHO, n_intervals=0)
    loss, log_prob, margin = (
        method.attribute(fitted, found.query, measurement=m).values
        for m in ("loss", "log_prob", "margin")
    )
    torch.testing.assert_close(log_prob, -loss)
    system = dense_gauss_newton(fitted) + RHO * torch.eye(53).double()
    gradients = side_by_side(
        autograd_rows(fitted, lambda m, b: found.task.predict(m, b).margin(), found.query)
    )
    expected = -(gradients @ torch.linalg.solve(system, loss_gradients(fitted).mT)) / 18
    torch.testing.assert_close(margin.double(), expected, rtol=1e-4, atol=1e-6)


def test_significance_is_against_held_out_examples():
    found = shared("mlp")
    fitted, method = found.fitted(EKFAC()), Influence(damping=RHO)
    scores = method.attribute(fitted, found.query, control=found.query)
    other = Case(found.model, found.task, found.query, found.query)
    prepared, _ = method._prepare(
        fitted, fitted.curvature, query_gradients(fitted, found.query), Damping(RHO), None
    )
    pairs = PairScores(prepared, 4)
    sweep(fitted.capture(), other.train, [pairs], Loss())
    torch.testing.assert_close(scores.control.double(), -pairs.finish() / 18, rtol=1e-5, atol=1e-7)
    expected = significance(scores.values.double(), scores.control.double())
    torch.testing.assert_close(scores.significance, expected)
    assert method.attribute(fitted, found.query).significance is None


@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
@pytest.mark.parametrize(
    "curvature", [EKFAC(folds=3), Diagonal(folds=3), Dual(folds=3)], ids=lambda c: c.kind
)
@pytest.mark.parametrize("damping", [RHO, "0.1 relative"])
def test_intervals_are_the_jackknife_over_folds_for_the_strongest_examples(
    name, curvature, damping
):
    found = shared(name)
    fitted = found.fitted(curvature)
    scores = Influence(damping=damping, n_intervals=2, confidence_level=0.9).attribute(
        fitted, found.query
    )
    told = ~scores.low.isnan()
    for q, row in enumerate(scores.values):
        ends = {*row.topk(2).indices.tolist(), *row.topk(2, largest=False).indices.tolist()}
        assert set(told[q].nonzero().squeeze(1).tolist()) == ends
    function = Inverse(fitted.damping(damping))
    gradients = query_gradients(fitted, found.query)
    rows = loss_gradients(fitted)
    replicates = torch.stack(
        [
            -(r.apply(gradients, function).to_matrix() @ rows.mT) / len(rows)
            for r in fitted.curvature.replicates()
        ]
    )
    low, high = jackknife_interval(scores.values.double(), replicates, confidence_level=0.9)
    for mine, expected in ((scores.low, low), (scores.high, high)):
        torch.testing.assert_close(mine[told].double(), expected[told], rtol=1e-4, atol=1e-6)
    assert bool((scores.low[told] <= scores.values[told]).all())


def test_intervals_take_one_sweep(monkeypatch):
    from headwater.trace import influence

    found, notes = shared("mlp"), []
    fitted = found.fitted(Dual(folds=5))
    monkeypatch.setattr(
        influence, "sweep", lambda *a, **k: notes.append(k["note"]) or sweep(*a, **k)
    )
    Influence(damping=RHO).attribute(fitted, found.query)
    assert notes == ["queries", "scores", "intervals"]
    notes.clear()
    Influence(damping=RHO, n_intervals=0).attribute(fitted, found.query)
    assert notes == ["queries", "scores"]


def test_facts_name_what_decided():
    found = case("mlp")
    facts = Influence().attribute(found.fit(EKFAC(), weight_decay=0.02), found.query).facts
    assert facts["damping"] == {
        "value": 0.02,
        "unit": "absolute",
        "source": "weight decay of the training run",
    }
    assert facts["damping_ratio"] > 0 and facts["curvature"]["kind"] == "ekfac"
    assert facts["n_train"] == 18 and facts["options"]["n_intervals"] == 10


def test_blocks_are_independent_for_layerwise_curvature_only():
    found = shared("mlp")
    ekfac, dense = (found.fitted(c) for c in (EKFAC(**EXACT), Dense()))
    assert isinstance(ekfac.curvature, Layerwise)
    sizes = [len(b) for b in blocks_of(dense.curvature.matrix, dense).values()]
    assert sizes == [35, 18] and float(dense.curvature.matrix[:35, 35:].norm()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [EKFAC(own_bases=False), EKFAC(own_bases=True), Dual(cut=0.0)],
    ids=["ekfac in its basis", "ekfac", "dual"],
)
def test_intervals_cover_the_score_of_the_whole_population(method):
    """The fit's examples and label draws are drawn anew, 40 times; the truth is the population's curvature.

    Without eigenbases of their own, EK-FAC's replicates leave out the sampling of the basis; the truth is then taken
    in the basis of the fit.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(6000, 5).double()
    y = (2 * model(x).detach()).softmax(1).multinomial(1).squeeze(1)
    whole = fit(model, (x, y), Classification(), curvature=Dense())
    queries, scored = (
        query_gradients(whole, TensorExamples(torch.randn(n, 5).double(), torch.randint(3, (n,))))
        for n in (5, 20)
    )

    def score(curvature) -> Tensor:
        return curvature.apply(queries, Inverse(Damping(0.02))).inner(scored)

    def in_basis_of(fitted) -> Layerwise:
        bases, sums = fitted.curvature.bases, {}
        for layer in fitted.followed:
            Q_A, Q_G = bases[layer.name]
            Q, block = torch.kron(Q_G, Q_A), blocks_of(whole.curvature.matrix, whole)[layer.name]
            sums[layer.name] = (Q.mT @ block @ Q).diagonal().reshape(1, *layer.block)
        return Layerwise(bases, sums, torch.ones(1))

    populations = {
        "dual": whole.curvature,
        "ekfac": fit(model, (x, y), Classification(), curvature=EKFAC(fisher="exact")).curvature,
    }
    covered = []
    for run in range(40):
        chosen = torch.randperm(6000)[:300]
        ids = [f"{run} {i}" for i in range(300)]  # new ids: new folds and new label draws
        train = TensorExamples(x[chosen], y[chosen], ids=ids)
        fitted = fit(model, train, Classification(), curvature=method, check=False)
        given = method == EKFAC(own_bases=False)
        truth = score(in_basis_of(fitted) if given else populations[method.kind])
        replicates = torch.stack([score(r) for r in fitted.curvature.replicates()])
        low, high = jackknife_interval(score(fitted.curvature), replicates)
        covered.append(((low <= truth) & (truth <= high)).double().mean())
    print(f"coverage {float(torch.stack(covered).mean()):.3f}")
    # 40 runs of strongly correlated scores tell the coverage to about 2 %
    assert 0.90 < float(torch.stack(covered).mean()) < 0.99


@pytest.mark.parametrize("keep", [None, 2])
def test_what_cannot_be_asked_is_refused(keep):
    found, method = shared("lm"), Influence(damping=RHO, keep=keep)
    fitted, query = found.fitted(EKFAC()), found.query
    with pytest.raises(ValueError, match=r"no metadata column 'nope'; there are: source"):
        method.attribute(fitted, query, group_by="nope")
    with pytest.raises(ValueError, match=r"weights \(group, query\) of .* got shape \(1, 99\)"):
        method.attribute(fitted, query, weights=torch.ones(1, 99))


def test_totals_of_nothing_are_plain_zeros():
    found = shared("lm")
    scores = Influence(damping=RHO, keep=1).attribute(
        found.fitted(EKFAC()),
        found.query,
        weights=torch.zeros(1, len(found.query)),
        group_by="source",
    )
    totals = torch.stack([scores.totals.raised, scores.totals.lowered])
    assert bool((totals == 0).all()) and not bool(totals.signbit().any())
