import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import Identity
from headwater.core.files import ArtifactMismatch
from headwater.core.prediction import IGNORE
from headwater.core.task import CausalLM
from headwater.data.text import Records
from headwater.data.tokens import tokenize
from headwater.models.language import LanguageModel, load_language_model
from headwater.trace import Unrolling
from headwater.training import finetune as module
from headwater.training.finetune import batches, finetune
from headwater.training.run import Run
from headwater.training.trajectory import Trajectory
from tests.language_cases import WORDS, gpt2, llama, saved, tokenizer

pytestmark = pytest.mark.thorough

OPTIONS = {"epochs": 2, "batch_tokens": 24, "lr": 1e-2, "lora_rank": 2, "warmup": 1}


def texts(n: int = 10):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    words = [
        [WORDS[i] for i in torch.randint(len(WORDS), (k,), generator=generator)] for k in lengths
    ]
    records = Records(ids=[f"t{i}" for i in range(n)], texts=[" ".join(each) for each in words])
    return tokenize(records, tokenizer())


def tiny(model=None, *, path="model") -> LanguageModel:
    return LanguageModel(
        model=model or llama(), tokenizer=tokenizer(), context_length=32, path=path
    )


@pytest.fixture
def language(tmp_path) -> LanguageModel:
    return saved(tmp_path / "model")


def trained(made) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in made.language.model.named_parameters() if p.requires_grad}


def mean_loss(model, examples) -> float:
    batch = examples.batch(range(len(examples)))
    n = (batch["labels"][:, 1:] != IGNORE).sum()
    return float(CausalLM().loss(model, batch).detach().sum() / n)


class Killed(BaseException):
    """Stands for whatever ends a process at once."""


def killed_at(step: int):
    def progress(done: int, total: int, note: str) -> None:
        if done == step:
            raise Killed

    return progress


# What it computes


@pytest.mark.parametrize("weights", [{}, {"t1": 0.0, "t4": 2.0, "t7": -0.5}])
def test_adamw_steps_are_those_of_the_equations(weights, language, tmp_path):
    """The whole run, written out with the formulas of decoupled weight decay."""
    examples, first = texts(), 1
    language = replace(language, model=llama(dtype=torch.float64))
    made = finetune(
        language,
        examples,
        out=tmp_path / "out",
        **OPTIONS | {"lora_rank": None},
        layers_from=first,
        weight_decay=0.1,
        weights=weights,
    )
    model, run = llama(dtype=torch.float64), made.trajectory
    theta = {n: p for n, p in model.named_parameters() if n in run.trained}
    m = {n: torch.zeros_like(p) for n, p in theta.items()}
    v = {n: torch.zeros_like(p) for n, p in theta.items()}
    n_scored = sum(length - 1 for length in examples.lengths)
    for k, (names, lr) in enumerate(zip(run.batches, run.lr, strict=True), start=1):
        loss = sum(
            weights.get(name, 1.0)
            * CausalLM().loss(model, examples.batch([examples.ids.index(name)])).sum()
            for name in names
        ) / (n_scored / (run.steps / 2))
        for (name, p), g in zip(
            theta.items(), torch.autograd.grad(loss, list(theta.values())), strict=True
        ):
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            step = (m[name] / (1 - 0.9**k)) / ((v[name] / (1 - 0.999**k)).sqrt() + 1e-8)
            with torch.no_grad():
                p.sub_(lr * (0.1 * p + step))
    for name, p in made.language.model.named_parameters():
        # Batched and single passes differ by rounding, which Adam's division lets grow a little.
        torch.testing.assert_close(p, model.get_parameter(name), rtol=1e-7, atol=1e-9)
    distance = sum(
        (theta[n] - llama(dtype=torch.float64).get_parameter(n)).square().sum() for n in theta
    )
    assert run.distance == pytest.approx(distance.item(), rel=1e-6)


def test_the_learning_rate_rises_then_falls_to_zero(language, tmp_path):
    lr = finetune(language, texts(), out=tmp_path / "out", **OPTIONS | {"warmup": 2}).trajectory.lr
    n = len(lr)
    assert lr[0] == pytest.approx(1e-2 / 3)
    assert lr[1] == pytest.approx(1e-2 * (2 / 3) * (1 - 1 / n))
    assert lr[2:] == pytest.approx([1e-2 * (1 - k / n) for k in range(2, n)])


