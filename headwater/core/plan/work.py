"""The stages of a fit and a trace, each run on a part of the data and timed."""

import tempfile
import time
from dataclasses import replace
from math import inf, prod
from pathlib import Path

import torch
from torch import Tensor

from headwater.core.capture import BatchPlan, plan_batches, sweep
from headwater.core.cost import available_memory_bytes, spread
from headwater.core.curvature import (
    EKFAC,
    KFAC,
    Curvature,
    CurvatureMethod,
    Dense,
    Dual,
    DualCurvature,
    FitContext,
    Identity,
    Layerwise,
    Preconditioned,
)
from headwater.core.curvature.folds import EigenvaluesByFold
from headwater.core.curvature.moments import Basis, EigenvalueSums, SecondMoments
from headwater.core.damping import Damping, Inverse, evidence
from headwater.core.examples import Examples
from headwater.core.fingerprint import fingerprint_model
from headwater.core.gradients import CollectGradients, Gradients
from headwater.core.plan.clock import Clock
from headwater.core.plan.needs import Needs
from headwater.core.plan.summary import Stage
from headwater.core.scoring import PairScores, ReplicateScores
from headwater.core.store import ArtifactWriter
from headwater.core.target import Loss, Measured, fisher_target
from headwater.numerics import spectral

_EVIDENCE_STEPS = 40  # the fixed point's usual number of steps
_CUBE = 1e-9  # seconds of an eigendecomposition over the cube of its side, before one is measured
_WRITTEN = 1 << 24  # numbers written to see how fast the disk is
_SAVE_EVERY = 30.0  # seconds between two checkpoints of a sweep
_INTERVALS = 10  # examples on each side of a query that get an interval


