"""A fit is saved, recognised, refused, resumed; it knows its damping."""

import copy

import pytest
import torch
from torch import nn

from headwater.core import checkpoint as saving
from headwater.core.curvature import EKFAC, KFAC, Dense, Diagonal, Dual, Identity
from headwater.core.damping import Damping, evidence
from headwater.core.examples import DatasetExamples, TensorExamples
from headwater.core.files import ArtifactError, ArtifactMismatch
from headwater.core.fit import fit, fits_at, load
from headwater.core.task import Classification, FunctionTask, Regression
from headwater.trace.influence import Influence
from tests.curvature_cases import case

METHODS = [Identity(), Diagonal(), KFAC(), EKFAC(), Dual(), Dense()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
@pytest.mark.parametrize("name", ["mlp", "lm"])
def test_comes_back_from_its_folder(name, method, tmp_path):
    found = case(name)
    made = found.fit(method, folder=tmp_path / "fit", batch_size=7, weight_decay=0.1)
    again = load(tmp_path / "fit", found.model, found.train, found.task)
    assert again.followed == made.followed and again.facts == made.facts
    assert (again.batch_size, again.batch_tokens) == (7, 4096)
    assert again.curvature.facts == made.curvature.facts
    mine, theirs = again.curvature.tensors(), made.curvature.tensors()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert (
        again.damping() == made.damping() == Damping(0.1, source="weight decay of the training run")
    )


def test_a_finished_fit_is_read_and_not_made_again(tmp_path):
    found, passes = case("mlp"), []
    options = {"folder": tmp_path / "fit", "progress": lambda *step: passes.append(step)}
    first = found.fit(EKFAC(), **options)
    n = len(passes)
    again = found.fit(EKFAC(), **options)
    assert n and len(passes) == n and again.facts["seconds"] == first.facts["seconds"]
    found.fit(EKFAC(seed=1), **options)  # other options replace it
    assert len(passes) > n
    assert found.fit(EKFAC(seed=1), **options).facts["options"]["curvature"]["seed"] == 1


def test_an_empty_folder_will_do(tmp_path):
    assert (
        case("mlp").fit(Identity(), folder=tmp_path).facts["options"]["curvature"]["kind"]
        == "identity"
    )
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))  # nothing unfinished is left


def test_another_model_task_or_other_data_are_refused_by_name(tmp_path):
    found = case("mlp")
    found.fit(Identity(), folder=tmp_path / "fit")
    other = case("mlp", seed=1)
    for model, data, task, named in (
        (other.model, found.train, found.task, "another model"),
        (found.model, other.train, found.task, "other data"),
        (found.model, found.train, FunctionTask(predict_with=found.task.predict), "another task"),
        (other.model, other.train, found.task, "another model.*and other data"),
    ):
        with pytest.raises(ArtifactMismatch, match=f"{named}.*choose another folder"):
            fit(model, data, task, curvature=Identity(), folder=tmp_path / "fit")
        with pytest.raises(ArtifactMismatch, match=named):
            load(tmp_path / "fit", model, data, task)
    with pytest.raises(ArtifactError):
        load(tmp_path / "missing", found.model, found.train, found.task)


class Killed(BaseException):
    """Not an Exception, like the end of a process."""


@pytest.mark.parametrize(
    ("method", "stop"),
    [
        (EKFAC(fisher="exact", cut=0.2), 3),
        (EKFAC(fisher="exact", cut=0.2), 9),  # in the second stage
        (EKFAC(tolerance=0.01), 9),
        (Diagonal(), 3),
        (Dual(cut=0.2), 3),
        (KFAC(), 5),
    ],
    ids=lambda x: x.kind if hasattr(x, "kind") else str(x),
)
def test_a_killed_fit_goes_on_to_the_same_bits(method, stop, tmp_path, monkeypatch):
    found = case("mlp")
    whole = found.fit(method, batch_size=3)
    clock = iter(range(0, 10**9, 100))
    monkeypatch.setattr(saving.time, "monotonic", lambda: next(clock))  # saves after every batch
    monkeypatch.setattr(saving, "_WORK_PER_SAVE", 0)
    seen = []

    def kill(done, total, note):
        seen.append((done, note))
        if len(seen) == stop:
            raise Killed

    try:
        found.fit(method, batch_size=3, folder=tmp_path / "fit", progress=kill)
    except Killed:
        resumed = []
        made = found.fit(
            method, batch_size=3, folder=tmp_path / "fit", progress=lambda *s: resumed.append(s)
        )
        assert (
            resumed[0][0] == seen[-1][0] and resumed[0][2] == seen[-1][1]
        )  # one batch is run again
    else:
        pytest.fail("the fit was to be killed")
    mine, theirs = made.curvature.tensors(), whole.curvature.tensors()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert made.curvature.facts == whole.curvature.facts
    assert not (tmp_path / ".fit.unfinished").exists()


