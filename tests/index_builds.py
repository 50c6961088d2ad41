"""Builds of an index that can be killed: run as a program it forks one after another."""

import time

import torch
from torch import nn

from headwater.core.curvature import EKFAC
from headwater.core.examples import TensorExamples
from headwater.core.fit import Fit, fit
from headwater.core.index import GradientIndex, Whitened
from headwater.core.task import Classification
from tests.forks import serve

N, ROWS_A_SHARD = 700, 256


class Slow(TensorExamples):
    """Examples that take their time, so that a random moment falls anywhere."""

    wait = 0.0

    def batch(self, indices):
        time.sleep(self.wait)
        return super().batch(indices)


def data(n: int = N, seed: int = 0, prefix: str = "a") -> Slow:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)
    ids = [f"{prefix}{i}" for i in range(n)]
    metadata = {"source": ["web" if i % 3 else "book" for i in range(n)], "year": list(range(n))}
    return Slow(x, y, ids=ids, metadata=metadata)


def small_fit() -> Fit:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return fit(model, data(), Classification(), curvature=EKFAC(folds=1), batch_size=32)


def build(fitted: Fit, folder, **options) -> GradientIndex:
    size = ROWS_A_SHARD * (4 + 4 * 16)
    options = {
        "kind": Whitened(rank=4, damping=0.01, sides="leading"), "dtype": "float32", "shard_bytes": size,
        "sample": 30,
    } | options  # fmt: skip
    return GradientIndex.build(fitted, folder, **options)


def _serve() -> None:
    torch.set_num_threads(1)
    fitted = small_fit()

    def work(folder, wait):
        fitted.train.wait = 0.01 if wait else 0.0
        build(fitted, folder)

    serve(work)


if __name__ == "__main__":
    _serve()
