import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from headwater.core.examples import TensorExamples
from headwater.core.task import CausalLM, Classification
from headwater.models.vision import mlp
from headwater.training.loop import train
from headwater.training.optimizers import SGD, Adam, AdamW, Stage
from headwater.training.run import Run, train_model
from headwater.training.trajectory import Trajectory
from tests.curvature_cases import TinyLM, Tokens

RULES = [
    SGD(lr=0.1, weight_decay=0.01, batch_size=4, epochs=2),
    Adam(lr=0.01, batch_size=4, epochs=2, schedule="cosine"),
    AdamW(lr=0.01, batch_size=4, epochs=2, warmup=2),
]
every = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def examples(n=14):
    x, y = torch.randn(n, 6, dtype=torch.float64), torch.arange(n) % 3
    return TensorExamples(x, y, ids=[f"e{i}" for i in range(n)])


def net(seed=0):
    return mlp([6, 5, 3], seed=seed).double()


@every
def test_the_plain_loop_is_that_of_stacked_training(rule, tmp_path):
    data, model = examples(), net()
    weights = torch.ones(14, dtype=torch.float64)
    weights[3] = 0
    stacked = train(
        [net()],
        *data.tensors,
        subsets=torch.arange(14)[None],
        seeds=[5],
        optimizer=rule,
        weights=weights[None],
    )
    train_model(model, data, Classification(), rule, seed=5, weights=weights)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), stacked[name][0], rtol=1e-10, atol=1e-12)


@every
def test_a_recorded_run_repeats_itself_bit_by_bit(rule, tmp_path):
    data, model = examples(), net()
    made = train_model(model, data, Classification(), rule, folder=tmp_path, seed=1)
    run = Run(model=net(7), task=Classification(), train=data, trajectory=Trajectory.load(tmp_path))
    again = run.repeat().parameters
    for name, value in model.named_parameters():
        assert torch.equal(again[name], value)
        assert torch.equal(made.load_checkpoint(-1)[name], value)
        assert torch.equal(made.load_checkpoint(0)[name], net().state_dict()[name])
    assert made.steps == run.steps == rule.steps(14)
    assert made.losses[0] == pytest.approx(
        cross_entropy(
            net()(data.tensors[0])[run.batches[0]], data.tensors[1][run.batches[0]]
        ).item()
    )


def test_weights_leave_the_rest_of_the_run_as_it_was(tmp_path):
    data = examples()
    trajectory = train_model(net(), data, Classification(), RULES[0], folder=tmp_path)
    run = Run(model=net(), task=Classification(), train=data, trajectory=trajectory)
    ones = torch.ones(14, dtype=torch.float64)
    for a, b in zip(*(run.repeat(w).parameters.values() for w in (ones, None)), strict=True):
        assert torch.equal(a, b)
    ones[2] = 0
    assert not torch.equal(
        run.repeat(ones).parameters["0.weight"], run.repeat().parameters["0.weight"]
    )


def test_two_stages_are_recorded_with_their_data_and_optimizers(tmp_path):
    data = examples()
    stages = [
        Stage(name="first", optimizer=RULES[0], examples=torch.arange(8)),
        Stage(name="second", optimizer=RULES[2], examples=torch.arange(6, 14)),
    ]
    made = train_model(net(), data, Classification(), stages, folder=tmp_path, checkpoints=4)
    assert [(s.name, s.start, s.stop, s.optimizer) for s in made.stages] == [
        ("first", 0, 4, "SGD"),
        ("second", 4, 8, "AdamW"),
    ]
    assert made.examples(0, 4) == {f"e{i}" for i in range(8)}
    assert made.examples(4) == {f"e{i}" for i in range(6, 14)}
    assert [c.step for c in made.checkpoints] == [0, 2, 4, 6, 8]
    assert [(s.start, s.stop, s.checkpoints, s.stage) for s in made.segments(2)] == [
        (0, 4, (1, 2), 0),
        (4, 8, (3, 4), 1),
    ]
    assert made.checkpoints[-1].lr_sum == pytest.approx(sum(made.lr))
    assert made.horizon == pytest.approx(sum(made.lr[:4]) / 0.1 + sum(made.lr[4:]))


