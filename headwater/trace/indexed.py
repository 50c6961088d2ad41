"""Influence looked up in an index of projected gradients, without a pass over the training data.

Choe et al. (2024), "What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence Functions",
arXiv:2405.13954; the whitened coordinates are those of EK-FAC (Grosse et al. 2023, arXiv:2308.03296).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.damping import Damping
from headwater.core.fit import Fit
from headwater.core.index import GradientIndex
from headwater.core.index.search import Mode, products
from headwater.core.scores import Scores, significance
from headwater.core.task import Measurement
from headwater.trace.base import Attributor
from headwater.trace.influence import Influence


@dataclass(frozen=True, kw_only=True)
class Indexed(Attributor):
    """Scores from an index: approximate, with the error that was measured when it was built.

    Args:
        index: The index.
        heldout: An index of examples that were held out of training, with the same coordinates; the scores'
            significance is measured against theirs.
        keep: How many to keep on each side of each query.
        mode: "dot" for influences in the measurement's unit, "relatif" or "cosine".
        where: Metadata to look among; see `GradientIndex.search`.
        copies: Cosine from which examples count as duplicates and are shown as one; None tells none.
        content: What an example of an id holds; equal ones are duplicates too.
        n_intervals: Always 0: a row has no interval.
    """

    paper: ClassVar[str] = "arXiv:2405.13954"

    index: GradientIndex
    heldout: GradientIndex | None = None
    keep: int | None = 100
    mode: Mode = "dot"
    where: Mapping[str, Any] | None = None
    copies: float | None = None
    content: Callable[[str], Any] | None = None
    n_intervals: int = 0

    def attribute(
        self,
        fit: Fit,
        queries: Any,
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        names: Sequence[str] | None = None,
        control: Any = None,
        by_layer: bool = False,
        group_by: str | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Scores of the strongest examples, as `Influence(keep=…)` gives them.

        Args:
            fit: The fit that the index was made with.
            queries: Examples, like the training data.
            measurement: What is asked; the task's own when left out.
            weights: Linear combinations of queries to ask about (group, query).
            names: Names of those.
            control: Must be None: held-out examples have an index of their own.
            by_layer: Also return each layer's part; totals of layers are those of the kept examples.
            group_by: Metadata column to total by.
            progress: Called with (done, total, note).
        """
        if control is not None:
            raise ValueError(
                "Held-out examples are looked up too: pass Indexed(heldout=…), an index of them."
            )
        asked = self.index.ask(
            fit, queries, measurement=measurement, weights=weights, names=names, progress=progress
        )
        scores = self.index.search(
            asked,
            keep=self.keep or len(self.index),
            mode=self.mode,
            where=self.where,
            group_by=group_by,
            by_layer=by_layer,
            copies=self.copies,
            content=self.content,
        )
        facts = {"curvature": fit.facts["options"]["curvature"], "n_train": len(self.index)}
        found: dict[str, Any] = {"facts": scores.facts | facts}
        if self.heldout is not None and self.mode == "dot":
            self.heldout.check(asked)
            live = self.heldout.live
            parts = [p for p, _ in products(self.heldout, asked.rows.float(), live)]
            held = -torch.cat(parts, dim=1) / self.index.journal.n_train
            found |= {"control": held, "significance": significance(scores.values, held)}
        return replace(scores, **found)

    def tokens(
        self,
        fit: Fit,
        queries: Any,
        chosen: Sequence[int],
        *,
        measurement: Measurement | None = None,
        weights: Float[Tensor, "group query"] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Float[Tensor, "asked chosen pos"], Float[Tensor, "asked chosen"]]:
        """What each position of some examples carries of their unprojected scores, by a pass over those alone."""
        method = Influence(damping=index_damping(self.index), precision="model")
        parts = method.tokens(
            fit, queries, chosen, measurement=measurement, weights=weights, progress=progress
        )
        ratio = len(fit.train) / self.index.journal.n_train
        return parts[0] * ratio, parts[1] * ratio


def index_damping(index: GradientIndex) -> Damping | str:
    """The damping of the rows, or the fit's own where they have another curvature."""
    space = index.journal.space
    return "auto" if space["kind"] == "logra" else Damping(**space["damping"])
