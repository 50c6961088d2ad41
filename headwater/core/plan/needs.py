"""The arithmetic of memory and disk: what is held together at each stretch of the work."""

from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.capture import BatchInfo, BatchPlan, Capture, Rows
from headwater.core.cost import KeptMemory, positions
from headwater.core.curvature import EKFAC, KFAC, CurvatureMethod, Dense, Dual, Identity
from headwater.core.curvature.choice import dual_rows
from headwater.core.examples import Examples, to_device
from headwater.core.plan.summary import amount
from headwater.core.target import Loss


class Needs:
    """Bytes that the work takes, from shapes and from what one pass keeps."""

    def __init__(
        self,
        capture: Capture,
        examples: Examples,
        batches: list[BatchPlan],
        method: CurvatureMethod,
        n_queries: int,
    ):
        self.capture, self.examples, self.method = capture, examples, method
        self.n_queries, self.n = n_queries, len(examples)
        self.layers = list(capture.layers.values())
        self.n_parameters = sum(layer.numel for layer in self.layers)
        self.itemsize = next(capture.model.parameters()).element_size()
        self.largest = max(batches, key=lambda b: positions(examples, b))
        self.per_position, self.transient = self._measured()
        self.n_rows = self._rows()

    def _measured(self) -> tuple[float, float]:
        """Bytes that a pass keeps for each position, and what comes and goes beside them."""
        part = BatchPlan(self.largest.indices[: max(1, len(self.largest.indices) // 8)], 0)
        capture, examples = self.capture, self.examples
        data = to_device(examples.batch(part.indices), capture.device)
        kept, rows_bytes, wide = KeptMemory(capture.model), [0], [False]

        def emit(rows: Rows) -> None:
            kept.add(rows.a)
            rows_bytes.append(2 * (rows.a.nbytes + rows.g.nbytes))
            wide.append(rows.pos > 1)

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            for x in args:
                if isinstance(x, Tensor):
                    kept.add(x)

        modules = dict(capture.model.named_modules())
        used = {use.module for layer in self.layers for use in layer.uses}
        handles = [modules[name].register_forward_hook(keep) for name in used if name in modules]
        keys = examples.keys[list(part.indices)].to(capture.device)
        info = BatchInfo(torch.tensor(part.indices))
        try:
            with capture.hooks(), torch.no_grad(), kept.watching():
                capture.backward(data, Loss(), info, keys, emit)
        finally:
            for handle in handles:
                handle.remove()
        size = positions(examples, part)
        self.several = any(wide)
        return kept.total / size, (2 * kept.largest + max(rows_bytes)) / size

    def _rows(self) -> int:
        """Rows of the dual form; none for others."""
        if not isinstance(self.method, Dual):
            return 0
        found = None
        if self.method.fisher == "exact":
            found = dual_rows(self.capture, self.examples, cut=self.method.cut)
        draws = self.method.draws if self.method.fisher == "mc" else 1
        return self.n * draws if found is None else found

    @property
    def batch(self) -> int:
        """What one batch takes."""
        size = positions(self.examples, self.largest)
        chunk = 0
        if self.several:
            numel = max(layer.numel for layer in self.layers)
            chunk = 3 * self.itemsize * min(1 << 24, len(self.largest.indices) * numel)
        return int(size * (self.per_position + self.transient)) + chunk

    @property
    def factors(self) -> int:
        """Numbers in the second moments of all layers' sides."""
        if not isinstance(self.method, KFAC):
            return 0
        sides: dict[str, int] = {}
        for layer in self.layers:
            groups, out, in_ = layer.shape
            for name, d in ((f"A:{layer.input_group}", in_), (f"G:{layer.name}", out)):
                sides[name] = groups * (d * d if d <= self.method.max_factor else d)
        return sum(sides.values())

    @property
    def spectrum(self) -> int:
        """Numbers in the eigenvalues, all folds."""
        return (self.method.folds + self.own_bases) * self.n_parameters

    @property
    def own_bases(self) -> int:
        """Eigenbases beside that of all data, one a fold where intervals get their own."""
        method = self.method
        return (
            method.folds if isinstance(method, EKFAC) and method.has_own_bases(self.layers) else 0
        )

    @property
    def row_numel(self) -> int:
        """Numbers in the dual form's rows."""
        each = 0
        for layer in self.layers:
            sides = layer.shape[0] * (layer.shape[1] + layer.shape[2])
            each += min(layer.numel, sides) if not self.several else layer.numel
        return self.n_rows * each

    def _moments_of_work(self) -> list[dict[str, int]]:
        """What is held together at each stretch of the work."""
        b, p, q = self.itemsize, self.n_parameters, self.n_queries
        batch = {"one batch": self.batch}
        trace = batch | {
            "queries": 3 * b * q * p,
            "scores": 3 * 8 * q * self.n,
        }
        if isinstance(self.method, Dual):
            gram = 8 * self.n_rows**2
            rows = {"rows": b * self.row_numel}
            kept = self.method.folds if self.method.folds > 1 else 0
            copies = int(0.8 * b * self.row_numel + 0.64 * gram) * kept
            return [
                batch | {"rows": 2 * b * self.row_numel},
                rows | {"Gram matrix": 4 * gram},
                rows | {"Gram matrix": 3 * gram, "replicates": copies} | trace,
            ]
        if isinstance(self.method, Dense):
            rows = b * self.n * p
            return [
                batch | {"rows": 2 * rows, "matrix": 3 * 8 * p * p},
                {"matrix": 3 * 8 * p * p} | trace,
            ]
        spectrum = b * (self.spectrum + p)
        kept = self.method.folds if self.method.folds > 1 else 0
        copies = b * kept * (self.method.folds + 1) * p  # sums, eigenvalues, and f of them
        sets = 1 + self.own_bases
        return [
            batch | {"factors": (2 + sets) * b * self.factors},
            batch | {"factors": 2 * sets * b * self.factors, "eigenvalues": spectrum},
            {"factors": sets * b * self.factors, "eigenvalues": spectrum, "damping": 2 * 8 * p},
            {"factors": sets * b * self.factors, "eigenvalues": spectrum, "replicates": copies}
            | trace,
        ]

    def peak(self) -> dict[str, int]:
        """The parts at the stretch of work that takes the most."""
        return max(self._moments_of_work(), key=lambda parts: sum(parts.values()))

    def disk(self) -> dict[str, int]:
        """Bytes that the fit writes."""
        b = self.itemsize
        if isinstance(self.method, Dual):
            fit = b * self.row_numel + 8 * self.n_rows**2
            return {
                "fit": fit,
                "checkpoints": 2 * b * self.row_numel,
                "scores": 4 * self.n_queries * self.n,
            }
        if isinstance(self.method, Dense):
            return {"fit": 8 * self.n_parameters**2, "scores": 4 * self.n_queries * self.n}
        state = 0 if isinstance(self.method, Identity) else max(self.factors, self.spectrum)
        return {
            "fit": b * ((1 + self.own_bases) * self.factors + self.spectrum),
            "checkpoints": 2 * b * state,
            "scores": 4 * self.n_queries * self.n,
        }

    def problems(self, available: int) -> tuple[list[str], list[str], float]:
        """Why memory does not suffice, notes, and by how much batches should shrink."""
        if isinstance(self.method, Dual) and self.n_rows > self.method.max_rows:
            return (
                [
                    f"The dual curvature would have {self.n_rows:,} rows, more than max_rows="
                    f"{self.method.max_rows:,}: raise `cut`, or use curvature='ekfac'."
                ],
                [],
                1.0,
            )
        peak = self.peak()
        total, batch = sum(peak.values()), peak.get("one batch", 0)
        if total <= 0.9 * available:
            return [], [], 1.0
        worst = max(
            (p for p in self._moments_of_work() if "one batch" in p), key=lambda p: sum(p.values())
        )
        room = 0.9 * available - (sum(worst.values()) - self.batch)
        if batch and 0.02 * self.batch < room and total - batch <= 0.9 * available:
            smaller = room / self.batch
            note = (
                f"Memory is short: with batches {smaller:.2f} times as large it fits; use the batch_size and "
                "batch_tokens given here."
            )
            return [], [note], smaller
        hungry = max(peak, key=lambda name: peak[name])
        remedy = {
            "queries": "ask fewer queries at a time",
            "scores": "ask fewer queries at a time",
            "rows": "use curvature='ekfac'",
            "Gram matrix": "use curvature='ekfac'",
            "matrix": "use curvature='ekfac'",
        }.get(
            hungry,
            "follow fewer layers (layers=… or skip=…), lower `folds`, or use curvature='kfac'",
        )
        problem = (
            f"The work needs {amount(total)} of memory and {amount(available)} are available; most of it, "
            f"{amount(peak[hungry])}, for the {hungry}: {remedy}."
        )
        return [problem], [], 1.0