def test_a_killed_fit_of_other_options_is_not_taken_up(tmp_path):
    found = case("mlp")

    def kill(done, total, note):
        if note == "eigenvalues":
            raise Killed

    with pytest.raises(Killed):
        found.fit(EKFAC(), folder=tmp_path / "fit", progress=kill)
    notes = []
    found.fit(
        EKFAC(seed=1), folder=tmp_path / "fit", progress=lambda d, t, note: notes.append(note)
    )
    assert "moments" in notes
    notes.clear()
    found.fit(EKFAC(draws=2), folder=tmp_path / "fit2")
    with pytest.raises(Killed):
        found.fit(EKFAC(), folder=tmp_path / "fit3", progress=kill)
    found.fit(EKFAC(), folder=tmp_path / "fit3", progress=lambda d, t, note: notes.append(note))
    assert set(notes) == {"eigenvalues"}  # the finished stage is not run again


def test_the_damping_of_a_run():
    found = case("mlp")
    plain = found.fit(EKFAC(), weight_decay=0.02)
    assert (
        plain.damping()
        == plain.damping("weight_decay")
        == Damping(0.02, source="weight decay of the training run")
    )
    assert plain.damping(0.5) == Damping(0.5) and plain.damping("0.1 relative").unit == "relative"
    mean = plain.curvature.mean_eigenvalue
    assert plain.damping_ratio(Damping(0.3, "relative")) == pytest.approx(0.3)
    assert plain.damping_ratio(Damping(0.3)) == pytest.approx(0.3 / mean)


def test_adaptive_optimizers_and_unknown_runs_take_the_evidence():
    found = case("mlp")
    distance = sum(float(p.detach().square().sum()) for p in found.model.parameters())
    adaptive = found.fit(EKFAC(), weight_decay=0.02, adaptive=True)
    expected = evidence(adaptive.curvature.spectra().values(), n=18, distance=distance)
    for fitted in (adaptive, found.fit(EKFAC())):
        assert fitted.damping().value == pytest.approx(expected)
        assert fitted.damping().source == "evidence of the trained parameters"
    moved = found.fit(EKFAC(), distance=4 * distance)
    assert moved.damping().value < expected
    assert adaptive.damping("weight_decay").value == 0.02  # who asks for it gets it


def test_a_weight_decay_that_is_not_recorded_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match=r"not recorded; pass weight_decay=… to headwater.fit, or"):
        case("mlp").fit(Identity()).damping("weight_decay")


def test_auto_takes_the_dual_form_where_its_rows_fit():
    assert case("mlp").fit("auto").curvature.kind == "dual"
    assert case("lm").fit("auto").facts["options"]["curvature"]["kind"] == "ekfac"
    with pytest.raises(ValueError, match=r"among identity, diagonal.*or 'auto'; got 'best'"):
        case("mlp").fit("best")


def test_a_mean_over_the_batch_is_refused():
    found = case("mlp")
    mean = FunctionTask(loss_with=lambda m, b: found.task.loss(m, b).mean().expand(len(b[0])))
    with pytest.raises(ValueError, match="mean over the batch"):
        fit(found.model, found.train, mean)


def test_says_what_it_is():
    text = repr(case("mlp").fit(EKFAC()))
    assert (
        "ekfac curvature of Sequential, 2 layers, 53 parameters = 100.0 %" in text
        and "18 training" in text
    )


def test_one_output_regression_and_skipped_layers():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    train = TensorExamples(torch.randn(6, 3).double(), torch.randn(6).double())
    fitted = fit(model, train, Regression(), skip=["0"])
    assert [layer.name for layer in fitted.followed] == ["1"] and fitted.n_rows == 6


def test_choosing_a_curvature_leaves_a_training_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    model.double().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = (torch.randn(20, 4).double(), torch.randint(2, (20,)))
    fit(model, data, Classification())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["ekfac", "dual", "diagonal"])
