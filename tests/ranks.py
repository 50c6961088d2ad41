"""What a rank of a small process group does in the tests: `python -m tests.ranks JOB RANK SIZE FOLDER`."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import headwater
from headwater.core import capture
from headwater.core.curvature import EKFAC, KFAC, CurvatureMethod, Diagonal, Dual
from headwater.core.distributed import RankFailed, current
from headwater.core.examples import TensorExamples
from headwater.core.index import GradientIndex, LoGra, writing
from headwater.trace import Influence
from tests import index_builds
from tests.cases import TASK, mlp, mlp_data

METHODS: dict[str, CurvatureMethod] = {
    "ekfac": EKFAC(),
    "ekfac in one basis": EKFAC(own_bases=False),
    "ekfac stopped early": EKFAC(tolerance=0.9),
    "kfac": KFAC(),
    "diagonal": Diagonal(),
    "dual": Dual(),
}


def small(n: int = 47) -> tuple[nn.Module, TensorExamples, TensorExamples]:
    """A model, its data and three queries, the same on every rank."""
    torch.manual_seed(0)
    return mlp(), mlp_data(n), mlp_data(3)


def answers(
    method: CurvatureMethod, n: int = 47, batch_size: int = 4, **options: Any
) -> dict[str, Tensor]:
    """All numbers of a fit, and the scores and intervals of three queries."""
    model, data, queries = small(n)
    fit = headwater.fit(model, data, TASK, curvature=method, batch_size=batch_size, **options)
    found = {f"fit {k}": v for k, v in fit.curvature.tensors().items()}
    influence = Influence(damping=0.01)
    scores = influence.attribute(fit, queries, by_layer=True)
    found |= {"scores": scores.values, "self": influence.self_influence(fit)}
    found["by layer"] = scores.by_layer
    if scores.low is not None:
        found |= {"low": scores.low.nan_to_num(7), "high": scores.high.nan_to_num(7)}
    kept = Influence(damping=0.01, keep=4, n_intervals=0).attribute(fit, queries, by_layer=True)
    return found | {"kept": kept.values, "totals": kept.layer_totals}


def every() -> dict[str, dict[str, Tensor]]:
    """Every method over 47 examples in twelve batches or more, and two over 6 examples in two batches."""
    found = {name: answers(method) for name, method in METHODS.items()}
    plain = capture.units_of
    capture.units_of = partial(plain, most=5)  # so that a unit has several batches
    found["ekfac in large units"] = answers(EKFAC(folds=2))
    capture.units_of = plain
    return found | {
        "kfac of few": answers(KFAC(), n=6),
        "dual of few": answers(Dual(folds=1), n=6),
    }


def same(folder: Path) -> None:
    """All answers."""
    found = every()
    torch.save(found, folder / f"same-{current().size}-{current().rank}.pt")


class Reader(nn.Module):
    """Tokens through an embedding, a norm and two layers to a label."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.embed(tokens))).tanh().mean(1))


