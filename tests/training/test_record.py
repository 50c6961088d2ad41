import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from headwater.core.examples import TensorExamples
from headwater.core.files import ArtifactMismatch
from headwater.core.task import Classification
from headwater.models.vision import mlp
from headwater.training.optimizers import SGD, Adam, AdamW
from headwater.training.record import record, record_trainer
from headwater.training.run import Run, train_model
from headwater.training.trajectory import Trajectory
from tests.language_cases import llama

IDS = [f"e{i}" for i in range(10)]
PAIRS = [
    (
        SGD(lr=0.1, momentum=0.8, weight_decay=0.1, batch_size=4, epochs=3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.1),
    ),
    (Adam(lr=0.01, batch_size=4, epochs=3), lambda p: torch.optim.Adam(p, lr=0.01)),
    (
        AdamW(lr=0.01, betas=(0.7, 0.9), batch_size=4, epochs=3),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.7, 0.9)),
    ),
]


def examples():
    return TensorExamples(torch.randn(10, 6, dtype=torch.float64), torch.arange(10) % 3, ids=IDS)


def net():
    return mlp([6, 5, 3]).double()


def follow(plan: Trajectory, data, model, optimizer, recorder, *, told_first=False):
    """A user's own loop, with the order and rates of a plan."""
    for names, lr in zip(plan.batches, plan.lr, strict=True):
        index = torch.tensor([IDS.index(name) for name in names])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = cross_entropy(model(data.tensors[0][index]), data.tensors[1][index])
        loss.backward()
        if told_first:
            recorder.step(index, loss)
        optimizer.step()
        if not told_first:
            recorder.step(index, loss)


@pytest.mark.parametrize("told_first", [False, True])
@pytest.mark.parametrize(("rule", "make"), PAIRS, ids=["SGD", "Adam", "AdamW"])
def test_a_users_own_loop_is_recorded_as_the_plain_loop_is(rule, make, told_first, tmp_path):
    data, model, other = examples(), net(), net()
    ours = train_model(
        other,
        data,
        Classification(),
        rule,
        folder=tmp_path / "ours",
        keep_optimizer=True,
        checkpoints=3,
    )
    optimizer = make(model.parameters())
    with record(
        model, optimizer, tmp_path / "theirs", every=3, ids=IDS, keep_optimizer=True
    ) as recorder:
        follow(ours, data, model, optimizer, recorder, told_first=told_first)
    theirs = recorder.trajectory
    assert theirs == Trajectory.load(tmp_path / "theirs")
    assert (theirs.lr, theirs.batches, theirs.normalizers) == (
        ours.lr,
        ours.batches,
        ours.normalizers,
    )
    assert theirs.losses == pytest.approx(ours.losses)
    assert theirs.stages == ours.stages
    assert theirs.distance == pytest.approx(ours.distance)
    assert (
        [c.step for c in theirs.checkpoints] == [c.step for c in ours.checkpoints] == [0, 3, 6, 9]
    )
    for i in range(4):
        for name, value in ours.load_checkpoint(i).items():
            torch.testing.assert_close(
                theirs.load_checkpoint(i)[name], value, rtol=1e-9, atol=1e-11
            )
    for moment, part in ours.load_optimizer(-1).items():
        for name, value in part.items():
            actual = theirs.load_optimizer(-1)[moment][name]
            torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-13)
    run = Run(model=net(), task=Classification(), train=data, trajectory=theirs)
    for name, value in run.repeat().parameters.items():
        torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=1e-9, atol=1e-11)


def test_the_first_and_last_parameters_are_always_kept(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, tmp_path, every=2) as recorder:
        for step in range(3):
            optimizer.step()
            recorder.step([step])
    assert [c.step for c in recorder.trajectory.checkpoints] == [0, 2, 3]
    assert recorder.trajectory.batches == [["0"], ["1"], ["2"]]


def test_steps_that_are_not_told_of_are_an_error(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(ValueError, match="made 2 steps and 1 were told of"),
        record(model, optimizer, tmp_path) as recorder,
    ):
        optimizer.step()
        optimizer.step()
        recorder.step(["a"])
    assert not (tmp_path / "trajectory.json").exists()


def test_a_loop_that_fails_leaves_no_record_and_no_hook(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), record(model, optimizer, tmp_path):
        raise KeyError
    assert not (tmp_path / "trajectory.json").exists()
    assert not optimizer._optimizer_step_post_hooks


