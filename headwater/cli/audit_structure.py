"""`headwater audit structure`: how much of a model's weights its data use, which directions matter, and its modules."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from headwater.cli.audit import opened
from headwater.cli.common import emit_json, progress_bar, save_plot, say
from headwater.cli.flags import parse, require
from headwater.cli.question import check_name

if TYPE_CHECKING:
    from headwater.audit.structure import Ablation, Degeneracy, InteractionBasis, InteractionGraph
    from headwater.core.curvature.jacobian import JacobianMoments
    from headwater.core.fit import Fit

STRUCTURES = "structures"


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Count the directions of a model's weights that do nothing; with --basis also find those that matter.

    Everything is written into the run folder, and what took passes over the data is kept there, so that a killed run,
    and another question, go on from it.

    Example: headwater audit structure runs/mine --basis lib

    Args:
        run: The run folder of `headwater fit`; or any folder with a fit in its subfolder fit, with --program.
        program: For models of other kinds: file.py:function, which is run with the folder, and returns (model, data,
            task), and at will held-out data as a fourth.
        basis: lib, the local interaction basis; pca or neuron to compare; none looks at no directions.
        nodes: Names of the node layers at which the model is cut; those before linear maps when left out.
        sources: Random signs over positions in place of a derivative for each position, for texts.
        tolerance: With --basis: how much accuracy (or loss) may be lost where nodes and edges are left out.
        draws: Random combinations of outputs in place of each output; by their number when left out.
        delta: Share of the data on which two ReLUs that count as one may differ.
        name: Name of the result in the run folder.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    program: str | None = None
    basis: Literal["none", "lib", "pca", "neuron"] = "none"
    nodes: tuple[str, ...] = ()
    sources: int | None = None
    tolerance: float = 0.005
    draws: int | None = None
    delta: float = 0.0
    name: str = "structure"
    json: bool = False

    def check(self) -> None:
        """Refuse what nothing can be counted with."""
        require("--draws", self.draws, "at least 1", self.draws is None or self.draws >= 1)
        require("--sources", self.sources, "at least 1", self.sources is None or self.sources >= 1)
        require("--delta", self.delta, "from 0 to below 0.5", 0 <= self.delta < 0.5)
        require("--tolerance", self.tolerance, "0 or more", self.tolerance >= 0)
        check_name(self.name, "result")
        if self.basis == "none" and (self.nodes or self.sources):
            raise ValueError("--nodes and --sources go with --basis lib, pca or neuron.")


def run(words: list[str]) -> int:
    command = parse(Structure, words, prog="audit structure")
    fit, _, heldout = opened(command.run, command.program)
    place = command.run / STRUCTURES / command.name
    with progress_bar(quiet=command.json) as progress:
        report = _degeneracy(command, fit, place, progress)
        found = None
        if command.basis != "none":
            found = _directions(command, fit, heldout, place, progress)
    if command.json:
        emit_json(_as_json(report, found))
        return 0
    print(report)
    if found is not None:
        basis, nodes, edges, graph = found
        print(f"\n{basis}\n\n{nodes}\n\n{edges}\n\n{graph}")
        seen = "held-out examples" if heldout is not None else "the training examples"
        say(f"What is needed was measured on {seen}.")
    say(f"The tables are in {place}.")
    if found is None and _can_be_cut(fit):
        program = f" --program {command.program}" if command.program else ""
        say(f"Next: headwater audit structure {command.run}{program} --basis lib")
    return 0


def _degeneracy(command: Structure, fit: "Fit", place: Path, progress: Any) -> "Degeneracy":
    """The report; its second moments are kept, and taken where they are of this model, these data and draws."""
    from headwater.audit.structure import degeneracy
    from headwater.core.curvature.jacobian import JacobianMoments, jacobian_moments
    from headwater.core.files import ArtifactError, write_bytes
    from headwater.data.text import csv_bytes

    kept, moments, paid = place / "jacobian", None, 0.0
    with suppress(ArtifactError):  # none, damaged, or of something else
        moments = JacobianMoments.load(kept, fit)
    if moments is None or not _serves(moments, fit, command.draws):
        moments = jacobian_moments(fit, draws=command.draws, progress=progress)
        moments.facts["asked_draws"] = command.draws
        moments.save(kept)
        paid = moments.passes
    elif not command.json:
        say(f"  second moments were collected before; read from {kept}")
    found = degeneracy(fit, moments=moments, delta=command.delta, progress=progress)
    found = replace(found, passes=found.passes + paid)
    write_bytes(place / "layers.csv", csv_bytes(found.table()))
    return found


def _serves(moments: "JacobianMoments", fit: "Fit", draws: int | None) -> bool:
    """Whether moments are of all layers that a fit follows, and of as many draws as are asked for."""
    from headwater.core.curvature.jacobian import moment_layers

    names = {layer.name for layer in moment_layers(fit)}
    return names <= set(moments.groups) and moments.facts.get("asked_draws") == draws


def _directions(
    command: Structure, fit: "Fit", heldout: Any, place: Path, progress: Any
) -> "tuple[InteractionBasis, Ablation, Ablation, InteractionGraph]":
    """The basis, what the model needs of it, and its modules; a finished basis is taken again."""
    from headwater.audit.structure import (
        InteractionBasis,
        ablate,
        interaction_basis,
        interaction_graph,
    )
    from headwater.core.files import ArtifactError, write_bytes
    from headwater.data.text import csv_bytes

    nodes = list(command.nodes) or None
    asked = {"basis": command.basis, "nodes": nodes, "sources": command.sources}
    kept, basis = place / command.basis, None
    with suppress(ArtifactError):
        basis = InteractionBasis.load(kept)
    of = {k: fit.made_from[k] for k in ("model", "data")}
    if (
        basis is None
        or basis.facts.get("asked") != asked
        or not of.items() <= basis.facts["made_from"].items()
    ):
        options: dict[str, Any] = {"basis": command.basis, "n_sources": command.sources}
        basis = interaction_basis(fit, nodes=nodes, progress=progress, **options)
        basis.facts["asked"] = asked
        basis.save(kept)
    options = {"data": heldout, "tolerance": command.tolerance, "progress": progress}
    by_nodes = ablate(fit, basis, "nodes", **options)
    by_edges = ablate(fit, basis, "edges", **options)
    graph = interaction_graph(basis, floor=by_edges)
    for name, found in (("nodes", by_nodes), ("edges", by_edges), ("modules", graph)):
        write_bytes(place / f"{command.basis}-{name}.csv", csv_bytes(found.table()))
        save_plot(place / f"{command.basis}-{name}.png", found.plot)
    return basis, by_nodes, by_edges, graph


def _can_be_cut(fit: "Fit") -> bool:
    """Whether the model's forward pass is known as a list of steps."""
    from headwater.core.sections import steps_of

    try:
        return bool(steps_of(fit.model))
    except ValueError:
        return False


def _as_json(report: "Degeneracy", found: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "layers": report.table(),
        "free": report.free,
        "parameters": report.n_parameters,
        "sync_blocks": {x.name: [len(b) for b in x.blocks] for x in report.sync},
        "passes": report.passes,
        "facts": report.facts,
    }
    if found is None:
        return told
    basis, nodes, edges, graph = found
    return told | {
        "basis": basis.table(),
        "nodes": nodes.table(),
        "edges": edges.table(),
        "modules": {"sizes": graph.sizes, "modularity": graph.modularity, "method": graph.method},
        "passes_of_basis": basis.facts["passes"],
    }
