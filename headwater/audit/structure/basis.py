r"""The local interaction basis (LIB): directions of each node layer, and how much they act on the next one's.

Bushnaq et al. (2024), "The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely Interacting
Features in Neural Networks", arXiv:2405.10928.

From the output backwards, each node layer's activations are whitened and turned to the eigenvectors of the Jacobian's
second moment (`headwater.numerics.interaction_basis`). Directions that vary and that the next layer depends on come
first, and what varies without effect is dropped: linear dependence among activations or among gradients leaves no
trace. An edge says how much a direction acts on one of the next node layer,

$$E_{ij} = \mathbb E_x \Big( \sum_t \hat f^l_{tj} \int_0^1 \frac{\partial \hat f^{l+1}_i(\alpha \hat f^l)}
{\partial \hat f^l_{tj}} \, d\alpha \Big)^2,$$

summed over input positions t before the square and averaged over output positions. Biases are folded into a constant
activation, a node of its own that comes first.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.capture import Progress
from headwater.core.examples import Examples, as_examples, take, to_device
from headwater.core.fingerprint import fingerprint_model
from headwater.core.fit import Fit
from headwater.core.sections import OUTPUT, Activations, Sections, Step, default_nodes, steps_of
from headwater.core.store import Artifact, ArtifactWriter
from headwater.numerics import noise
from headwater.numerics.interaction_basis import (
    Directions,
    Principal,
    Rule,
    integration_points,
    interaction_directions,
    kept_apart,
    neuron_directions,
    principal,
    principal_directions,
)

Basis = Literal["lib", "pca", "neuron"]
Formula = Literal["jacobian", "integrated", "(1-0)*alpha"]
EdgeFormula = Literal["jacobian", "integrated"]
_AT_ONCE = 1 << 22  # numbers of gradients held at a time
_WIDEST = 8193  # activations with their constant


@dataclass(frozen=True)
class NodeLayer:
    r"""One node layer in its basis.

    Attributes:
        name: Its name, that of the step that reads it.
        directions: The basis; $\hat f = f C$ with the constant as last coordinate of f.
        n_neurons: Activations, without the constant.
        rank: Directions along which they vary.
        n_rows: Positions that it was found on.
    """

    name: str
    directions: Directions
    n_neurons: int
    rank: int
    n_rows: int

    @property
    def n_nodes(self) -> int:
        """Directions of the basis, without the constant."""
        return self.directions.n_nodes


@dataclass(frozen=True, kw_only=True)
class InteractionBasis:
    """A basis of each node layer and the edges between neighbours.

    Attributes:
        layers: The node layers, the outputs last.
        edges: For each section $E$ (node of the next layer, node); None where they were left out.
        basis: "lib", "pca" or "neuron".
        facts: Options and costs: "sweeps" over the data, and "backwards" of a section for an example.
    """

    layers: tuple[NodeLayer, ...]
    edges: tuple[Tensor, ...] | None
    basis: Basis
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the node layers."""
        return [layer.name for layer in self.layers]

    @property
    def passes(self) -> float:
        """About as many plain passes over the data as it took beyond the fit, sections counted by their parameters."""
        return self.facts["passes"]

    def table(self) -> dict[str, list]:
        """A row for each node layer."""
        each = self.layers
        return {
            "node_layer": self.names,
            "neurons": [x.n_neurons for x in each],
            "rank": [x.rank for x in each],
            "nodes": [x.n_nodes for x in each],
            "largest": [float(_of_nodes(x.directions).max()) for x in each],
            "smallest": [float(_of_nodes(x.directions).min()) for x in each],
        }

    def save(self, folder: str | Path) -> None:
        """Write it as an artifact."""
        body = {
            "basis": self.basis,
            "facts": self.facts,
            "layers": [
                [x.name, x.n_neurons, x.rank, x.n_rows, x.directions.constant, x.directions.apart]
                for x in self.layers
            ],
        }
        with ArtifactWriter(
            folder, kind="interaction-basis", facts=body, made_from=self.facts["made_from"]
        ) as writer:
            for n, layer in enumerate(self.layers):
                for name in ("C", "C_pinv", "weight"):
                    writer.tensor(f"{n}/{name}", getattr(layer.directions, name))
            for n, edges in enumerate(self.edges or ()):
                writer.tensor(f"{n}/edges", edges)

    @classmethod
    def load(cls, folder: str | Path) -> "InteractionBasis":
        """Read what `save` wrote."""
        artifact = Artifact.open(folder, kind="interaction-basis")
        tensors, layers = dict(artifact.tensors()), []
        for n, (name, n_neurons, rank, n_rows, *more) in enumerate(artifact.facts["layers"]):
            constant, apart = more[0], tuple(more[1]) if len(more) > 1 else ()
            C, C_pinv, weight = (tensors[f"{n}/{part}"] for part in ("C", "C_pinv", "weight"))
            directions = Directions(C, C_pinv, weight, constant, apart)
            layers.append(NodeLayer(name, directions, n_neurons, rank, n_rows))
        edges = [tensors[f"{n}/edges"] for n in range(len(layers)) if f"{n}/edges" in tensors]
        return cls(
            layers=tuple(layers),
            edges=tuple(edges) or None,
            basis=artifact.facts["basis"],
            facts=artifact.facts["facts"],
        )

    def __repr__(self) -> str:
        lines = [
            f"InteractionBasis({self.basis}, {len(self.layers)} node layers, {self.facts['n_examples']:,} examples, "
            f"about {self.passes:.1f} passes beyond the fit)"
        ]
        lines += [
            f"  {x.name}: {x.n_neurons} neurons, rank {x.rank}, {x.n_nodes} nodes"
            for x in self.layers
        ]
        return "\n".join(lines)


