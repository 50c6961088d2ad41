"""The function-space distance: exact cases, gradients, architectures, and what is refused."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import headwater
from headwater.core.examples import TensorExamples
from headwater.core.files import ArtifactMismatch
from headwater.core.function_space import (
    FunctionSpaceDistance,
    GateError,
    QuadraticDistance,
    StoredDistance,
    function_space_distance,
    load_distance,
)
from headwater.core.function_space.statistics import collect_statistics
from headwater.core.task import Classification, Regression
from headwater.numerics.gated import DISTANCES
from tests.cases import Net

TASK = Classification()
DRAWN = ["bgln-s", "linearized", "exact", "tangent"]
EVERY = [*DRAWN, "bgln-d", "bgln-d-released"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mlp(*sizes: int) -> nn.Sequential:
    made: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        made += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*made[:-1]).double()


def data(*shape: int, n: int = 60, classes: int = 3) -> TensorExamples:
    x = torch.randn(n, *shape, dtype=torch.float64) + 0.3
    y = torch.randint(classes, (n,))
    return TensorExamples(x, y, metadata={"label": y.tolist()})


def moved(model: nn.Module, scale: float = 0.1) -> dict[str, torch.Tensor]:
    return {k: p.detach() + scale * torch.randn_like(p) for k, p in model.named_parameters()}


def true_distance(model, theta, x, rho="squared"):
    with torch.no_grad():
        return DISTANCES[rho](model(x), functional_call(model, theta, (x,))).mean()


@pytest.mark.parametrize("method", EVERY)
def test_the_anchor_is_at_distance_zero_and_flat(method):
    net, train = mlp(4, 6, 5, 3), data(4)
    for rho in ["squared"] if method.startswith("bgln-d") else ["squared", "softmax", "kl"]:
        distance = function_space_distance(net, train, TASK, method=method, rho=rho)
        theta = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
        value = distance(theta)
        assert float(value.detach()) == 0
        # probabilities sum to one but for rounding, which the gradient of KL keeps
        for g in torch.autograd.grad(value, list(theta.values())):
            torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-15)


def test_a_deep_linear_net_is_exact_and_drawing_converges_to_it():
    net, train = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double(), data(4)
    theta, x = moved(net, 0.3), train.tensors[0]
    exact = true_distance(net, theta, x)
    options = {"rho": "squared", "jitter": 0.0}
    carried = function_space_distance(net, train, TASK, method="bgln-d", **options)(theta)
    torch.testing.assert_close(carried, exact, rtol=1e-10, atol=1e-10)
    errors = []
    for n in (100, 10_000):
        drawn = function_space_distance(net, train, TASK, n_samples=n, **options)
        errors += [
            sum(abs(float(drawn(theta, draw=k) / exact) - 1) for k in range(8)) / 8,
        ]
    assert (
        errors[1] < 0.03 and errors[1] < errors[0] / 4
    )  # a hundred times the draws: a tenth of the error


def test_drawn_gates_and_inputs_converge_to_the_carried_moments():
    net, train = mlp(4, 6, 5, 3), data(4)
    theta = moved(net, 0.3)
    options = {"rho": "squared", "jitter": 0.0, "by": "label"}
    carried = float(function_space_distance(net, train, TASK, method="bgln-d", **options)(theta))
    drawn = function_space_distance(net, train, TASK, n_samples=20_000, **options)
    values = torch.tensor([float(drawn(theta, draw=k)) for k in range(8)])
    spread = float(values.std()) / 8**0.5
    assert abs(float(values.mean()) - carried) < 4 * spread < 0.1 * carried


def test_with_the_anchor_s_own_gates_and_inputs_a_change_behind_them_is_exact():
    """The gates of the first network are right for the second as long as nothing in front of them moved."""
    net, train = mlp(4, 6, 3), data(4)
    theta = {"2.weight": net[2].weight.detach() + torch.randn(3, 6)}
    distance = function_space_distance(net, train, TASK, method="linearized", keep=60)
    expected = true_distance(net, theta, train.tensors[0], "kl")
    torch.testing.assert_close(distance(theta), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", EVERY)
def test_gradients_agree_with_finite_differences(method):
    net, train = mlp(2, 3, 3), data(2)
    distance = function_space_distance(net, train, TASK, method=method, n_samples=10)
    theta = {k: v.requires_grad_() for k, v in moved(net).items()}
    names = list(theta)
    assert torch.autograd.gradcheck(
        lambda *values: distance(dict(zip(names, values, strict=True))), tuple(theta.values())
    )


@pytest.mark.parametrize("rho", ["squared", "softmax", "kl"])
@pytest.mark.parametrize("method", DRAWN)
def test_the_product_at_the_anchor_is_jacobian_hessian_jacobian(method, rho):
    net, train = mlp(3, 4, 3), data(3)
    distance = function_space_distance(net, train, TASK, method=method, rho=rho, n_samples=30)
    drawn, point = distance.drawn(), {k: p.detach() for k, p in net.named_parameters()}
    jacobian = jacrev(lambda t: distance._gated(t, drawn.x, drawn.gates))(point)
    J = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2)
    p = drawn.before.softmax(-1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = {"squared": torch.eye(3).double().expand(len(p), -1, -1), "kl": S, "softmax": S @ S}[rho]
    v = {k: torch.randn_like(t) for k, t in point.items()}
    flat = torch.cat([t.flatten() for t in v.values()])
    expected = torch.einsum("noi,nop,npj,j->i", J, H, J, flat) / len(p)
    product = distance.gauss_newton_product(v)
    found = torch.cat([t.flatten() for t in product.values()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rho", ["squared", "kl"])
@pytest.mark.parametrize("method", ["bgln-s", "linearized"])
def test_its_curvature_multiplies_as_its_product_does(method, rho):
    net, train = mlp(3, 4, 3), data(3)
    fit = headwater.fit(net, train, TASK)
    distance = function_space_distance(fit, method=method, rho=rho, n_samples=30)
    theta, small = moved(net), 1e-4
    v = {k: small * (theta[k] - p.detach()) for k, p in net.named_parameters()}
    product = distance.gauss_newton_product(v)
    expected = 0.5 * sum(float((v[k] * product[k]).sum()) for k in v)
    quadratic = QuadraticDistance(distance.in_place_of_data(fit))
    found = float(quadratic({k: p.detach() + v[k] for k, p in net.named_parameters()}))
    # the dual form drops labels of probability below 1e-3
    assert found == pytest.approx(expected, rel=1e-2 if rho == "kl" else 1e-8)
    exact = float(distance({k: p.detach() + v[k] for k, p in net.named_parameters()}))
    assert exact == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("method", ["exact", "linearized"])
def test_with_all_inputs_kept_its_curvature_is_that_of_the_data(method):
    net, train = mlp(3, 4, 3), data(3)
    fit = headwater.fit(net, train, TASK)
    same = function_space_distance(fit, method=method, keep=len(train)).in_place_of_data(fit)
    ours, theirs = (
        f.curvature.rows.to_matrix().mT @ f.curvature.rows.to_matrix() for f in (same, fit)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_carried_moments_have_the_same_product():
    net, train = mlp(3, 4, 3), data(3)
    carried = function_space_distance(net, train, TASK, method="bgln-d", jitter=0.0)
    drawn = function_space_distance(net, train, TASK, rho="squared", n_samples=100_000, jitter=0.0)
    v = {k: torch.randn_like(p) for k, p in net.named_parameters()}
    one, other = (
        torch.cat([t.flatten() for t in d.gauss_newton_product(v).values()])
        for d in (carried, drawn)
    )
    assert float((one - other).norm() / one.norm()) < 0.03


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
        nn.AvgPool2d(2),
        nn.Dropout(0.5),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


def test_a_convolutional_net_has_one_gate_at_each_place_and_its_batch_norm_folded():
    net, train = conv_net(), data(36, n=200)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    distance = function_space_distance(net, train, TASK)
    assert distance.statistics.rates["1.2"].shape == (1, 3, 6, 6)
    net.eval()
    with torch.no_grad():
        first = net[1][1](net[1][0](net[0](train.tensors[0])))
        expected = (first > 0).double().mean(0)
    torch.testing.assert_close(distance.statistics.rates["1.2"][0], expected)
    # moments carried through convolutions agree with drawing
    theta = moved(net, 0.05)
    carried = float(function_space_distance(net, train, TASK, method="bgln-d", jitter=0.0)(theta))
    drawn = function_space_distance(net, train, TASK, rho="squared", n_samples=20_000, jitter=0.0)
    assert float(drawn(theta)) == pytest.approx(carried, rel=0.05)
    assert not net[1][2].training and net[1][2].inplace  # the model itself is left alone


class Residual(nn.Module):
    """A branch beside a shortcut, and one ReLU that is used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.head(self.act(x + self.b(self.act(self.a(x)))))