@pytest.mark.parametrize("model", [llama, gpt2])
def test_adapters_lower_the_loss_and_leave_the_given_model_alone(tmp_path, model):
    language, examples = tiny(model(), path=tmp_path), texts()
    before = {n: p.clone() for n, p in language.model.named_parameters()}
    made = finetune(
        language,
        examples,
        out=tmp_path / "out",
        **OPTIONS | {"epochs": 15, "lora_rank": 4, "lr": 3e-2},
    )
    assert mean_loss(made.language.model, examples) < mean_loss(language.model, examples) - 0.3
    assert {n for n, _ in language.model.named_parameters()} == before.keys()
    for name, p in language.model.named_parameters():
        assert p.requires_grad
        assert torch.equal(p, before[name])


def test_the_backward_pass_stops_at_the_first_adapted_block(language, tmp_path, monkeypatch):
    seen: dict[int, bool] = {}
    step = nn.Module.__call__

    def record(self, *inputs, **options):
        out = step(self, *inputs, **options)
        if type(self).__name__ == "LlamaDecoderLayer" and torch.is_grad_enabled():
            hidden = out[0] if isinstance(out, tuple) else out
            seen[self.self_attn.layer_idx] = hidden.requires_grad
        return out

    monkeypatch.setattr(nn.Module, "__call__", record)
    made = finetune(language, texts(), out=tmp_path / "out", **OPTIONS, layers_from=2)
    assert seen == {0: False, 1: False, 2: True}
    assert made.trajectory.trained == list(trained(made))
    assert all(".layers.2." in name for name in made.trajectory.trained)
    assert len(trained(made)) == 2 * 7  # A and B of q, k, v, o, gate, up, down


def test_layers_are_chosen_by_name_or_pattern(language, tmp_path):
    made = finetune(language, texts(), out=tmp_path / "a", **OPTIONS, target_modules=["q_proj"])
    assert len(trained(made)) == 2 * 3
    made = finetune(language, texts(), out=tmp_path / "b", **OPTIONS, target_modules=["*.1.mlp.*"])
    assert len(trained(made)) == 2 * 3
    with pytest.raises(ValueError, match=r"no linear layers of c_attn from block 0 on"):
        finetune(language, texts(), out=tmp_path / "c", **OPTIONS, target_modules=["c_attn"])


@pytest.mark.parametrize("rank", [2, None])
def test_what_is_saved_loads_as_the_same_model(language, tmp_path, rank):
    examples = texts()
    made = finetune(language, examples, out=tmp_path / "out", **OPTIONS | {"lora_rank": rank})
    loaded = load_language_model(tmp_path / "out")
    batch = examples.batch(range(len(examples)))
    assert torch.equal(
        CausalLM().loss(loaded.model, batch), CausalLM().loss(made.language.model, batch)
    )
    assert (loaded.path, made.language.path) == (tmp_path / "out", tmp_path / "out")
    assert (loaded.base_path is None) == (rank is None)
    assert not [
        p.name for p in (tmp_path / "out").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")
    ]


# Its order, its record


def test_every_epoch_shows_every_example_once_within_the_token_budget():
    examples = texts(40)
    for epoch in range(3):
        found = list(batches(examples, tokens=24, seed=0, epoch=epoch))
        assert sorted(i for batch in found for i in batch) == list(range(40))
        assert all(len(b) * max(examples.lengths[i] for i in b) <= 24 for b in found)
        assert found == list(batches(examples, tokens=24, seed=0, epoch=epoch))
    orders = [
        list(batches(examples, tokens=24, seed=s, epoch=e)) for s, e in [(0, 0), (0, 1), (1, 0)]
    ]
    assert len({str(order) for order in orders}) == 3
    assert len({len(order) for order in orders}) == 1  # so that epochs have equal steps


def test_an_example_beyond_the_budget_is_a_batch_of_its_own():
    examples = texts(5)
    assert sorted(map(len, batches(examples, tokens=1, seed=0, epoch=0))) == [1] * 5


def test_the_record_tells_the_run(language, tmp_path):
    calls = []
    made = finetune(
        language, texts(), out=tmp_path / "out", **OPTIONS, progress=lambda *c: calls.append(c)
    )
    run = Trajectory.load(tmp_path / "out")
    assert run == made.trajectory
    assert (run.optimizer, run.adaptive, run.weight_decay, run.seed) == ("AdamW", True, 0.01, 0)
    assert run.steps == len(run.batches) == len(run.losses) == len(calls)
    assert sorted(name for batch in run.batches for name in batch) == sorted(texts().ids * 2)
    assert calls[-1][:2] == (run.steps, run.steps)
    assert calls[-1][2] == f"fine-tuning: epoch 2/2, {run.losses[-1]:.2f} nats a token"


