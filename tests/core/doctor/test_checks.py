import torch
from torch import nn

from headwater.core.doctor import examine
from headwater.core.task import CausalLM, Classification, MaskedLM
from tests.doctor_cases import Attention, Forward, Sentences, failed, images, mlp, sentences


def test_examples_without_a_scored_token_are_named():
    ids = sentences(5)
    labels = [x if i != 2 else torch.full_like(x, -100) for i, x in enumerate(ids)]
    some = examine(Attention(), Sentences(ids, labels), MaskedLM())
    assert some["labels"].status == "warn"
    assert some["labels"].detail.endswith(": 2")
    none = examine(Attention(), Sentences(ids, [torch.full_like(x, -100) for x in ids]), MaskedLM())
    assert "labels" in failed(none)
    # The first label is never scored by next-token prediction.
    first = [torch.cat([x[:1], torch.full_like(x[1:], -100)]) for x in ids]
    assert "labels" in failed(examine(Attention(), Sentences(ids, first), CausalLM()))


def test_a_doubled_first_token_is_found_and_a_repeated_word_is_not():
    doubled = examine(Attention(), Sentences(sentences(first=(1, 1))), MaskedLM())
    assert doubled["first token"].status == "warn"
    assert doubled.ok
    once = [torch.tensor([7 + i, 7 + i, 3, 4]) for i in range(6)]
    names = {c.name for c in examine(Attention(), Sentences(once), MaskedLM()).checks}
    assert "first token" not in names


def test_weights_that_are_not_finite_are_named():
    model = mlp(6, 5, 3)
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    diagnosis = examine(model, images(), Classification())
    assert {"weights", "loss"} <= set(failed(diagnosis))
    assert "2.bias" in diagnosis["weights"].detail


def test_modules_that_never_run_and_layers_without_gradient_are_named():
    model = Forward(
        lambda self, x: self.head(self.mid(x).clamp(max=-100.0)) + 0 * self.loose(x).detach(),
        mid=nn.Linear(6, 4),
        head=nn.Linear(4, 3),
        idle=nn.Linear(2, 2),
        loose=nn.Linear(6, 3),
    )
    diagnosis = examine(model, images(), Classification())
    assert diagnosis.ok
    assert "loose" in diagnosis["unused"].detail
    assert "mid" in diagnosis["zero gradients"].detail
    assert "mid" not in diagnosis["unused"].detail
    told = diagnosis["coverage"].detail + diagnosis["unused"].detail
    assert "idle" in told


def test_batch_norm_without_running_statistics_is_a_fail():
    model = nn.Sequential(
        nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    ).double()
    assert {"batch norm", "alone"} <= set(failed(examine(model, images(), Classification())))


def test_gradient_checkpointing_is_a_warning():
    model = mlp(6, 3)
    model.gradient_checkpointing = True
    assert examine(model, images(), Classification())["checkpointing"].status == "warn"


def test_fewer_positions_than_a_side_is_a_warning():
    diagnosis = examine(mlp(6, 3), images(5), Classification())
    assert diagnosis["rank"].status == "warn"
    assert diagnosis.ok
    assert "rank" not in {c.name for c in examine(mlp(6, 3), images(50), Classification()).checks}
