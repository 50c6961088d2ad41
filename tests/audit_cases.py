"""A model whose outputs are its weights, so that a run of training can be written by hand."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import headwater
from headwater.core.fit import Fit
from headwater.training.trajectory import Trajectory, keep_checkpoint


def by_hand(
    folder: Path, outputs: Sequence[Tensor], labels: Sequence[int], steps: Sequence[int] = ()
) -> tuple[Fit, Trajectory]:
    """A fit, and the record of a run, of a model that says `outputs[k]` (example, class) at checkpoint k.

    The model is linear without bias and example n is the n-th unit vector: its outputs are column n of the weight.
    """
    n, classes = outputs[0].shape
    steps = list(steps) or list(range(len(outputs)))
    model = nn.Linear(n, classes, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(outputs[-1].mT)
    data = headwater.TensorExamples(torch.eye(n).double(), torch.tensor(labels))
    kept = [
        keep_checkpoint(folder, step, {"weight": each.double().mT.contiguous()})
        for step, each in zip(steps, outputs, strict=True)
    ]
    record = Trajectory(
        optimizer="SGD",
        lr=[0.1] * steps[-1],
        weight_decay=0.0,
        batches=[data.ids] * steps[-1],
        losses=[1.0] * steps[-1],
        seed=0,
        trained=["weight"],
        checkpoints=kept,
    )
    record.save(folder)
    fit = headwater.fit(
        model, data, headwater.Classification(), curvature="ekfac", weight_decay=0.1
    )
    return fit, record