# Checkpoints


@pytest.mark.parametrize("rank", [2, None])
def test_checkpoints_lead_from_the_beginning_to_the_model_that_loads_back(language, tmp_path, rank):
    options = OPTIONS | {"lora_rank": rank, "layers_from": 1}
    made = finetune(language, texts(), out=tmp_path / "out", checkpoints=4, **options)
    run, n = Trajectory.load(tmp_path / "out"), made.trajectory.steps
    assert run == made.trajectory
    assert [c.step for c in run.checkpoints] == [0, *(round(n * k / 4) for k in (1, 2, 3, 4))]
    assert [c.lr_sum for c in run.checkpoints] == [sum(run.lr[: c.step]) for c in run.checkpoints]
    loaded = load_language_model(tmp_path / "out").model
    own = {name: p.detach() for name, p in loaded.named_parameters()}
    first, last = run.load_checkpoint(0), run.load_checkpoint(-1)
    assert first.keys() == last.keys() == set(run.trained) <= own.keys()
    if rank:
        assert run.trained == [n for n, p in loaded.named_parameters() if p.requires_grad]
    for name, value in last.items():
        assert torch.equal(value, own[name])
    moved = sum((last[name] - first[name]).double().square().sum() for name in last)
    assert run.distance == pytest.approx(float(moved))
    moments = run.load_optimizer(-1)
    assert {name: list(part) for name, part in moments.items()} == {
        name: sorted(run.trained) for name in ("mean", "square")
    }
    assert run.stages[0].rule().facts["betas"] == (0.9, 0.999)
    stage = run.stages[0]
    assert (stage.start, stage.stop, stage.weight_decay, stage.eps) == (0, n, 0.01, 1e-8)


def test_the_recorded_run_repeats_itself(language, tmp_path):
    # Not the Llama, whose norms compute in float32 whatever they are given.
    language, examples = replace(language, model=gpt2().double()), texts()
    made = finetune(language, examples, out=tmp_path / "out", **OPTIONS)
    model = made.language.model
    run = Run(model=model, task=CausalLM(), train=examples, trajectory=made.trajectory)
    final = run.repeat().parameters
    for name, p in trained(made).items():
        # Another kernel of attention: rounding alone, which Adam's division lets grow a little.
        torch.testing.assert_close(final[name], p, rtol=1e-7, atol=1e-9)


def test_exact_unrolling_is_the_derivative_of_the_fine_tuning(language, tmp_path):
    """Along a reweighting of one example, against fine-tunings under other weights of it."""
    language, examples = replace(language, model=gpt2().double()), texts()
    name, h = "t3", 1e-3
    made = finetune(language, examples, out=tmp_path / "out", **OPTIONS)
    queries = examples.subset([0, 5])

    def measured(model) -> torch.Tensor:
        with torch.no_grad():
            return -CausalLM().loss(model, queries.batch([0, 1]))

    def at(weight: float) -> torch.Tensor:
        changed = {"out": tmp_path / f"weight {weight}", "weights": {name: weight}}
        return measured(
            finetune(language, examples, checkpoints=0, **changed, **OPTIONS).language.model
        )

    difference = (8 * (at(1 + h) - at(1 - h)) - (at(1 + 2 * h) - at(1 - 2 * h))) / (12 * h)
    fitted = headwater.fit(made.language.model, examples, CausalLM(), curvature=Identity())
    scores = Unrolling(keep="sqrt").attribute(
        fitted, queries, trajectory=made.trajectory, measurement="log_prob"
    )
    assert scores.facts["keep"] == "sqrt" and scores.facts["replay_gap"] < 1e-6
    found = scores.values[:, examples.ids.index(name)].double()
    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-8)  # scores are float32


def test_adapters_keep_six_checkpoints_and_whole_models_none(language, tmp_path):
    adapted = finetune(language, texts(), out=tmp_path / "a", **OPTIONS)
    assert len(adapted.trajectory.checkpoints) == 7  # with the initial parameters
    whole = finetune(language, texts(), out=tmp_path / "b", **OPTIONS | {"lora_rank": None})
    assert whole.trajectory.checkpoints == [] and not (tmp_path / "b" / "checkpoints").exists()
    none = finetune(language, texts(), out=tmp_path / "c", checkpoints=0, **OPTIONS)
    assert none.trajectory.checkpoints == [] and not (tmp_path / "c" / "checkpoints").exists()
    assert none.trajectory.made_from == adapted.trajectory.made_from
    for name, p in trained(adapted).items():
        assert torch.equal(p, trained(none)[name])


