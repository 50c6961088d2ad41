"""Which labels of a classifier's training data are wrong? Digits with a tenth of the labels replaced.

Trains a small network on scikit-learn's digits with planted errors, records the run, fits the curvature, and audits:

    python examples/audit_digits.py runs/digits

The same audit from the command line, with a person's sample of 200 verified labels (here the planted truth):

    headwater audit runs/digits --program examples/audit_digits.py:parts --image 8 8
    headwater audit runs/digits --program examples/audit_digits.py:parts --image 8 8 \
        --verified runs/digits/verified.csv

And what relabelling or removing does to the held-out loss, by repeating the recorded run:

    headwater verify runs/digits --program examples/audit_digits.py:parts --audit audit
"""

import sys
from pathlib import Path

import torch

import headwater
from headwater.cli import main as command
from headwater.core.examples import TensorExamples
from headwater.data.images import digits
from headwater.models.vision import mlp
from headwater.training.optimizers import SGD
from headwater.training.run import train_model
from headwater.training.trajectory import Trajectory

RULE = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=50, epochs=20)


def noisy() -> tuple[TensorExamples, torch.Tensor, TensorExamples]:
    """1,500 digits of which a tenth carry another label, which those are, and the other digits as they are."""
    images, generator = digits(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    (x, y), some, rest = images.tensors, order[:1500], order[1500:]
    wrong = torch.rand(1500, generator=generator) < 0.1
    other = (y[some] + torch.randint(1, 10, (1500,), generator=generator)) % 10
    ids = [images.ids[i] for i in some.tolist()]
    train = TensorExamples(x[some], torch.where(wrong, other, y[some]), ids=ids)
    return train, wrong, TensorExamples(x[rest], y[rest])


def parts(run: Path):
    """The trained model, its data, its task and held-out data: what `headwater audit --program` asks for."""
    data, _, heldout = noisy()
    model, task = mlp((64, 64, 32, 10)), headwater.Classification()
    train_model(model, data, task, RULE, folder=run, checkpoints=10)  # a finished run is read
    return model, data, task, heldout


def main(run: Path) -> None:
    """Train, fit, verify a random sample, audit."""
    model, data, task, _ = parts(run)
    record = Trajectory.load(run)
    known = {"weight_decay": record.weight_decay, "horizon": record.horizon}
    headwater.fit(model, data, task, curvature="ekfac", folder=run / "fit", **known)
    _, wrong, _ = noisy()
    drawn = torch.randperm(len(wrong), generator=torch.Generator().manual_seed(1))[:200].tolist()
    lines = ["id,is_wrong", *(f"{data.ids[i]},{int(wrong[i])}" for i in drawn)]
    (run / "verified.csv").write_text("\n".join(lines) + "\n")
    words = [str(run), "--program", f"{__file__}:parts", "--verified", str(run / "verified.csv")]
    raise SystemExit(command(["audit", *words]))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