def _of_nodes(directions: Directions) -> Tensor:
    found = directions.weight[int(directions.constant) :]
    return found if len(found) else directions.weight.new_zeros(1)


def sections_of(fit: Fit, nodes: Sequence[str] | None, steps: Sequence[Step] | None) -> Sections:
    """The fit's model cut at node layers, by default at the inputs of its linear and convolutional layers."""
    steps = steps_of(fit.model) if steps is None else steps
    nodes = default_nodes(steps) if nodes is None else nodes
    sections = Sections(fit.model, fit.task, steps, nodes)
    probe = fit.train.batch(range(min(2, len(fit.train))))
    sections.check(to_device(probe, sections.device))
    return sections


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Which combinations of the next layer's directions are differentiated.

    Attributes:
        n: Random signs over output positions in place of one derivative for each position; None takes each.
        alphas: Points at which the section is differentiated, as shares of its input.
        weights: Their weights in the integral.
        seed: Seed of the signs.
    """

    n: int | None = None
    alphas: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)
    seed: int = 0

    def vectors(self, after: Activations, keys: Tensor) -> Float[Tensor, "source batch pos"]:
        """What output positions count in each derivative; over all, squares sum to one for each position."""
        batch, pos = after.f.shape[:2]
        if self.n is None or pos == 1:
            found = torch.eye(pos, dtype=after.f.dtype, device=after.f.device)
            found = found[:, None].expand(-1, batch, -1)
        else:
            counter = torch.arange(self.n * pos).reshape(self.n, 1, pos).expand(-1, batch, -1)
            drawn = noise.uniform(keys[None, :, None].expand_as(counter), counter, self.seed) < 0.5
            found = (drawn.to(after.f) * 2 - 1) / self.n**0.5
        return found if after.mask is None else found * after.mask.to(found)


def gradients(
    sections: Sections,
    number: int,
    f: Float[Tensor, "batch pos dim"],
    like: Activations,
    upstream: Float[Tensor, "k batch pos_out dim_out"],
    sources: Sources,
    batch: Any,
) -> Float[Tensor, "k batch pos dim"]:
    """Gradients of combinations of a section's output in its input, integrated along the way from zero.

    Args:
        sections: The model.
        number: Which section.
        f: What it reads.
        like: The node layer's activations, for their shapes.
        upstream: The combinations.
        sources: Where the derivative is taken.
        batch: The batch.
    """
    k, n = upstream.shape[:2]
    again = take(
        batch, torch.arange(n).repeat(k)
    )  # the section once for each, side by side in one batch
    total: Tensor | None = None
    for alpha, weight in zip(sources.alphas, sources.weights, strict=True):
        point = (alpha * f).detach().repeat(k, 1, 1).requires_grad_()
        with torch.enable_grad():
            out = sections.run(number, point, like, again)
        (found,) = torch.autograd.grad(out, point, upstream.flatten(0, 1))
        total = weight * found if total is None else total.add_(found, alpha=weight)
    assert total is not None
    return total.unflatten(0, (k, n))


def _upstream(
    vectors: Float[Tensor, "source batch pos"], C: Float[Tensor, "dim node"], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Directions of the next layer and what is differentiated for them, in chunks of about `size` numbers."""
    n_sources, n_nodes = len(vectors), C.shape[1]
    step = max(1, size // max(vectors[0].numel() * len(C), 1))
    for start in range(0, n_sources * n_nodes, step):
        flat = torch.arange(start, min(start + step, n_sources * n_nodes), device=C.device)
        node, source = flat // n_sources, flat % n_sources
        yield node, vectors[source][..., None] * C.mT[node][:, None, None, :]


def interaction_basis(
    fit: Fit,
    *,
    data: Any = None,
    nodes: Sequence[str] | None = None,
    steps: Sequence[Step] | None = None,
    basis: Basis = "lib",
    formula: Formula = "jacobian",
    edges: EdgeFormula | None = "jacobian",
    n_points: int = 1,
    rule: Rule = "gauss",
    n_sources: int | None = None,
    center: bool = True,
    cutoff: float = 1e-5,
    relative: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> InteractionBasis:
    r"""Find the interaction basis of a model's node layers, and the edges between them.

    Args:
        fit: The fitted model: an `nn.Sequential`, or one with a method `steps`.
        data: Examples; the training data when left out.
        nodes: Names of the node layers: modules of an `nn.Sequential` at whose inputs they lie. Those of linear and
            convolutional modules when left out. The outputs always come last.
        steps: The model's forward pass in steps, for other models (`headwater.core.sections.Step`).
        basis: "lib"; "pca" (eigenvectors of the activations) or "neuron" for comparison.
        formula: How M' is made: of the "jacobian", of gradients "integrated" from zero, or of the one integrated
            gradient of "(1-0)*alpha", $\sum_i (\hat f_i(1) - \hat f_i(0)) \hat f_i(\alpha)$, which is cheapest.
        edges: "jacobian" (gradient at the activation times the activation), "integrated", or None for no edges.
        n_points: Points of the integrals; one is the midpoint.
        rule: "gauss" or "trapezoid".
        n_sources: Random signs over output positions, in place of one derivative for each position; for texts.
        center: Keep the constant as a node of its own, and the others without mean.
        cutoff: Eigenvalues below are dropped, of the activations' second moment and of Λ.
        relative: Whether the cutoff is a share of each layer's largest eigenvalue.
        seed: Seed of the signs.
        progress: Called with (done, total, note).

    Raises:
        ValueError: The model cannot be cut there, a module is not supported, or nothing in a node layer matters.

    Example:
        >>> import headwater
        >>> from headwater.models.vision import mlp
        >>> x = torch.randn(64, 4)
        >>> model = mlp([4, 6, 3])
        >>> fit = headwater.fit(model, (x, model(x).argmax(1)), headwater.Classification())
        >>> interaction_basis(fit).names
        ['0', '2', 'output']
    """
    for name, value, offered in (
        ("basis", basis, Basis),
        ("formula", formula, Formula),
        ("edges", edges, EdgeFormula),
    ):
        if value not in (*get_args(offered), *[None] * (name == "edges")):
            raise ValueError(f"Expected {name} among {get_args(offered)}; got {value!r}.")
    if cutoff < 0 or (n_sources is not None and n_sources < 1):
        raise ValueError(
            f"cutoff must not be negative and n_sources 1 or more; got {cutoff} and {n_sources}."
        )
    started, examples = time.perf_counter(), fit.train if data is None else as_examples(data)
    fit.capture()  # refuses a model that was changed since
    sections = sections_of(fit, nodes, steps)
    find = _Finder(fit, examples, sections, center, cutoff, relative, progress)
    points = integration_points(n_points, rule)
    local = Sources(n=n_sources, seed=seed)
    along = Sources(n=n_sources, alphas=points[0], weights=points[1], seed=seed)

    moments, counts = find.moments()
    layers: list[NodeLayer] = []
    for number in reversed(range(len(sections.names))):
        name, d, moment = sections.names[number], len(moments[number]) - 1, moments[number]
        find.warn_if_few(name, d, counts[number])
        apart = find.apart[number]
        found = find.principal(moment, apart)
        if basis == "neuron":
            directions = neuron_directions(moment)
        elif basis == "pca" or name == OUTPUT:
            directions = principal_directions(found)
            if apart:
                ones = torch.ones(len(apart), dtype=torch.float64)
                directions = kept_apart(directions, moment, apart, ones, cutoff=cutoff)
        else:
            after = layers[-1].directions
            sources = local if formula == "jacobian" else along
            directions = find.interactions(number, found, moment, after, sources, formula)
        rank = len(found.D) - found.constant + len(apart)
        layers.append(NodeLayer(name, directions, d, rank, counts[number]))
    layers.reverse()
    matrices = None
    if edges is not None:
        chosen = local if edges == "jacobian" else along
        matrices = find.edges([x.directions for x in layers], chosen)
    facts = {
        "papers": ["arXiv:2405.10928"],
        "made_from": {
            "model": fingerprint_model(fit.model),
            "data": examples.fingerprint(),
            "task": fit.task.name,
        },
        "n_examples": len(examples),
        "formula": formula if basis == "lib" else None,
        "edges": edges,
        "n_points": n_points,
        "rule": rule,
        "n_sources": n_sources,
        "center": center,
        "cutoff": cutoff,
        "relative": relative,
        "sweeps": find.sweeps,
        "backwards": find.backwards,
        "passes": find.passes,
        "seconds": time.perf_counter() - started,
    }
    return InteractionBasis(layers=tuple(layers), edges=matrices, basis=basis, facts=facts)


class _Finder:
    """The sums over data behind a basis and its edges.

    Args:
        fit: The fitted model.
        examples: The data.
        sections: The model, cut.
        center: Whether the constant is a node of its own.
        cutoff: Eigenvalues below are dropped.
        relative: Whether as a share of the largest.
        progress: Called with (done, total, note).
    """

    def __init__(
        self,
        fit: Fit,
        examples: Examples,
        sections: Sections,
        center: bool,
        cutoff: float,
        relative: bool,
        progress: Progress | None,
    ):
        self.examples, self.sections, self.center = examples, sections, center
        self.cutoff, self.relative, self.progress = cutoff, relative, progress
        self.batches = fit.batches(examples)
        self.sweeps, self.backwards, self.passes = 0, 0, 0.0
        self.apart: list[list[int]] = [[] for _ in sections.names]

    def over(self, note: str) -> Iterator[tuple[Tensor, Any, list[Activations]]]:
        """Keys, data and activations of each batch."""
        self.sweeps += 1
        self.passes += 1 / 3  # a forward pass without a backward one
        with self.sections.hooks():
            batches = self.sections.over(self.examples, self.batches)
            for done, (plan, data, found) in enumerate(batches, start=1):
                yield self.examples.keys[torch.tensor(plan.indices)], data, found
                if self.progress is not None:
                    self.progress(done, len(self.batches), note)

    def warn_if_few(self, name: str, d: int, n: int) -> None:
        if n < 2 * d:
            warnings.warn(
                f"Node layer {name!r} has {d} activations and was seen on {n} rows only: fewer than twice as many, so "
                "that its rank says more about the data than about the model. Give more data.",
                stacklevel=3,
            )

    def moments(self) -> tuple[list[Tensor], list[int]]:
        """Second moments of all node layers' activations, with their constant, and over how many positions."""
        sums: list[Tensor | float] = [0.0] * len(self.sections.names)
        counts = [0] * len(sums)
        for _, _, found in self.over("activations"):
            for number, layer in enumerate(found):
                if layer.f.shape[-1] > _WIDEST:
                    raise ValueError(
                        f"Node layer {self.sections.names[number]!r} has {layer.f.shape[-1] - 1:,} activations, whose "
                        f"second moment does not fit; {_WIDEST - 1:,} do. Choose narrower node layers, or let the task "
                        "predict from fewer outputs."
                    )
                self.apart[number] = self.sections.apart(number, layer)
                rows = layer.rows().double()
                sums[number] = sums[number] + rows.mT @ rows
                counts[number] += len(rows)
        moments = [torch.as_tensor(s).cpu() / n for s, n in zip(sums, counts, strict=True)]
        return moments, counts

    def principal(self, moment: Tensor, apart: Sequence[int] = ()) -> Principal:
        """Principal directions of the activations that are not kept apart."""
        others = [i for i in range(len(moment)) if i not in set(apart)]
        options = {"center": self.center, "cutoff": self.cutoff, "relative": self.relative}
        return principal(moment[others][:, others], **options)

    def interactions(
        self,
        number: int,
        found: Principal,
        moment: Tensor,
        after: Directions,
        sources: Sources,
        formula: Formula,
    ) -> Directions:
        """The interaction basis of a node layer, from that of the next; what is kept apart has nodes of its own."""
        single, n, size = formula == "(1-0)*alpha", 0, len(moment)
        M, Lambda = (
            torch.zeros(size, size, dtype=torch.float64, device=self.sections.device)
            for _ in range(2)
        )
        C = after.C[:, int(after.constant) :]
        for keys, data, layers in self.over(f"basis of {self.sections.names[number]}"):
            here, there = layers[number], layers[number + 1]
            Cx = C.to(there.f)
            if single:
                chunks = [(None, self._difference(number, layers, Cx, data)[None])]
            else:
                chunks = _upstream(sources.vectors(there, keys), Cx, _AT_ONCE)
            for _, upstream in chunks:
                g = gradients(self.sections, number, here.f, here, upstream, sources, data)
                rows = g.flatten(0, 2).double()
                M += rows.mT @ rows
                self._count(number, upstream, sources, n)
                if single:
                    Lambda += rows.mT @ here.f.flatten(0, 1).double()
            n += here.n_positions
        M, Lambda, apart = M.cpu() / n, Lambda.cpu() / n, self.apart[number]
        others = [i for i in range(size) if i not in set(apart)]
        try:
            directions = interaction_directions(
                found,
                M[others][:, others],
                Lambda_prime=Lambda[others][:, others] if single else None,
                cutoff=self.cutoff,
                relative=self.relative,
            )
            if apart:
                gains = M.diagonal()[apart].sqrt()
                directions = kept_apart(directions, moment, apart, gains, cutoff=self.cutoff)
            return directions
        except ValueError as error:
            raise ValueError(f"Node layer {self.sections.names[number]!r}: {error}") from None

    def _count(self, number: int, upstream: Tensor, sources: Sources, seen: int) -> None:
        """Count the passes of a section, on the first batch."""
        if seen == 0:
            n = len(upstream) * len(sources.alphas)
            self.backwards += n
            self.passes += n * 2 / 3 * self.sections.share(number)

    def _difference(
        self, number: int, layers: list[Activations], C: Tensor, data: Any
    ) -> Float[Tensor, "batch pos dim"]:
        """What the section makes of its input beyond what it makes of zero, as weights of its outputs."""
        here, there = layers[number], layers[number + 1]
        with torch.no_grad():
            zero = self.sections.run(number, torch.zeros_like(here.f), here, data)
        found = (there.f - zero) @ C @ C.mT
        return found if there.mask is None else found * there.mask[..., None]

    def edges(self, directions: list[Directions], sources: Sources) -> tuple[Tensor, ...]:
        """The edges of all sections, in one sweep."""
        shapes = [(b.C.shape[1], a.C.shape[1]) for a, b in pairwise(directions)]
        sums = [torch.zeros(s, dtype=torch.float64, device=self.sections.device) for s in shapes]
        counts = [0] * len(sums)
        for keys, data, layers in self.over("edges"):
            for number, (a, b) in enumerate(pairwise(directions)):
                here, there = layers[number], layers[number + 1]
                C, C_pinv, C_next = (m.to(here.f) for m in (a.C, a.C_pinv, b.C))
                hat = here.f @ C
                point, vectors = hat @ C_pinv, sources.vectors(there, keys)
                for node, upstream in _upstream(vectors, C_next, _AT_ONCE):
                    g = gradients(self.sections, number, point, here, upstream, sources, data)
                    each = ((g @ C_pinv.mT).double() * hat.double()).sum(2)
                    sums[number].index_add_(0, node, each.square().sum(1))
                    self._count(number, upstream, sources, counts[number])
                counts[number] += there.n_positions
        return tuple((s / n).cpu() for s, n in zip(sums, counts, strict=True))