def test_a_finished_run_has_the_checkpoints_it_has(language, tmp_path):
    made = finetune(language, texts(), out=tmp_path / "none", checkpoints=0, **OPTIONS)
    again = finetune(language, texts(), out=tmp_path / "none", **OPTIONS)
    assert again.trajectory == made.trajectory
    with pytest.raises(ArtifactMismatch, match=r"with no checkpoints, and not the 6 asked for"):
        finetune(language, texts(), out=tmp_path / "none", checkpoints=6, **OPTIONS)
    six = finetune(language, texts(), out=tmp_path / "six", checkpoints=6, **OPTIONS)
    fewer = finetune(language, texts(), out=tmp_path / "six", checkpoints=2, **OPTIONS)
    assert fewer.trajectory == six.trajectory  # a third of six are two
    with pytest.raises(ValueError, match="checkpoints must be 0 or more; got -1"):
        finetune(language, texts(), out=tmp_path / "six", checkpoints=-1, **OPTIONS)


def test_a_stopped_run_goes_on_with_the_checkpoints_it_was_begun_with(
    language, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    whole = finetune(language, texts(), out=tmp_path / "whole", checkpoints=3, **OPTIONS)
    out, stop = tmp_path / "out", {"progress": killed_at(5)}
    with pytest.raises(Killed):
        finetune(language, texts(), out=out, checkpoints=3, **OPTIONS, **stop)
    listed = module.Checkpoint(out / "checkpoint").load()[1]["kept"]
    assert listed and all((out / each["path"]).is_file() for each in listed)
    with pytest.raises(ArtifactMismatch, match="begun with checkpoints=3"):
        finetune(language, texts(), out=out, checkpoints=6, **OPTIONS)
    rest = finetune(language, texts(), out=out, **OPTIONS)
    assert rest.trajectory == whole.trajectory
    for i in range(4):
        one, two = rest.trajectory.load_checkpoint(i), whole.trajectory.load_checkpoint(i)
        assert all(torch.equal(one[name], two[name]) for name in two)


# Repeating, resuming, refusing


def test_the_seed_alone_decides(language, tmp_path):
    torch.manual_seed(1)
    one = finetune(language, texts(), out=tmp_path / "a", **OPTIONS)
    torch.manual_seed(2)
    two = finetune(language, texts(), out=tmp_path / "b", **OPTIONS)
    other = finetune(language, texts(), out=tmp_path / "c", **OPTIONS, seed=1)
    for name, p in trained(one).items():
        assert torch.equal(p, trained(two)[name])
    assert one.trajectory.losses == two.trajectory.losses != other.trajectory.losses


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("rank", [2, None])
def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been_stopped(
    language, tmp_path, monkeypatch, step, rank
):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    options = OPTIONS | {"lora_rank": rank}
    whole = finetune(language, texts(), out=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        finetune(language, texts(), out=tmp_path / "out", **options, progress=killed_at(step))
    calls = []
    rest = finetune(
        language, texts(), out=tmp_path / "out", **options, progress=lambda *c: calls.append(c)
    )
    assert step < whole.trajectory.steps
    # Saving takes a share of the time at most, so the last few steps may have to be made again.
    assert calls[0][0] > (0 if step == 1 else 1)
    assert rest.trajectory == whole.trajectory
    for name, p in trained(whole).items():
        assert torch.equal(p, trained(rest)[name])
    assert not (tmp_path / "out" / "checkpoint").exists()


SCRIPT = """
import os, signal, sys
from pathlib import Path
import headwater.training.finetune as module
from headwater.models.language import load_language_model
from tests.training.test_finetune import OPTIONS, texts
module.SAVE_EVERY = 0.0
folder = Path(sys.argv[1])
def progress(done, total, note):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)
module.finetune(load_language_model(folder / "model"), texts(), out=folder / "out", **OPTIONS, progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_run_that_is_killed_loses_little(language, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=environment,
        check=False,
        capture_output=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    calls = []
    language = load_language_model(tmp_path / "model")
    rest = finetune(
        language, texts(), out=tmp_path / "out", **OPTIONS, progress=lambda *c: calls.append(c)
    )
    whole = finetune(language, texts(), out=tmp_path / "whole", **OPTIONS)
    assert calls[0][0] > 1
    assert rest.trajectory == whole.trajectory
    for i, kept in enumerate(rest.trajectory.checkpoints):
        one, two = rest.trajectory.load_checkpoint(i), whole.trajectory.load_checkpoint(i)
        assert all(torch.equal(one[name], two[name]) for name in two), kept


def test_a_finished_run_is_read_and_not_made_again(language, tmp_path):
    first = finetune(language, texts(), out=tmp_path / "out", **OPTIONS)
    calls = []
    again = finetune(
        language, texts(), out=tmp_path / "out", **OPTIONS, progress=lambda *c: calls.append(c)
    )
    assert not calls
    assert again.trajectory == first.trajectory
    for name, p in trained(first).items():
        assert torch.equal(p, trained(again)[name])


@pytest.mark.parametrize(
    ("data", "options", "what"),
    [(10, {"lr": 1e-3}, "options"), (9, {}, "data"), (9, {"seed": 1}, "data and options")],
)
def test_another_run_in_the_folder_is_refused(language, tmp_path, monkeypatch, data, options, what):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    with pytest.raises(Killed):
        finetune(language, texts(), out=tmp_path / "out", **OPTIONS, progress=killed_at(3))
    with pytest.raises(ArtifactMismatch, match=f"unfinished run with other {what}"):
        finetune(language, texts(data), out=tmp_path / "out", **OPTIONS | options)
    finetune(language, texts(), out=tmp_path / "out", **OPTIONS)
    with pytest.raises(ArtifactMismatch, match=f"finished run with other {what}"):
        finetune(language, texts(data), out=tmp_path / "out", **OPTIONS | options)


def test_a_loss_that_is_not_finite_names_the_examples_and_keeps_the_state(
    language, tmp_path, monkeypatch
):
    examples, loss = texts(), CausalLM.loss
    bad = examples.input_ids[3].tolist()

    def broken(self, model, batch):
        rows = [ids[: len(bad)].tolist() == bad for ids in batch["input_ids"]]
        return loss(self, model, batch).masked_fill(torch.tensor(rows), float("nan"))

    monkeypatch.setattr(CausalLM, "loss", broken)
    with pytest.raises(
        FloatingPointError, match=r"step \d+ is not finite on the examples 't3'\. "
    ) as caught:
        finetune(language, examples, out=tmp_path / "out", **OPTIONS)
    assert str(tmp_path / "out" / "checkpoint") in str(caught.value)
    monkeypatch.undo()
    calls = []
    rest = finetune(
        language, examples, out=tmp_path / "out", **OPTIONS, progress=lambda *c: calls.append(c)
    )
    failed = next(k for k, names in enumerate(rest.trajectory.batches, start=1) if "t3" in names)
    assert calls[0][0] == failed


def test_options_that_do_not_fit_are_refused(language, tmp_path):
    def refused(match, model=language, **options):
        with pytest.raises(ValueError, match=match):
            finetune(model, texts(), out=tmp_path / "out", **OPTIONS | options)

    refused("layers_from must be 0 to 2; got 3", layers_from=3)
    refused("lora_rank must be at least 1", lora_rank=0)
    refused("must be positive", epochs=0)
    refused("name 'x', which is no training example", weights={"x": 0.0})
    refused("finite; that of 't2' is nan", weights={"t2": float("nan")})
    low = replace(language, model=llama(dtype=torch.bfloat16))
    refused("Small steps are lost in bfloat16", low, lora_rank=None)
    made = finetune(language, texts(), out=tmp_path / "adapted", **OPTIONS)
    refused("has an adapter already", made.language)
    assert json.loads((tmp_path / "adapted" / "adapter_config.json").read_text())["r"] == 2


def test_bfloat16_models_are_adapted_in_float32(tmp_path):
    language = saved(tmp_path / "model", llama(dtype=torch.bfloat16))
    made = finetune(language, texts(), out=tmp_path / "out", **OPTIONS)
    assert {p.dtype for p in trained(made).values()} == {torch.float32}
    assert {
        p.dtype
        for p in trained(replace(made, language=load_language_model(tmp_path / "out"))).values()
    } == {torch.float32}


def test_weights_of_one_make_the_run_without_weights(language, tmp_path):
    plain = finetune(language, texts(), out=tmp_path / "out", **OPTIONS)
    again = finetune(language, texts(), out=tmp_path / "out", weights={"t1": 1.0}, **OPTIONS)
    assert again.trajectory == plain.trajectory
    with pytest.raises(ArtifactMismatch, match="other options"):
        finetune(language, texts(), out=tmp_path / "out", weights={"t1": 2.0}, **OPTIONS)