def test_branches_and_a_relu_that_runs_twice_are_followed():
    net, train = Residual().double(), data(4, n=400)
    distance = function_space_distance(net, train, TASK)
    assert set(distance.statistics.rates) == {"act", "act#2"}
    theta = moved(net, 0.05)
    true = true_distance(net, theta, train.tensors[0], "kl")
    assert float(distance(theta)) == pytest.approx(float(true), rel=0.5)
    with pytest.raises(GateError, match="chain of layers"):
        function_space_distance(net, train, TASK, method="bgln-d")


def test_one_relu_under_two_names_is_one_gate_at_each_call():
    shared = nn.ReLU()
    net = nn.Sequential(nn.Linear(4, 5), shared, nn.Linear(5, 6), shared, nn.Linear(6, 3)).double()
    train, theta = data(4), moved(net)
    distance = function_space_distance(net, train, TASK, method="bgln-d")
    assert {k: tuple(r.shape) for k, r in distance.statistics.rates.items()} == {
        "1": (1, 5),
        "1#2": (1, 6),
    }
    apart = mlp(4, 5, 6, 3)
    apart.load_state_dict(net.state_dict())
    same = function_space_distance(apart, train, TASK, method="bgln-d")
    torch.testing.assert_close(distance(theta), same(theta))