def sharded(folder: Path) -> None:
    """The same fit of a model in one piece on each rank, and of one whose weights are spread over them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (current().size,))
    found: dict[str, dict[str, Tensor]] = {}
    for kind in ("plain", "sharded"):
        torch.manual_seed(0)
        model = Reader().double()
        data = TensorExamples(torch.randint(7, (22, 5)), torch.randint(3, (22,)))
        queries = TensorExamples(torch.randint(7, (3, 5)), torch.randint(3, (3,)))
        if kind == "sharded":
            for module in (model.mix, model):
                fully_shard(module, mesh=mesh)
        for name, method in {"ekfac": EKFAC(folds=3), "diagonal": Diagonal(folds=1)}.items():
            fit = headwater.fit(model, data, TASK, curvature=method, batch_size=4)
            scores = Influence(n_intervals=2).attribute(fit, queries)
            numbers = fit.curvature.tensors() | {"scores": scores.values}
            found[f"{kind} {name}"] = numbers
            found[f"{kind} {name}"]["covered"] = torch.tensor(fit.followed.coverage)
        if kind == "sharded":
            for options in ({"curvature": EKFAC(fisher="exact")}, {"curvature": Dual()}):
                try:
                    headwater.fit(model, data, TASK, batch_size=4, **options)
                except ValueError as error:
                    assert "spread over ranks" in str(error)
                else:
                    raise AssertionError("all labels of a sharded model were to be refused")
            try:
                Influence(cg_steps=2).attribute(fit, queries)
            except ValueError as error:
                assert "spread over ranks" in str(error)
            else:
                raise AssertionError("conjugate gradients were to be refused")
    torch.save(found, folder / f"sharded-{current().size}-{current().rank}.pt")


class Broken(TensorExamples):
    """Data of which rank 1 cannot read one batch."""

    def batch(self, indices: Sequence[int]):
        if current().rank == 1 and 36 in indices:
            raise OSError("the disk of this rank is broken")
        return super().batch(indices)


def failing(folder: Path) -> None:
    """Rank 1 fails in the middle of a sweep, and lives on for a while."""
    model, data, _ = small()
    started = time.monotonic()
    try:
        headwater.fit(model, Broken(*data.tensors), TASK, curvature=KFAC(), batch_size=4)
    except (OSError, RankFailed) as error:
        text = f"{type(error).__name__}: {error}\n{time.monotonic() - started:.1f}"
        (folder / f"failed-{current().rank}").write_text(text)
        if current().rank == 1:
            wait(folder / "failed-0")
        raise


def wait(path: Path, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)


def saving_often() -> None:
    """Save after every unit of batches."""
    capture._WORK_PER_SAVE = 0
    plain = capture._State.__init__
    capture._State.__init__ = lambda *a: plain(*a[:-1], 0.0)  # type: ignore[method-assign]


class Deadly(TensorExamples):
    """Data that kill rank 1 in its second sweep."""

    reads = 0

    def batch(self, indices: Sequence[int]):
        self.reads += 1
        if current().rank == 1 and self.reads == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(indices)


def killed(folder: Path) -> None:
    """Rank 1 is killed in the second sweep of a fit."""
    saving_often()
    model, data, _ = small()
    options = {"curvature": EKFAC(), "batch_size": 4, "folder": folder / "fit"}
    try:
        headwater.fit(model, Deadly(*data.tensors), TASK, **options)
    except RankFailed as error:
        (folder / f"failed-{current().rank}").write_text(str(error))
        raise


def resumed(folder: Path) -> None:
    """The same fit goes on."""
    saving_often()
    ran: list[str] = []
    found = answers(
        EKFAC(), folder=folder / "fit", progress=lambda done, n, note: ran.append(f"{note} {done}")
    )
    torch.save(found, folder / f"resumed-{current().size}-{current().rank}.pt")
    if current().is_first:
        (folder / f"ran-{current().size}").write_text("\n".join(ran))


def indexes(folder: Path) -> None:
    """Indexes of two kinds with additions, and one of fewer batches than ranks; the first rank's number names them."""
    place, fitted = folder / f"indexes-{current().size}", index_builds.small_fit()
    for name, kind in {"whitened": None, "logra": LoGra(rank=3)}.items():
        given = {} if kind is None else {"kind": kind}
        index = index_builds.build(fitted, place / name, dtype="int8", **given)
        index.add(fitted, index_builds.data(90, seed=7, prefix="b"))
        assert len(index) == index_builds.N + 90 and len(GradientIndex(place / name)) == len(index)
    small = index_builds.data(40, seed=8, prefix="c")
    index_builds.build(fitted, place / "few", examples=small, sample=0)


def index_killed(folder: Path) -> None:
    """Rank 1 is killed in the middle of a build."""
    fitted, plain = index_builds.small_fit(), index_builds.Slow.batch
    writing._ROUND = 0.0  # the ranks meet after every few batches
    reads: list[int] = []

    def batch(self, indices):
        reads.append(1)
        if current().rank == 1 and len(reads) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, indices)

    index_builds.Slow.batch = batch  # type: ignore[method-assign]
    try:
        index_builds.build(fitted, folder / "index", sample=0)
    except RankFailed as error:
        (folder / f"failed-{current().rank}").write_text(str(error))
        raise


def index_resumed(folder: Path) -> None:
    """The same build goes on; how many batches this rank ran is kept."""
    fitted, plain = index_builds.small_fit(), index_builds.Slow.batch
    read: list[int] = []

    def batch(self, indices):
        read.extend(indices)
        return plain(self, indices)

    index_builds.Slow.batch = batch  # type: ignore[method-assign]
    index_builds.build(fitted, folder / "index", sample=0)
    (folder / f"read-{current().rank}").write_text(str(len(read)))


def index_failing(folder: Path) -> None:
    """The first rank's disk is full in the middle of a build."""
    fitted, plain, left = index_builds.small_fit(), os.pwrite, [6]

    def full(descriptor, content, place):
        left[0] -= 1
        if current().is_first and left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(descriptor, content, place)

    os.pwrite = full
    told(folder, lambda: index_builds.build(fitted, folder / "index", sample=0))


def index_differing(folder: Path) -> None:
    """Rank 1 has other data."""
    other = index_builds.data(seed=current().rank)
    fitted = index_builds.small_fit()
    told(folder, lambda: index_builds.build(fitted, folder / "index", examples=other, sample=0))


def told(folder: Path, act: Callable[[], Any]) -> None:
    """Keep what an error says, for which there is time until both have said it."""
    try:
        act()
    except (RankFailed, OSError, ValueError) as error:
        (folder / f"told-{current().rank}").write_text(f"{type(error).__name__}: {error}")
        wait(folder / f"told-{1 - current().rank}")
        raise


def start(
    job: str, size: int, folder: Path, *, timeout: float = 120
) -> list[subprocess.CompletedProcess]:
    """Run a job in several processes and wait for all of them."""
    store = folder / f"store-{job}-{size}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "tests.ranks", job]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder), str(store)],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    until, done = time.monotonic() + timeout, []
    try:
        for process in started:
            out, _ = process.communicate(timeout=max(1, until - time.monotonic()))
            done.append(subprocess.CompletedProcess(command, process.returncode, out))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    return done


def main(job: str, rank: str, size: str, folder: str, store: str) -> None:
    torch.set_num_threads(1)
    place = f"file://{store}"
    dist.init_process_group("gloo", init_method=place, rank=int(rank), world_size=int(size))
    globals()[job](Path(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
