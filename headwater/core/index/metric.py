r"""The curvature of projected gradients (LoGra): $F = \frac1N \sum_n p_n p_n^\top$ for each layer, and its inverse.

It is made of the stored rows once a build has written them all. Its eigenvalues and eigenvectors lie in one file beside
the shards, with each row's squared length $p_n^\top (F + \rho I)^{-1} p_n$.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from headwater.core.damping import Damping, mean_of
from headwater.core.files import ArtifactDamaged, HashedFile, disk_room, sync_folder
from headwater.core.index.journal import REMEDY, Journal
from headwater.core.index.shards import Shard
from headwater.core.index.stored import metric_name, open_metric
from headwater.core.tensor_files import write_tensors
from headwater.numerics import spectral

_ROWS = 1024  # rows held in float64 at a time


def precondition(
    rows: Float[Tensor, "n k"],
    values: Float[Tensor, " k"],
    vectors: Float[Tensor, "k k"],
    damping: float,
) -> Float[Tensor, "n k"]:
    r"""$(F + \rho I)^{-1} p$ for each row; the eigenvalues stay as they are.

    Example:
        >>> precondition(torch.ones(1, 2).double(), torch.tensor([1.0, 3.0]).double(), torch.eye(2).double(), 1.0)
        tensor([[0.5000, 0.2500]], dtype=torch.float64)
    """
    return (rows.to(vectors) @ vectors / (values + damping)) @ vectors.mT


class ProjectedMetric:
    """The damped inverse of the projected gradients' second moment.

    Args:
        layers: Numbers of each layer in a row.
        spectra: Eigenvalues and eigenvectors of each layer.
        damping: Added to the eigenvalues.
    """

    def __init__(
        self,
        layers: dict[str, int],
        spectra: dict[str, tuple[Tensor, Tensor]],
        damping: Damping,
    ):
        self.layers, self.spectra, self.damping = layers, spectra, damping

    @classmethod
    def read(cls, folder: Path, journal: Journal) -> "ProjectedMetric | None":
        """What an index holds; None where its plain inner product is the influence."""
        file = open_metric(folder, journal)
        if file is None:
            return None
        try:
            spectra = {
                name: (file.get_tensor(f"values:{name}"), file.get_tensor(f"vectors:{name}"))
                for name in journal.layers
            }
        except SafetensorError as error:
            raise ArtifactDamaged(
                f"The second moments in {folder} lack some: {error}. {REMEDY}"
            ) from error
        for name, width in journal.layers.items():
            shapes = [tuple(x.shape) for x in spectra[name]]
            if shapes != [(width,), (width, width)]:
                raise ArtifactDamaged(
                    f"The second moments in {folder} of layer {name!r} have the shapes {shapes}. {REMEDY}"
                )
        return cls(journal.layers, spectra, Damping(**journal.space["damping"]))

    def __call__(self, rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """Rows whose plain inner products with stored rows are influences."""
        parts = rows.split(list(self.layers.values()), dim=1)
        found = [
            precondition(
                part, *self.spectra[name], self.damping.absolute(mean_of(self.spectra[name][0]))
            )
            for name, part in zip(self.layers, parts, strict=True)
        ]
        return torch.cat(found, dim=1).to(rows)

    def squares(self, rows: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Squared lengths of rows under the metric."""
        return (self(rows) * rows).sum(1)


def fit_metric(folder: Path, journal: Journal, *, again: bool = False) -> dict[str, Any]:
    """Make the file of second moments from all sealed rows; returns what the index writes down about it.

    Args:
        folder: The index.
        journal: What it holds.
        again: Make the file of the journal's metric again, from the shards that it was made of.
    """
    pending = [] if journal.pending is None else journal.pending.shards
    facts, old = [*journal.shards, *pending], journal.metric
    if again and old is not None:
        facts = [s for s in facts if s.number in old["shards"]] or facts
    shards = [Shard(folder / s.rows_file, journal.layout(s)) for s in facts]
    live = [torch.ones(s.n, dtype=torch.bool) if again else s.live() for s in facts]
    n = int(sum(mask.sum() for mask in live))
    moments = {k: torch.zeros(w, w, dtype=torch.float64) for k, w in journal.layers.items()}
    for shard, mask in zip(shards, live, strict=True):
        for start in range(0, len(shard), _ROWS):
            some = slice(start, start + _ROWS)
            rows = shard.rows(some)[mask[some]].double()
            for moment, part in zip(
                moments.values(), rows.split(list(journal.layers.values()), dim=1), strict=True
            ):
                moment.addmm_(part.mT, part)
    spectra = {name: spectral.eigh(moment / max(n, 1)) for name, moment in moments.items()}
    metric = ProjectedMetric(journal.layers, spectra, Damping(**journal.space["damping"]))
    tensors = {f"values:{k}": v for k, (v, _) in spectra.items()}
    tensors |= {f"vectors:{k}": v.contiguous() for k, (_, v) in spectra.items()}
    for fact, shard in zip(facts, shards, strict=True):
        parts = [
            metric.squares(shard.rows(slice(s, s + _ROWS))) for s in range(0, len(shard), _ROWS)
        ]
        tensors[f"squares:{fact.number}"] = torch.cat(parts).float()
    number = 0 if old is None else old["number"] + (not again)
    final = folder / metric_name(number)
    partial = final.with_name(f".{final.name}.partial")
    partial.unlink(missing_ok=True)
    with disk_room(folder, sum(t.nbytes for t in tensors.values())), HashedFile(partial) as file:
        write_tensors(file, tensors)
    partial.replace(final)
    sync_folder(folder)
    return {"number": number, "shards": [s.number for s in facts]} | file.facts