def test_tied_weights_may_be_given_under_each_name():
    net, train = mlp(4, 4, 4, 3), data(4)
    net[2].weight = net[0].weight
    distance, other = function_space_distance(net, train, TASK), copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight += 0.1
        assert float(distance(other)) == float(distance(other.state_dict())) > 0


def test_a_checkpoint_brings_its_own_running_statistics():
    net, train = conv_net().eval(), data(36)
    other = copy.deepcopy(net)
    other[1][1].running_mean += 1.0
    distance = function_space_distance(net, train, TASK)
    with torch.no_grad():
        assert float(distance(other)) > 0 and float(distance(net)) == 0
        assert float(distance(other.state_dict())) == float(distance(other))


REFUSED = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention.*Attention multiplies"),
    "layer norm": (lambda: nn.LayerNorm(4), "LayerNorm.*divide by what they read"),
    "max pool": (lambda: nn.MaxPool1d(2), "MaxPool1d.*AvgPool"),
    "gelu": (lambda: nn.GELU(), "GELU, whose slope is not 0 or 1"),
    "softmax": (lambda: nn.Softmax(dim=1), "Softmax"),
    "batch norm without statistics": (
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
        "running statistics",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_is_refused_by_name(name):
    make, message = REFUSED[name]
    net = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 3)).double()
    with pytest.raises(GateError, match=message):
        function_space_distance(net, data(4), TASK)


def test_an_activation_that_is_no_module_is_found():
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3)).double()
    with pytest.raises(GateError, match=r"F\.relu"):
        function_space_distance(net, data(4), TASK)


def test_smooth_activations_are_taken_by_their_mean_slope_when_asked_to():
    net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 3)).double()
    train = data(4, n=500)
    s = net[0](train.tensors[0]).detach()
    slope = torch.autograd.functional.jacobian(lambda t: F.gelu(t).sum(), s)
    distance = function_space_distance(net, train, TASK, smooth=True)
    torch.testing.assert_close(distance.statistics.rates["1"][0], slope.mean(0))
    theta = moved(net, 0.05)
    true = float(true_distance(net, theta, train.tensors[0], "kl"))
    assert float(distance(theta)) == pytest.approx(true, rel=0.5)
    linearized = function_space_distance(
        net, train, TASK, smooth=True, method="linearized", keep=500
    )
    behind = {"2.bias": theta["2.bias"]}  # nothing in front of the gates has moved
    expected = true_distance(net, behind, train.tensors[0], "kl")
    torch.testing.assert_close(linearized(behind), expected)


def test_only_chosen_outputs_count():
    net, train = mlp(4, 6, 3), data(4)
    theta = {"2.bias": net[2].bias.detach() + torch.tensor([0.0, 0.0, 5.0])}
    for method in ("bgln-s", "bgln-d"):
        options = {"method": method, "rho": "squared", "outputs": (0, 1)}
        assert float(function_space_distance(net, train, TASK, **options)(theta)) == 0
    assert float(function_space_distance(net, train, TASK)(theta)) > 0.1


def test_draws_repeat_themselves_by_number_and_seed():
    net, train = mlp(4, 6, 3), data(4)
    theta, distance = moved(net), function_space_distance(net, train, TASK)
    values = [float(distance(theta, draw=k)) for k in (0, 1, 0)]
    assert values[0] == values[2] != values[1]
    assert float(function_space_distance(net, train, TASK, seed=1)(theta)) not in values


def test_a_class_of_one_example_is_drawn_as_that_example():
    net, x = mlp(4, 6, 3), torch.randn(9, 4).double()
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    options = {"by": y.tolist(), "n_samples": 900}
    distance = function_space_distance(net, (x, y), TASK, **options)
    drawn = distance.drawn().x
    alike = (drawn == x[8]).all(1)
    assert int(alike.sum()) == 100 and float(distance(moved(net))) > 0
    one = function_space_distance(net, (x[8:], y[8:]), TASK, method="linearized", rho="kl")
    theta = {"2.weight": net[2].weight.detach() + torch.randn(3, 6)}
    torch.testing.assert_close(one(theta), true_distance(net, theta, x[8:], "kl"))


