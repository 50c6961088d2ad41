"""A Trainer's live index: rows at their steps, whatever the Trainer does to the loss, and through a resumed run."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from headwater.core.examples import DatasetExamples
from headwater.core.fit import fit
from headwater.core.index import GradientIndex, LoGra
from headwater.core.task import CausalLM
from headwater.training.live import index_trainer
from tests.curvature_cases import autograd_rows
from tests.language_cases import llama

KIND = LoGra(rank=2, damping=0.1)
N = 11

pytestmark = pytest.mark.filterwarnings("ignore")


class Texts(torch.utils.data.Dataset):
    """Sequences of 4 to 7 tokens."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(2, 20, (4 + i % 4,), generator=generator) for i in range(N)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def collate(features):
    long = max(len(f["input_ids"]) for f in features)
    rows = [F.pad(f["input_ids"], (0, long - len(f["input_ids"])), value=1) for f in features]
    real = [F.pad(torch.ones_like(f["labels"]), (0, long - len(f["labels"]))) for f in features]
    ids, mask = torch.stack(rows), torch.stack(real)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def arranged(folder, **options):
    """A Trainer, and a fit of its model."""
    model, data = llama(layers=1).double(), Texts()
    names = [f"t{i}" for i in range(N)]
    examples = DatasetExamples(
        data, collate=collate, ids=names, lengths=[len(r) for r in data.rows]
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"per_device_train_batch_size": 2, "save_strategy": "no", "num_train_epochs": 1}
        | options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    return trainer, fit(model, examples, CausalLM(), curvature="identity")


class Parameters(TrainerCallback):
    """The parameters before each step."""

    def __init__(self):
        self.at = {}

    def on_step_begin(self, args, state, control, model=None, **_):
        own = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.at[state.global_step] = own


def assert_true(fitted, index, at):
    """Each row is the gradient of its example's own summed loss at the parameters of its step."""
    projection = KIND.spaces(fitted)[0].projection
    positions = index.positions_of(fitted.train.ids)
    steps, rows = index.metadata(positions)["step"], index.rows(positions)
    for i, step in enumerate(steps):
        fitted.model.load_state_dict(at[step], strict=False)
        whole = autograd_rows(fitted, fitted.task.loss, fitted.train.subset([i]))
        parts = []
        for layer in fitted.followed:
            G = whole[layer.name].unflatten(1, layer.block)
            P_out, P_in = (None if p is None else p.double() for p in projection.sides(layer))
            G = G if P_out is None else P_out @ G
            parts.append((G if P_in is None else G @ P_in.mT).flatten(1))
        torch.testing.assert_close(rows[i], torch.cat(parts, 1)[0].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("counts", [True, False])
def test_rows_are_gradients_of_single_examples_at_their_step(tmp_path, accumulate, counts):
    trainer, fitted = arranged(tmp_path, gradient_accumulation_steps=accumulate)
    trainer.model_accepts_loss_kwargs = (
        counts  # whether tokens are counted over all passes of a step
    )
    parameters = Parameters()
    trainer.add_callback(parameters)
    watcher = index_trainer(trainer, fitted, tmp_path / "index", kind=KIND, dtype="float32")
    trainer.train()
    index = watcher.live.index
    assert len(index) == N and GradientIndex.verify(tmp_path / "index") == []
    steps = index.metadata(index.positions_of(fitted.train.ids))["step"]
    assert sorted(set(steps)) == list(range(trainer.state.global_step))
    assert_true(fitted, index, parameters.at)


def test_the_run_is_the_one_without_an_index(tmp_path):
    plain, _ = arranged(tmp_path / "a")
    plain.train()
    trainer, fitted = arranged(tmp_path / "b")
    index_trainer(trainer, fitted, tmp_path / "index", kind=KIND)
    trainer.train()
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True)
    )


class Stop(TrainerCallback):
    """Ends a run as a crash would."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_from_a_checkpoint_keeps_its_rows(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    options |= {"per_device_train_batch_size": 3}
    whole, fitted = arranged(tmp_path / "whole", **options)
    expected = index_trainer(whole, fitted, tmp_path / "expected", kind=KIND, keep="all")
    whole.train()
    trainer, fitted = arranged(tmp_path, **options)
    index_trainer(trainer, fitted, tmp_path / "index", kind=KIND, keep="all")
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again, fitted = arranged(tmp_path, **options)
    resumed = index_trainer(again, fitted, tmp_path / "index", kind=KIND, keep="all")
    again.train(resume_from_checkpoint=True)
    ours, theirs = resumed.live.index, expected.live.index
    assert ours.ids() == theirs.ids()
    assert len(ours) == 2 * N
    torch.testing.assert_close(
        ours.rows(range(2 * N)), theirs.rows(range(2 * N)), rtol=0.02, atol=0.02
    )


def test_other_losses_models_and_data_are_refused(tmp_path):
    trainer, fitted = arranged(tmp_path / "a", label_smoothing_factor=0.3)
    with pytest.raises(ValueError, match="Label smoothing"):
        index_trainer(trainer, fitted, tmp_path / "index", kind=KIND)
    trainer.label_smoother = None
    trainer.compute_loss_func = lambda outputs, labels, **_: outputs.logits.square().mean()
    trainer.model_accepts_loss_kwargs = False
    index_trainer(trainer, fitted, tmp_path / "index", kind=KIND)
    with pytest.raises(ValueError, match="but the examples' losses divided by"):
        trainer.train()
    assert not any(m._forward_hooks for m in fitted.model.modules())
    trainer, _ = arranged(tmp_path / "b")
    with pytest.raises(ValueError, match="another model"):
        index_trainer(trainer, fitted, tmp_path / "other")
    trainer, fitted = arranged(tmp_path / "c")
    trainer.train_dataset.rows.pop()
    with pytest.raises(ValueError, match="The fit has 11 examples and the Trainer 10"):
        index_trainer(trainer, fitted, tmp_path / "other")
