"""The study's tables, of models small enough to need no training."""

import torch

from headwater.core.examples import TensorExamples
from headwater.models.vision import mlp
from studies import interaction_basis as study


def small(options: study.Study, seed: int) -> study.Trained:
    torch.manual_seed(seed)
    model = mlp([3, 6, 6, 6, 3], seed=seed).double()
    x = 3 * torch.randn(80, 3, dtype=torch.float64)
    data = TensorExamples(x, model(x).argmax(1))
    return study.Trained(model, data, data)


def test_the_tables_have_every_seed_and_are_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.WORKLOADS, "small", small)
    options = study.Study(workloads=("small",), seeds=(0, 1), folder=tmp_path, tolerance=0.05)
    study.main(options)
    first = capsys.readouterr().out
    assert first.count("nodes needed") == first.count("edges needed") == 3
    assert first.count("100.00 %") == 2
    monkeypatch.setitem(study.WORKLOADS, "small", None)  # measured once
    study.main(options)
    assert capsys.readouterr().out == first


def test_a_transformer_answers_at_its_last_token():
    model = study.Pairs(5, context=2, n_layers=1, dim=8, n_heads=2, tied=False)
    ids, labels = torch.randint(5, (4, 2)), torch.randint(5, (4,))
    found = study.last_position(model, (ids, labels))
    assert found.logits.shape == (4, 1, 5) and torch.equal(found.labels[:, 0], labels)