def test_gates_that_flip_are_counted_and_warned_of():
    net, train = mlp(4, 6, 3), data(4)
    distance = function_space_distance(net, train, TASK)
    assert distance.flips(net) == 0
    other = {"0.weight": -net[0].weight.detach(), "0.bias": -net[0].bias.detach()}
    assert distance.flips(other, train.tensors[0]) == 1
    with pytest.warns(UserWarning, match="100% of the gates"):
        distance.check(other)


def test_saved_and_loaded_it_is_the_same_and_knows_its_anchor(tmp_path):
    net, train = mlp(4, 6, 3), data(4)
    theta = moved(net)
    distance = function_space_distance(net, train, TASK, by="label", outputs=(0, 2))
    distance.save(tmp_path / "fsd")
    again = load_distance(tmp_path / "fsd", net)
    assert float(again(theta)) == float(distance(theta)) and repr(again) == repr(distance)
    assert load_distance(tmp_path / "fsd", net, n_samples=7).drawn().x.shape == (7, 4)
    with pytest.raises(ArtifactMismatch, match="another model"):
        load_distance(tmp_path / "fsd", mlp(4, 6, 3))


def test_bad_options_and_foreign_parameters_are_refused():
    net, train = mlp(4, 6, 3), data(4)
    with pytest.raises(ValueError, match="rho='squared'"):
        function_space_distance(net, train, TASK, method="bgln-d", rho="kl")
    with pytest.raises(ValueError, match="a fit alone, or a model"):
        function_space_distance(net)
    with pytest.raises(ValueError, match="Kept inputs have no group"):
        function_space_distance(net, train, TASK, by="label", keep=5)
    with pytest.raises(ValueError, match="at least 1 for each of 3 groups"):
        function_space_distance(net, train, TASK, by="label", n_samples=2)
    distance = function_space_distance(net, train, TASK)
    with pytest.raises(ValueError, match=r"no parameter 'head\.weight'"):
        distance({"head.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"shape \(3,\) but \(6, 4\)"):
        distance({"0.weight": torch.zeros(3)})
    made = FunctionSpaceDistance(model=net, statistics=collect_statistics(net, TASK, train))
    assert made.facts["made_from"]["model"] == distance.facts["made_from"]["model"]
    others = collect_statistics(mlp(4, 5, 3), TASK, train)
    with pytest.raises(ValueError, match="not of this network"):
        FunctionSpaceDistance(model=net, statistics=others)


def test_regression_is_compared_by_squares():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.randn(30, 3).double()
    distance = function_space_distance(net, (x, x[:, 0]), Regression())
    assert distance.rho == "squared" and float(distance(moved(net))) > 0


def test_the_stored_distance_is_the_true_one_for_any_model():
    net, train = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), data(4)
    theta = moved(net)
    stored = StoredDistance(net, TASK, train, batch_size=7)
    torch.testing.assert_close(stored(theta), true_distance(net, theta, train.tensors[0], "kl"))
    regression = StoredDistance(net, Regression(), (train.tensors[0], net(train.tensors[0])))
    torch.testing.assert_close(regression(theta), true_distance(net, theta, train.tensors[0]))


@pytest.mark.parametrize("kind", ["diagonal", "kfac", "ekfac", "dual", "dense"])
def test_a_quadratic_distance_is_half_the_form_of_the_fit_s_curvature(kind):
    net, train = mlp(3, 4, 3), data(3)
    fit = headwater.fit(net, train, TASK, curvature=kind)
    distance, theta = QuadraticDistance(fit), moved(net)
    v = {k: theta[k] - p.detach() for k, p in net.named_parameters()}
    theta = {k: t.requires_grad_() for k, t in theta.items()}
    value = distance(theta)
    (gradient,) = torch.autograd.grad(value, [theta["0.weight"]])
    product = distance.gauss_newton_product(v)  # of a quadratic it is the gradient
    torch.testing.assert_close(product["0.weight"], gradient, rtol=1e-8, atol=1e-12)
    expected = 0.5 * sum(float((v[k] * product[k]).sum()) for k in v)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-8)
    assert float(distance(net).detach()) == 0 and distance.n_numbers > 0


def test_a_diagonal_one_is_the_penalty_of_elastic_weight_consolidation():
    net, train = mlp(3, 4, 3), data(3)
    distance = QuadraticDistance(headwater.fit(net, train, TASK, curvature="diagonal"))
    assert distance.n_numbers == sum(p.numel() for p in net.parameters())
    name, p = next(iter(net.named_parameters()))
    one = torch.zeros_like(p)
    one[0, 0] = 2.0
    fisher = distance.fit.curvature.spectra()["0"][0, 0]
    assert float(distance({name: p.detach() + one})) == pytest.approx(
        float(0.5 * fisher * 4), rel=1e-6
    )
