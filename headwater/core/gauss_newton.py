r"""Products with the exact Gauss–Newton matrix, $C v = \frac1N \sum_n J_n^\top H_n J_n v$, by a pass over the data.

$J_n$ is the Jacobian of the model's outputs in the followed parameters and $H_n$ the Hessian of the loss in the
outputs (Schraudolph 2002). No labels are drawn and no structure is assumed. The Hessian itself has the same form.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from headwater.core.capture import BatchPlan, Capture
from headwater.core.examples import Examples, to_device
from headwater.core.follow import evaluation_mode
from headwater.core.gradients import Gradients, dense
from headwater.core.layers import Layer
from headwater.core.prediction import Prediction
from headwater.core.sharding import refuse_sharded
from headwater.core.task import Task


class _Predicted(nn.Module):
    """A task's prediction as a module, so that the model's parameters can be replaced."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Prediction:
        return self.task.predict(self.model, batch)


class GaussNewtonProduct:
    """The exact Gauss–Newton matrix of a model over a dataset, known by its products.

    A model in half precision is run in float32, whose products are precise enough to solve systems with.

    Args:
        capture: The model with its followed layers.
        examples: The data.
        batches: How they are batched.
        at_once: Vectors multiplied in one pass.
    """

    def __init__(
        self,
        capture: Capture,
        examples: Examples,
        batches: Sequence[BatchPlan],
        *,
        at_once: int = 16,
    ):
        refuse_sharded(
            capture.model, "Products with the exact matrix", "pass cg_steps=0, or load it whole"
        )
        self.capture, self.examples, self.batches, self.at_once = (
            capture,
            examples,
            list(batches),
            at_once,
        )
        self.layers = list(capture.layers.values())
        self._module = _Predicted(capture.model, capture.task)
        named = dict(capture.model.named_parameters(remove_duplicate=False))
        self._parameters = {
            f"model.{name}": _wide(named[name].detach())
            for layer in self.layers
            for name in layer.parameters
        }
        followed = {id(named[n]) for layer in self.layers for n in layer.parameters}
        others = [*capture.model.named_parameters(), *capture.model.named_buffers()]
        self._others = {
            f"model.{name}": _wide(x.detach())
            for name, x in others
            if id(x) not in followed and _wide(x) is not x
        }

    def __call__(self, gradients: Gradients) -> Gradients:
        """C v for each of the given vectors."""
        parts = [
            self._chunk(gradients[s : s + self.at_once])
            for s in range(0, len(gradients), self.at_once)
        ]
        return Gradients(
            {
                name: torch.cat([dense(part.blocks[name]) for part in parts])
                for name in gradients.blocks
            }
        )

    def _chunk(self, gradients: Gradients) -> Gradients:
        tangents = parameters_of(gradients, self.layers)
        total = {name: torch.zeros_like(t) for name, t in tangents.items()}
        with evaluation_mode(self.capture.model), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            for plan in self.batches:
                batch = to_device(self.examples.batch(plan.indices), self.capture.device)
                batch = pytree.tree_map_only(Tensor, _wide, batch)
                for name, part in self._batch(batch, tangents).items():
                    total[name.removeprefix("model.")] += part
        n = sum(len(plan.indices) for plan in self.batches)
        mean = {name: t / n for name, t in total.items()}
        return Gradients({layer.name: layer.from_parameters(mean) for layer in self.layers})

    def _batch(self, batch: Any, tangents: dict[str, Tensor]) -> dict[str, Tensor]:
        """The product over one batch, summed over its examples, for parameters by their names here."""

        def predicted(parameters: dict[str, Tensor]) -> Prediction:
            return functional_call(self._module, self._others | parameters, (batch,))

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return predicted(parameters).outputs

        prediction = predicted(self._parameters)

        pull = vjp(outputs, self._parameters)[1]

        def one(tangent: dict[str, Tensor]) -> dict[str, Tensor]:
            change = jvp(outputs, (self._parameters,), (tangent,))[1]
            return pull(prediction.hessian_product(change).to(change))[0]

        return vmap(one)({f"model.{n}": t for n, t in tangents.items()})


class HessianProduct(GaussNewtonProduct):
    """The Hessian of the mean loss over a dataset, known by its products; it may have negative eigenvalues."""

    def _batch(self, batch: Any, tangents: dict[str, Tensor]) -> dict[str, Tensor]:
        total = _TotalLoss(self.capture.model, self.capture.task)

        def gradient(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
            return grad(lambda theta: functional_call(total, self._others | theta, (batch,)))(
                parameters
            )

        def one(tangent: dict[str, Tensor]) -> dict[str, Tensor]:
            return jvp(gradient, (self._parameters,), (tangent,))[1]

        return vmap(one)({f"model.{n}": t for n, t in tangents.items()})


class _TotalLoss(nn.Module):
    """The summed loss of a batch, as a module, so that its parameters can be replaced."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Tensor:
        return self.task.loss(self.model, batch).sum()


def _wide(x: Tensor) -> Tensor:
    """In float32 where it was in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def template(layers: Sequence[Layer], like: Tensor) -> Gradients:
    """One gradient of zeros, for the names and shapes of layers; precision and place are those of a tensor."""
    return Gradients({layer.name: like.new_zeros(1, *layer.block) for layer in layers})


def parameters_of(gradients: Gradients, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Layers' gradients as gradients of the model's parameters, each (n, *shape)."""
    found: dict[str, Tensor] = {}
    for layer in layers:
        found |= layer.to_parameters(dense(gradients.blocks[layer.name]))
    return found