def test_a_folder_that_holds_a_run_is_refused_at_the_start(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, tmp_path):
        pass
    before = (tmp_path / "trajectory.json").read_bytes()
    said = r"finished run \(trajectory.json\), which would be"
    with pytest.raises(ArtifactMismatch, match=said), record(model, optimizer, tmp_path):
        pytest.fail("went on")
    with pytest.raises(ArtifactMismatch, match="finished run"):
        record_trainer(None, tmp_path)
    assert (tmp_path / "trajectory.json").read_bytes() == before
    assert not optimizer._optimizer_step_post_hooks


def test_checkpoints_of_a_loop_that_failed_may_be_overwritten(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), record(model, optimizer, tmp_path):
        raise KeyError
    with torch.no_grad():
        model[0].weight.add_(1)
    with record(model, optimizer, tmp_path) as recorder:
        pass
    assert torch.equal(recorder.trajectory.load_checkpoint(0)["0.weight"], model[0].weight)


def test_a_run_that_can_go_on_is_not_overwritten(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_model(
            net(), examples(), Classification(), PAIRS[0][0], folder=tmp_path, progress=stop
        )
    model, said = net(), "unfinished run that can go on"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArtifactMismatch, match=said), record(model, optimizer, tmp_path):
        pytest.fail("went on")


def test_stages_follow_each_other(tmp_path):
    model = net()
    first = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.AdamW(model.parameters(), lr=0.01)
    with record(model, first, tmp_path) as recorder:
        first.step()
        recorder.step(["a"])
        recorder.stage("second", second)
        for _ in range(2):
            second.step()
            recorder.step(["b"])
    made = recorder.trajectory
    assert [(s.optimizer, s.start, s.stop) for s in made.stages] == [("SGD", 0, 1), ("AdamW", 1, 3)]
    assert made.lr == [0.1, 0.01, 0.01]
    assert [c.step for c in made.checkpoints] == [0, 1, 3]


def test_settings_that_the_plain_loop_lacks_are_told(tmp_path):
    model = net()
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.1},
        {"params": [model[0].bias, *model[2].parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    with record(model, optimizer, tmp_path) as recorder:
        optimizer.step()
        recorder.step(["a"])
        for group in optimizer.param_groups:
            group["momentum"] = 0.5
        optimizer.step()
        recorder.step(["a"])
    stage = recorder.trajectory.stages[0]
    assert stage.other == {
        "nesterov": True,
        "differs_between_groups": ["weight_decay"],
        "varies": ["momentum"],
    }
    with pytest.raises(ValueError, match="'nesterov': True"):
        stage.rule()


class Texts(torch.utils.data.Dataset):
    def __init__(self, n=7):
        self.rows = torch.randint(1, 7, (n, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_of_transformers_records_its_run(tmp_path, accumulate):
    from transformers import Trainer, TrainingArguments

    model, seen = llama(), []
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        max_grad_norm=0.0,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    forward = type(model).forward

    def watched(self, input_ids=None, **kwargs):
        seen.append(input_ids.clone())
        return forward(self, input_ids=input_ids, **kwargs)

    model.forward = watched.__get__(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = [f"t{i}" for i in range(7)]
    record_trainer(trainer, tmp_path / "run", every=2, ids=names)
    trainer.train()
    made = Trajectory.load(tmp_path / "run")
    assert made.steps == trainer.state.global_step == (8 if accumulate == 1 else 4)
    rows = [Texts().rows[names.index(name)] for batch in made.batches for name in batch]
    assert torch.equal(torch.stack(rows), torch.cat(seen))
    assert made.normalizers == [6.0 * len(batch) for batch in made.batches]
    assert made.losses == pytest.approx(
        [e["loss"] for e in trainer.state.log_history if "loss" in e]
    )
    assert made.optimizer == "AdamW"
    assert made.lr[0] == pytest.approx(1e-2)
    assert made.lr[-1] < made.lr[0]
    for name, value in made.load_checkpoint(0).items():
        assert torch.equal(value, start[name])
    for name, value in made.load_checkpoint(-1).items():
        assert torch.equal(value, model.get_parameter(name))


def test_a_trainer_that_loads_in_other_processes_is_refused(tmp_path):
    class Arguments:
        dataloader_num_workers = 2

    class Trainer:
        args = Arguments()

    with pytest.raises(ValueError, match=r"dataloader_num_workers=0 \(now 2\)"):
        record_trainer(Trainer(), tmp_path)


def test_tied_parameters_are_kept_once(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, tmp_path) as recorder:
        optimizer.step()
        recorder.step(["a"])
    assert recorder.trajectory.trained == ["0.weight", "0.bias", "1.bias"]