class Work:
    """The stages of a fit and a trace, each run on a part of the data."""

    def __init__(
        self,
        clock: Clock,
        method: CurvatureMethod,
        needs: Needs,
        n_queries: int,
        folder: str | Path | None,
    ):
        self.clock, self.needs, self.n_queries = clock, needs, n_queries
        self.capture, self.examples = clock.capture, clock.examples
        self.layers = list(self.capture.layers.values())
        whole = {"tolerance": None} if hasattr(method, "tolerance") else {}
        self.method = replace(method, **whole)  # type: ignore[type-var]
        self.write_rate = inf if folder is None else _write_rate(Path(folder))
        self.to_disk = folder is not None

    def stages(self) -> list[Stage]:
        method, found = self.method, [self._fingerprints()]
        if isinstance(method, Dual):
            stages, curvature = self._dual(method)
        elif isinstance(method, Dense):
            stages, curvature = self._dense(method)
        elif isinstance(method, KFAC):
            stages, curvature = self._kronecker(method)
        else:
            stages, curvature = self._swept(method)
        found += stages
        if self.to_disk:
            found.append(Stage("save", "fit", self.needs.disk()["fit"] / self.write_rate))
        return [*found, self._damping(curvature), *self._trace(curvature)]

    def _context(self, batches: list[BatchPlan]) -> FitContext:
        return FitContext(self.capture, self.examples, batches)

    def _fingerprints(self) -> Stage:
        def work() -> None:
            fingerprint_model(self.capture.model)
            self.examples.fingerprint()

        return Stage("fingerprints", "fit", self.clock.once(work))

    def _saved(self, seconds: float, state: int) -> float:
        """Seconds of a sweep with its checkpoints, of `state` bytes."""
        each = state / self.write_rate if self.to_disk else 0.0
        n_saves = seconds // _SAVE_EVERY + 1 if self.to_disk else 0
        return seconds + n_saves * each

    def _swept(self, method: CurvatureMethod) -> tuple[list[Stage], Curvature]:
        """Curvature that is one sweep, or nothing at all."""
        made: list[Curvature] = []
        seconds = 0.0
        if isinstance(method, Identity):
            made.append(method.fit(self._context([])))
        else:
            seconds = self.clock.all_data(lambda b: made.append(method.fit(self._context(b))))
            seconds = self._saved(seconds, self.needs.itemsize * self.needs.spectrum)
        return [Stage("second moments", "fit", seconds)], made[-1]

    def _kronecker(self, method: KFAC) -> tuple[list[Stage], Curvature]:
        kept: list[SecondMoments] = []
        seconds = self.clock.all_data(lambda b: kept.append(method.moments(self._context(b))[0]))
        seconds = self._saved(seconds, self.needs.itemsize * self.needs.factors)
        moments = kept[-1]
        stages = [
            Stage("second moments", "fit", seconds),
            Stage(
                "eigendecompositions",
                "fit",
                (1 + self.needs.own_bases) * self._decompositions(moments),
            ),
        ]
        bases = _stand_in(moments)
        folds = torch.full((method.folds,), len(self.examples) / method.folds)
        sums = {x.name: torch.rand(method.folds, *x.block) for x in self.layers}
        if isinstance(method, EKFAC):
            target = fisher_target(
                method.fisher, draws=method.draws, cut=method.cut, seed=method.seed + 1
            )
            swept: list[EigenvalueSums] = []
            each = [bases] * (1 + self.needs.own_bases)

            def run(batches: list[BatchPlan]) -> None:
                gathered = EigenvaluesByFold(self.layers, each, method.folds)
                swept.append(gathered.eigenvalues[0])
                capture = self.capture.at(method.precision, self.examples)
                sweep(capture, self.examples, [gathered], target, batches=batches)

            seconds = self.clock.all_data(run)
            seconds = self._saved(seconds, self.needs.itemsize * self.needs.spectrum)
            stages.append(Stage("eigenvalues", "fit", seconds))
            sums = swept[-1].finish()
        return stages, Layerwise(bases, sums, folds)

    def _decompositions(self, moments: SecondMoments) -> float:
        """Seconds of all eigendecompositions: small sides measured, large ones by the cube."""
        by_side: dict[int, list[Tensor]] = {}
        for name, moment in moments.finish().items():
            if moments.is_full(name):
                by_side.setdefault(moment.shape[-1], []).append(moment)
        total, left, rate = 0.0, 2 * self.clock.limit, _CUBE
        for n, (side, members) in enumerate(sorted(by_side.items())):
            each = rate * side**3
            if n == 0 or min(rate, 2 * _CUBE) * side**3 < left:
                one = members[0].reshape(-1, side, side)[0]
                if n == 0:
                    spectral.eigh(one)  # warms up
                each = self.clock.once(lambda x=one: spectral.eigh(x))
                left -= each
                if side >= 128:  # below, the cube is not what counts
                    rate = each / side**3
            total += each * sum(prod(m.shape[:-2]) for m in members)
        return total

    def _dual(self, method: Dual) -> tuple[list[Stage], Curvature]:
        collected: list[CollectGradients] = []
        target = fisher_target(method.fisher, draws=method.draws, cut=method.cut, seed=method.seed)

        def run(batches: list[BatchPlan]) -> None:
            collected.append(CollectGradients(self.layers))
            sweep(self.capture, self.examples, collected[-1:], target, batches=batches)

        seconds = self.clock.all_data(run)
        seconds = self._saved(seconds, self.needs.itemsize * self.needs.row_numel)
        rows, _, _ = collected[-1].finish()
        rows = rows[: min(len(rows), 1024)]
        folds = torch.arange(len(rows)) % method.folds
        sizes = torch.full((method.folds,), len(self.examples) / method.folds)
        made: list[DualCurvature] = []

        def gram() -> None:
            made.append(DualCurvature(rows, folds, sizes.double()))

        gram()  # warms up
        seconds_gram = self.clock.once(gram)
        more = self.needs.n_rows / len(rows)
        stages = [
            Stage("rows", "fit", seconds),
            Stage("Gram matrix", "fit", seconds_gram * more**2),
        ]
        return stages, made[-1]

    def _dense(self, method: Dense) -> tuple[list[Stage], Curvature]:
        context = self._context(self.clock.order[:1])
        made: list[Curvature] = []
        seconds = self.clock.once(lambda: made.append(method.fit(context)))
        return [Stage("matrix", "fit", seconds * len(self.clock.order))], made[-1]

    def _damping(self, curvature: Curvature) -> Stage:
        """The automatic damping; nothing where the training run recorded its own."""
        n = len(self.examples)
        more = self._larger(curvature) ** 3
        spectra: list[dict[str, Tensor]] = []
        decompose = self.clock.once(lambda: spectra.append(curvature.spectra()))
        few = self.clock.once(lambda: evidence(spectra[0].values(), n=n, distance=1.0, steps=4))
        return Stage("damping", "trace", decompose * more + few * _EVIDENCE_STEPS / 4)

    def _larger(self, curvature: Curvature) -> float:
        """How many times more rows the whole dual form has than the measured one."""
        if not isinstance(curvature, DualCurvature):
            return 1.0
        return self.needs.n_rows / max(len(curvature.rows), 1)

    def _trace(self, curvature: Curvature) -> list[Stage]:
        """Gradients of the queries, their preconditioning, a pass of scores, and the intervals."""
        examples, capture, clock = self.examples, self.capture, self.clock
        per_query = 4 * self.needs.itemsize * self.needs.n_parameters
        room = int(available_memory_bytes(capture.device) / 4 / max(per_query, 1))
        n_some = max(1, min(self.n_queries, room, len(examples)))
        asked = examples.subset(spread(len(examples))[:n_some])
        found: list[Gradients] = []

        def gradients() -> None:
            collect = CollectGradients(self.layers)
            sweep(capture, asked, [collect], Measured(), batches=self._batches(asked))
            found.append(collect.finish()[0])

        more_queries = self.n_queries / n_some
        seconds_queries = clock.once(gradients) * more_queries
        n_rows = sum(examples.lengths) if examples.lengths else len(examples)
        function = Inverse(Damping(1.0))
        prepared = [curvature.prepare(found[0], function, n_rows)]  # warms up, and factors once
        seconds_prepare = clock.once(
            lambda: prepared.append(curvature.prepare(found[0], function, n_rows))
        )
        larger = self._larger(curvature)
        seconds_prepare *= more_queries * larger

        def score(batches: list[BatchPlan]) -> None:
            pairs = PairScores(prepared[-1], len(examples))
            sweep(capture.at("auto", examples), examples, [pairs], Loss(), batches=batches)

        seconds_scores = clock.all_data(score)
        if more_queries > 1 or larger > 1:
            bare = clock.all_data(
                lambda b: sweep(capture, examples, [], Loss(), batches=b) and None
            )
            combined = type(prepared[-1]) is not Preconditioned  # left as a combination of rows
            growth = more_queries * (larger if combined else 1.0)
            seconds_scores = bare + max(0.0, seconds_scores - bare) * growth
        solve = self._solve(curvature)
        stages = [
            Stage("query gradients", "trace", seconds_queries + seconds_prepare + solve),
            Stage("scores", "trace", seconds_scores),
        ]
        if self.method.folds > 1:
            seconds = self._replicates(curvature, found[0], more_queries)
            stages.append(Stage("intervals", "trace", seconds + 0.5 * self.method.folds * solve))
        return stages

    def _replicates(self, curvature: Curvature, asked: Gradients, more_queries: float) -> float:
        """Seconds of scoring the strongest examples under the curvature of all folds but one, each in turn."""
        n, examples = len(self.examples), self.examples
        # queries that choose at random would name so many different examples
        n_chosen = max(1, round(n * (1 - (1 - min(1.0, 2 * _INTERVALS / n)) ** self.n_queries)))
        chosen = examples.subset(spread(n)[:n_chosen])
        function, prepared = Inverse(Damping(1.0)), []

        def prepare() -> None:
            # a short measurement may have seen one fold only, which leaves nothing to leave out
            replicates = curvature.replicates() or [curvature] * self.method.folds
            if isinstance(curvature, Layerwise):
                spectra = [r.spectra() for r in replicates]
                factors = {
                    name: torch.stack([function(s[name], 1.0) for s in spectra])
                    for name in curvature.bases
                }
                prepared[:] = [ReplicateScores(asked, curvature.bases, factors, n_chosen)]
            else:
                made = [r.prepare(asked, function, n_chosen) for r in replicates]
                prepared[:] = [PairScores(m, n_chosen) for m in made]

        def score(batches: list[BatchPlan]) -> None:
            sweep(self.capture, chosen, prepared, Loss(), batches=batches)

        seconds = self.clock.once(prepare)
        clock = Clock(self.capture, chosen, self._batches(chosen))
        clock.limit = self.clock.limit
        return (seconds + clock.all_data(score)) * more_queries * self._larger(curvature)

    def _batches(self, examples: Examples) -> list[BatchPlan]:
        size, tokens = self.clock.batch_size, self.clock.batch_tokens
        return plan_batches(examples, batch_size=size, batch_tokens=tokens)

    def _solve(self, curvature: Curvature) -> float:
        """Seconds of factoring the dual form's system."""
        if not isinstance(curvature, DualCurvature):
            return 0.0
        system = curvature.gram.clone()
        system.diagonal().add_(float(system.diagonal().mean()))
        torch.linalg.cholesky_ex(system)  # warms up
        seconds = self.clock.once(lambda: torch.linalg.cholesky_ex(system))
        return seconds * self._larger(curvature) ** 3


def _stand_in(moments: SecondMoments) -> dict[str, Basis]:
    """Bases of the right shapes, for the time that multiplying by them takes."""
    vectors: dict[str, Tensor | None] = {
        name: torch.randn_like(moment) / moment.shape[-1] ** 0.5 if moments.is_full(name) else None
        for name, moment in moments.finish().items()
    }
    return {
        name: (vectors[f"A:{layer.input_group}"], vectors[f"G:{name}"])
        for name, layer in moments.layers.items()
    }


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _write_rate(folder: Path) -> float:
    """Bytes a second that artifacts are written at, hashed and synced."""
    with tempfile.TemporaryDirectory(
        dir=existing_folder(folder), prefix=".headwater-plan-"
    ) as place:
        numbers = torch.rand(_WRITTEN)
        started = time.perf_counter()
        with ArtifactWriter(Path(place) / "speed", kind="speed") as writer:
            writer.tensor("numbers", numbers)
        return numbers.nbytes / (time.perf_counter() - started)
