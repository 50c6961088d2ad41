"""Training runs with a live index that can be killed: run as a program it forks one after another.

A run goes on from its folder's checkpoint, if it has one.
"""

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from headwater.core.examples import TensorExamples
from headwater.core.fit import fit
from headwater.core.index import LiveIndex, LoGra, live
from headwater.core.task import Classification
from tests.forks import serve

N, BATCH, EPOCHS, EVERY = 120, 8, 2, 7  # 30 steps, a checkpoint after every seventh


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data() -> TensorExamples:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 6, generator=generator), torch.randint(3, (N,), generator=generator)
    return TensorExamples(x, y, ids=[f"a{i}" for i in range(N)])


def order() -> list[list[int]]:
    """The examples of each step."""
    generator = torch.Generator().manual_seed(2)
    epochs = [torch.randperm(N, generator=generator) for _ in range(EPOCHS)]
    return [some.tolist() for epoch in epochs for some in epoch.split(BATCH)]


def run(folder: Path) -> LiveIndex:
    """Train from the folder's checkpoint on, or from the beginning."""
    folder.mkdir(parents=True, exist_ok=True)
    model, examples, start = network(), data(), 0
    state = folder / "state.safetensors"
    if state.exists():
        tensors = load_file(state)
        start = int(tensors.pop("step"))
        model.load_state_dict(tensors)
    fitted = fit(model, examples, Classification(), curvature="identity", check=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {"kind": LoGra(rank=3), "optimizer": optimizer, "dtype": "float32", "start": start}
    live._SEGMENT_BYTES = 20 * 4 * 18  # of about twenty rows
    with LiveIndex(fitted, folder / "index", **options) as index:
        steps = order()
        for number in range(start, len(steps)):
            x, y = examples.batch(steps[number])
            optimizer.zero_grad()
            with index.step(steps[number]):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if (number + 1) % EVERY == 0 or number + 1 == len(steps):
                index.save()
                step = torch.tensor(number + 1)
                save_file(model.state_dict() | {"step": step}, state.with_suffix(".partial"))
                os.replace(state.with_suffix(".partial"), state)
    return index


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # what a dead process leaves needs no disk to have caught up
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))  # whatever is imported on first use is, before the forks
    serve(lambda folder, wait: run(Path(folder)))
