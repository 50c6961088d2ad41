"""`headwater cite`: BibTeX for what a run used."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from headwater.cli.common import emit_json
from headwater.cli.flags import RUN, parse


@dataclass(frozen=True, kw_only=True)
class Cite:
    """Print BibTeX entries of the papers behind a run's results.

    Example: headwater cite runs/mine > references.bib

    Args:
        run: The run folder.
        json: Print the entries as JSON, by paper.
    """

    run: tyro.conf.Positional[Path]
    json: bool = False


def run(words: list[str]) -> int:
    command = parse(Cite, words, prog="cite")
    from headwater.core.evidence import Evidence
    from headwater.core.provenance import PAPERS, cite, papers
    from headwater.core.store import Artifact

    if not (command.run / RUN).is_file():
        raise FileNotFoundError(f"{command.run} is no run folder (it has no {RUN}).")
    found = papers(Artifact.open(command.run / "fit", kind="fit").facts["fit"]["options"])
    for folder in sorted(
        p for p in (command.run / "traces").glob("*") if p.is_dir() and not p.name.startswith(".")
    ):
        found += Evidence.load(folder).facts.get("papers", [])
    for folder in sorted((command.run / "timelines").glob("*/data")):
        found += Artifact.open(folder, kind="timeline").facts["facts"]["papers"]
    used = list(dict.fromkeys(found))
    if command.json:
        emit_json({"papers": {paper: PAPERS[paper] for paper in used if paper in PAPERS}})
    else:
        print(cite({"papers": used}))
    return 0
