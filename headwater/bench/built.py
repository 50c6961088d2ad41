"""An index as a method of the table: built for one question in a temporary folder, asked, and thrown away."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch

from headwater.core.damping import Damping
from headwater.core.examples import as_examples
from headwater.core.fit import Fit
from headwater.core.index import GradientIndex, LoGra, Whitened
from headwater.core.index.encoding import Dtype
from headwater.core.scores import Scores
from headwater.trace import Indexed
from headwater.trace.base import Attributor, to_scores


@dataclass(frozen=True, kw_only=True)
class Built(Attributor):
    """What a new index of the training data answers, for every training example.

    Args:
        kind: What a row of the index is.
        dtype: How rows are stored.
    """

    paper: ClassVar[str] = "arXiv:2405.13954"

    kind: Whitened | LoGra
    dtype: Dtype = "int8"

    @property
    def damping(self) -> str | float | Damping:
        """The damping of the rows, or of their second moment."""
        return self.kind.damping

    def attribute(self, fit: Fit, queries: Any) -> Scores:
        """Scores of all pairs from the rows as they are stored; the time is that of the build and the question.

        Args:
            fit: The fit.
            queries: Examples, like the training data.
        """
        with TemporaryDirectory() as folder:
            index = GradientIndex.build(
                fit, Path(folder) / "index", kind=self.kind, dtype=self.dtype
            )
            found = Indexed(index=index, keep=None).attribute(fit, queries)
        order = torch.tensor(found.kept).argsort()  # rows lie in the order of their batches
        values = found.values[:, order]
        facts = {"damping": found.facts["damping"]}
        return to_scores(self, fit, as_examples(queries), values, unit="nats", facts=facts)