def test_one_example_has_scores_and_no_interval(kind):
    model = nn.Linear(3, 2).double()
    data = (torch.randn(1, 3).double(), torch.tensor([1]))
    fitted = fit(model, data, Classification(), curvature=kind)
    scores = Influence(damping=0.1).attribute(fitted, data)
    assert bool(torch.isfinite(scores.values).all()) and scores.low is None


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_without_an_output_is_named_before_anything_runs(label):
    x, y = torch.randn(30, 3), torch.randint(4, (30,))
    y[17] = label
    model, steps = nn.Linear(3, 4), []
    with pytest.raises(ValueError, match=rf"label of example '17' is {label}, .* has 4 outputs"):
        fit(model, (x, y), Classification(), progress=lambda *step: steps.append(step))
    assert not steps
    some = TensorExamples(x[16:], y[16:], ids=[f"image {i}" for i in range(16, 30)])
    with pytest.raises(ValueError, match="example 'image 17'"):  # in the first few
        fit(model, some, Classification())


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_label_without_an_output_is_named_in_data_that_are_not_in_memory(fisher):
    data = [(torch.randn(3), torch.tensor(i % 4 if i != 17 else 9)) for i in range(30)]
    examples = DatasetExamples(data, ids=[f"image {i}" for i in range(30)])
    with pytest.raises(ValueError, match=r"label of example 'image 17' is 9, .* 4 outputs"):
        fit(nn.Linear(3, 4), examples, Classification(), curvature=EKFAC(fisher=fisher))


def test_an_empty_batch_is_refused():
    data = torch.randn(30, 3), torch.randint(4, (30,))
    with pytest.raises(ValueError, match="at least 1; got 256 and 0"):
        fit(nn.Linear(3, 4), data, Classification(), batch_tokens=0)


def test_fits_at_checkpoints_share_the_weights_that_stay():
    found = case("mlp")
    fitted = found.fit(Identity())
    name, *others = dict(found.model.named_parameters())
    before = found.model.get_parameter(name).detach().clone()
    at = fits_at(fitted, [{name: before + 1}])[0].model
    assert torch.equal(at.get_parameter(name), before + 1)
    assert torch.equal(found.model.get_parameter(name), before)
    for other in others:
        one, two = at.get_parameter(other), found.model.get_parameter(other)
        assert one is not two and one.data_ptr() == two.data_ptr()


def test_fits_at_checkpoints_have_their_weights_and_nothing_else_new():
    found = case("mlp")
    fitted = found.fit(EKFAC())
    checkpoints = [
        {k: v * scale for k, v in found.model.state_dict().items()} for scale in (1.0, 2.0)
    ]
    fits = fits_at(fitted, checkpoints)
    assert len(fits) == 2 and len(fits[1:]) == 1
    for one, checkpoint in zip(fits, checkpoints, strict=True):
        assert one.model is not found.model and one.train is fitted.train
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, checkpoint[name])
    assert fits[0].made_from == fitted.made_from and fits[1].made_from != fitted.made_from
    part = fits_at(fitted, [{"0.weight": torch.zeros(5, 6)}])[0]
    assert torch.equal(part.model[2].weight, found.model[2].weight)
    assert not part.model[0].weight.any() and bool(found.model[0].weight.any())


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"3.weight": torch.zeros(2)}, "it has 3.weight"),
        ({"0.weight": torch.zeros(2, 2)}, r"it has 0.weight \(2, 2\)"),
        ({}, "none of the followed weights"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        fits_at(case("mlp").fit(EKFAC()), [checkpoint])[0]


def test_weights_that_change_after_the_fit_are_noticed_and_the_same_weights_elsewhere_are_not():
    found = case("mlp")
    fitted = found.fit(EKFAC())
    before = copy.deepcopy(found.model.state_dict())
    found.model.load_state_dict(before)  # written in place, to the same
    Influence(damping=0.1).attribute(fitted, found.query)
    with torch.no_grad():
        found.model[0].weight.mul_(2)
    with pytest.raises(ArtifactMismatch, match=r"changed after the fit was made \(0\.weight among"):
        Influence(damping=0.1).attribute(fitted, found.query)
    found.model.load_state_dict(before)
    Influence(damping=0.1).attribute(fitted, found.query)
