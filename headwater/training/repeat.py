"""Retraining by repeating a recorded run, with other weights or labels of its examples and nothing else changed."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwater.core.examples import Examples
from headwater.core.fingerprint import fingerprint_json
from headwater.training.run import Run


class Relabelled(Examples):
    """A classifier's examples of which some carry another label, under the same ids.

    Args:
        base: The examples; their batches are tuples that end with the labels, or have them under `labels`.
        labels: New labels by number of the example.
    """

    def __init__(self, base: Examples, labels: Mapping[int, int]):
        self.base, self.labels = base, dict(labels)
        self.ids, self.lengths, self.metadata = base.ids, base.lengths, base.metadata

    def batch(self, indices: Sequence[int]) -> Any:
        batch = self.base.batch(indices)
        given = batch["labels"] if isinstance(batch, Mapping) else batch[-1]
        if not isinstance(given, Tensor) or given.numel() != len(indices):
            raise ValueError(
                f"Only examples of one class each can be relabelled; a batch of {len(indices)} has labels of shape "
                f"{tuple(getattr(given, 'shape', ()))}."
            )
        new = given.clone()
        for row, i in enumerate(indices):
            if int(i) in self.labels:
                new.view(-1)[row] = self.labels[int(i)]
        if isinstance(batch, Mapping):
            return {**batch, "labels": new}
        return (*batch[:-1], new)

    def fingerprint(self) -> str:
        return fingerprint_json([self.base.fingerprint(), sorted(self.labels.items())])


@dataclass(frozen=True, eq=False, kw_only=True)
class RepeatedRun:
    """Retrains by repeating a recorded run: same initial weights, same order.

    Args:
        run: The recorded run.
        measure: From the trained model to one number a query.
    """

    run: Run
    measure: Callable[[nn.Module], Float[Tensor, " query"]]

    def with_labels(self, labels: dict[int, int]) -> "RepeatedRun":
        """The same run, with new labels by number of the training example."""
        return replace(self, run=replace(self.run, train=Relabelled(self.run.train, labels)))

    def __call__(self, weights: Float[Tensor, " train"], seed: int) -> Float[Tensor, " query"]:
        if seed != self.run.trajectory.seed:
            raise ValueError(
                f"The recorded run has seed {self.run.trajectory.seed} and can only be repeated as it was; got seed "
                f"{seed}."
            )
        model = copy.deepcopy(self.run.model)
        final = self.run.repeat(weights.to(self.run.device)).parameters
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in final:
                    p.copy_(final[name])
        return self.measure(model)