def test_the_optimizers_moments_are_kept_on_request(tmp_path):
    made = train_model(
        net(), examples(), Classification(), RULES[2], folder=tmp_path, keep_optimizer=True
    )
    run = Run(model=net(), task=Classification(), train=examples(), trajectory=made)
    final = run.repeat().optimizer
    kept = made.load_optimizer(-1)
    assert kept.keys() == {"mean", "square"}
    assert kept["square"]["0.weight"].shape == final.moments["square"]["0.weight"].shape
    with pytest.raises(ValueError, match="keep_optimizer=True"):
        made.load_optimizer(0)


def test_losses_can_be_divided_by_tokens(tmp_path):
    data = Tokens([[1, 2, 3, 4], [2, 3], [5, 1, 2]])
    rule = SGD(lr=0.1, batch_size=2, epochs=1)
    made = train_model(TinyLM(), data, CausalLM(), rule, folder=tmp_path, normalize="tokens")
    scored = dict(zip(data.ids, (3, 1, 2), strict=True))
    assert made.normalizers == [sum(scored[i] for i in batch) for batch in made.batches]


def test_data_that_lacks_examples_of_the_run_is_refused(tmp_path):
    data = examples()
    made = train_model(net(), data, Classification(), RULES[0], folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"saw 1 examples that the data does not have, such as 'e3'"
    ):
        part = data.subset([i for i in range(14) if i != 3])
        Run(model=net(), task=Classification(), train=part, trajectory=made)


def test_a_record_without_initial_parameters_is_refused():
    bare = Trajectory(optimizer="SGD", lr=[], weight_decay=0.0, batches=[], losses=[], seed=0)
    with pytest.raises(ValueError, match="no initial parameters"):
        Run(model=net(), task=Classification(), train=examples(), trajectory=bare)


def test_training_that_diverges_names_the_step():
    wild = SGD(lr=1e200, batch_size=4, epochs=2)
    with pytest.raises(FloatingPointError, match=r"loss of step \d is (nan|inf); lower lr"):
        train_model(net(), examples(), Classification(), wild)


def test_frozen_parameters_stay_and_are_not_kept(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    made = train_model(model, examples(), Classification(), RULES[0], folder=tmp_path)
    assert torch.equal(model[0].weight, before)
    assert made.trained == ["2.weight", "2.bias"]


def test_another_model_is_refused(tmp_path):
    data = examples()
    made = train_model(net(), data, Classification(), RULES[0], folder=tmp_path)
    run = Run(model=mlp([6, 4, 3]).double(), task=Classification(), train=data, trajectory=made)
    with pytest.raises(ValueError, match=r"trained '0.bias' of shape \(5,\), which the model"):
        run.initial()


def test_a_weight_an_example_serves_for_all_its_tokens(tmp_path):
    data, model = (
        Tokens([[1, 2, 3, 4], [2, 4, 1, 3], [5, 1, 2, 6], [3, 1, 4, 1]]),
        TinyLM().double(),
    )
    rule = SGD(lr=0.1, batch_size=3, epochs=1)  # as many examples as scored positions
    made = train_model(model, data, CausalLM(), rule, folder=tmp_path, normalize="tokens")
    run = Run(model=model, task=CausalLM(), train=data, trajectory=made, per_token=True)
    each = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    one, several = (run.repeat(w).parameters for w in (each, each[:, None].expand(-1, 4)))
    for name, value in one.items():
        torch.testing.assert_close(value, several[name])


def test_weights_are_one_for_each_example_and_make_another_run(tmp_path):
    data, rule = examples(), RULES[0]

    def made_from(weights, folder):
        return train_model(
            net(), data, Classification(), rule, folder=tmp_path / folder, weights=weights
        ).made_from

    doubled = torch.ones(14, dtype=torch.float64).index_fill(0, torch.tensor([3]), 2.0)
    assert made_from(doubled, "a") == made_from(doubled, "b") != made_from(None, "c")
    with pytest.raises(ValueError, match="a weight for each of 14 examples; got 15"):
        train_model(net(), data, Classification(), rule, weights=torch.ones(15))
