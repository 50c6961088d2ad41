"""`headwater survey`: look at every training example once, and keep what there is to see."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from headwater.cli.common import Opened, emit_json, progress_bar, run_session, say
from headwater.cli.flags import parse

if TYPE_CHECKING:
    from headwater.audit.survey import Survey as Result
    from headwater.core.capture import Progress

CORPUS = "corpus"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Look at every training example once: its self-influence and loss, outliers, near-duplicates, and its text.

    It takes a pass over the training data; with an index made by `headwater index build`, a forward pass. What was
    found is kept in the run folder, so that the evidence page shows the training data without the model. A killed
    survey goes on where it stopped.

    Example: headwater survey runs/mine --source topic

    Args:
        run: The run folder of `headwater fit`.
        source: Metadata column that names sources; a likely one when left out.
        top: Examples of largest self-influence that are printed.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    source: str | None = None
    top: int = 10
    json: bool = False


def run(words: list[str]) -> int:
    command = parse(Survey, words, prog="survey")
    found = survey(command.run, source=command.source, quiet=command.json)
    if command.json:
        emit_json(_told(found, command.top))
        return 0
    from headwater.report.survey import show

    show(found, top=command.top)
    say(f"Kept in {command.run / CORPUS}; look at it with `headwater report {command.run}`.")
    return 0


def survey(
    run: Path,
    *,
    source: str | None = None,
    quiet: bool = False,
    opened: Opened | None = None,
    progress: "Progress | None" = None,
) -> "Result":
    """The survey of a run, kept in its folder; a finished one of the same fit and index is read.

    Args:
        run: The run folder.
        source: Metadata column that names sources; a likely one when left out.
        quiet: Show no progress.
        opened: The run's model and data with its record, where they are open already.
        progress: Called with (done, total, note), in place of a progress bar.
    """
    from headwater.audit.survey import Survey as Result
    from headwater.audit.survey import survey as look
    from headwater.cli.index import FOLDER, journal_digests
    from headwater.core.checkpoint import Checkpoint
    from headwater.core.files import ArtifactError
    from headwater.core.fingerprint import fingerprint_json
    from headwater.core.fit import load
    from headwater.core.index import GradientIndex
    from headwater.core.locks import FolderLock
    from headwater.core.store import Artifact
    from headwater.core.task import CausalLM

    place = run / CORPUS
    session, _ = opened or run_session(run)
    manifest = Artifact.open(run / "fit", kind="fit").manifest
    question = fingerprint_json([manifest["files"], journal_digests(run), source])
    try:
        kept = Result.load(place)
        if kept.facts.get("question") == question:
            return kept
    except ArtifactError:
        pass  # none yet, or one that is made again
    fitted = load(run / "fit", session.language.model, session.train, CausalLM())
    index = GradientIndex(run / FOLDER) if (run / FOLDER).is_dir() else None
    unfinished = run / f".{CORPUS}.unfinished"
    with FolderLock(unfinished), progress_bar(quiet=quiet, to=progress) as heard:
        checkpoint = Checkpoint(unfinished / question[:16])
        found = look(fitted, index=index, source=source, checkpoint=checkpoint, progress=heard)
        found = replace(found, facts=found.facts | {"question": question})
        found.save(place)
        checkpoint.clear()
    if unfinished.is_dir() and not any(unfinished.iterdir()):
        unfinished.rmdir()
    return found


def _told(found: "Result", top: int) -> dict[str, Any]:
    """The survey as JSON: what stands out, and the facts."""
    from headwater.core.evidence import plain

    rows = found.table()
    return plain(
        {
            "n": len(found),
            "outliers": [found.ids[i] for i in found.top(len(found)) if bool(found.outlier[i])],
            "copies": sum(c is not None for c in rows["cluster"]),
            "top": [{name: column[i] for name, column in rows.items()} for i in found.top(top)],
            "source_column": found.source_column,
            "facts": found.facts,
        }
    )
