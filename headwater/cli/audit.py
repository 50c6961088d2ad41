"""`headwater audit`: which labels, texts and inputs of the training data are wrong or odd, read off the fit."""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from headwater.cli.common import emit_json, progress_bar, run_session, say
from headwater.cli.flags import RUN, parse, require, to_json
from headwater.cli.question import check_name, record_answer

if TYPE_CHECKING:
    from torch import Tensor

    from headwater.audit import Findings
    from headwater.audit.control import Verified
    from headwater.core.fit import Fit
    from headwater.training.trajectory import Trajectory

AUDITS, CHANGES = "audits", "changes.json"
PARTS = {  # what an audit may look at alone; a run folder of that name is ./structure
    "structure": "headwater.cli.audit_structure",
    "drift": "headwater.cli.audit_drift",
}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Audit a fit: doubtful labels or texts, inputs unlike the others, how sure the model may be, with what it cost.

    The report is printed and written into the run folder, as a page to open in a browser, as tables (Parquet and CSV,
    with columns that users of cleanlab know) and as a change set for `headwater verify RUN --audit`.

    Two parts have commands of their own: `headwater audit structure RUN`, what the weights use, and `headwater audit
    drift RUN`, how far checkpoints have moved in what they compute. They have their own --help.

    Example: headwater audit runs/mine

    Args:
        run: The run folder of `headwater fit`; or any folder with a fit in its subfolder fit, with --program.
        program: For models of other kinds: file.py:function, which is run with the folder, and returns (model, data,
            task), and at will held-out data as a fourth, which verify needs.
        trajectory: Folder of the recorded training run; found beside the model, or in the run folder, when left out.
        out_of_fold: A .npy or .csv file of class probabilities by models that were not trained on the example.
        verified: A .csv or .jsonl file with the columns id and is_wrong, of examples drawn at random by --sample.
        confidence: With --verified: probability that the promise about false claims is kept.
        false_claims: With --verified: share of the claims that may be false.
        sample: Draw so many examples for a person to verify, into a .csv file in the run folder.
        sample_seed: Seed of the draw.
        among: With --sample and --verified: draw, and claim, among so many of the most doubtful examples only.
        issues: Mark so many labels, or texts, in place of the number that the probabilities suggest.
        measures: Names of the measures to take; every one that can be taken when left out.
        combine: Names of the measures whose ranks are averaged.
        sections: What else to look at: outliers, complexity (inputs of which it knows little), memorization, recital
            (weights that recite), overconfidence (on held-out data), structure (of the weights).
        neighbours: Nearest neighbours that are looked at.
        image: Rows and columns (with 1 or 3 channels before them) of images that are kept as vectors, to show them.
        name: Name of the audit in the run folder.
        top: Examples of each section that are printed.
        json: Print the findings as JSON.
    """

    run: tyro.conf.Positional[Path]
    program: str | None = None
    trajectory: Path | None = None
    out_of_fold: Path | None = None
    verified: Path | None = None
    confidence: float = 0.95
    false_claims: float = 0.1
    sample: int | None = None
    sample_seed: int = 0
    among: int | None = None
    issues: int | None = None
    measures: tuple[str, ...] = ()
    combine: tuple[str, ...] = ()
    sections: tuple[str, ...] = ("outliers", "memorization", "overconfidence")
    neighbours: int = 10
    image: tuple[int, ...] = ()
    name: str = "audit"
    top: int = 10
    json: bool = False

    def check(self) -> None:
        """Refuse what no audit can be made with."""
        require("--top", self.top, "at least 0", self.top >= 0)
        require("--confidence", self.confidence, "between 0 and 1", 0 < self.confidence < 1)
        require("--false-claims", self.false_claims, "between 0 and 1", 0 < self.false_claims < 1)
        require("--neighbours", self.neighbours, "at least 1", self.neighbours >= 1)
        require("--sample-seed", self.sample_seed, "0 or more", self.sample_seed >= 0)
        require("--sample", self.sample, "at least 1", self.sample is None or self.sample >= 1)
        require("--among", self.among, "at least 1", self.among is None or self.among >= 1)
        require("--issues", self.issues, "0 or more", self.issues is None or self.issues >= 0)
        check_name(self.name, "audit")
        if self.program is not None and ":" not in self.program:
            raise ValueError(f"Expected --program file.py:function; got {self.program!r}.")


def run(words: list[str]) -> int:
    if words and words[0] in PARTS:
        return import_module(PARTS[words[0]]).run(words[1:])
    command = parse(Audit, words, prog="audit")
    findings = audit(command, quiet=command.json)
    if command.json:
        emit_json(_as_json(findings))
        return 0
    from headwater.report.audit import show_findings

    show_findings(findings, top=command.top)
    place = command.run / AUDITS / command.name
    say(f"The page is {place}.html, the tables {place}.parquet and .csv.")
    if findings.issues:
        say(
            f"What to do about it is in {place}.{CHANGES}; edit it, and hold it against retraining:"
        )
        say(f"  headwater verify {command.run}{_program(command)} --audit {command.name}")
    return 0


def audit(command: Audit, *, quiet: bool = False) -> "Findings":
    """Audit as the command says, write everything into the run folder, and return the findings."""
    from headwater.audit import Findings
    from headwater.audit.control import Verified
    from headwater.core.fingerprint import fingerprint_json
    from headwater.core.store import Artifact
    from headwater.report.audit import write_findings

    if not (command.run / "fit").is_dir():
        raise FileNotFoundError(
            f"{command.run} holds no fit; make one with `headwater fit … --out {command.run}`, or in Python with "
            f"headwater.fit(…, folder={str(command.run / 'fit')!r})."
        )
    # before anything is measured
    verified = None if command.verified is None else Verified.read(command.verified)
    if command.sample is not None:
        _sheet_place(command)
    place = command.run / AUDITS / command.name
    manifest = Artifact.open(command.run / "fit", kind="fit").manifest
    asked = {k: v for k, v in to_json(command).items() if k not in _AFTER}
    question = fingerprint_json([asked, manifest["files"], _stamp(command)])
    finished = place.is_dir()
    if finished:
        kept = Findings.load(place)
        finished = kept.facts.get("question") == question
    if not finished:
        kept = _measure(command, quiet=quiet)
        kept = replace(kept, facts=kept.facts | {"question": question})
        kept.save(place)
    elif not quiet:
        say(f"  measured before; read from {place}")
    if command.sample is not None:
        _sheet(command, kept)
    found = kept if verified is None else _controlled(command, kept, verified)
    found.write(place.with_name(f"{command.name}.parquet"))
    found.write(place.with_name(f"{command.name}.csv"))
    _write_changes(found, place.with_name(f"{command.name}.{CHANGES}"), f"audit {command.name}")
    write_findings(found, place.with_name(f"{command.name}.html"))
    if (command.run / RUN).is_file():
        recorded = {k: v for k, v in to_json(command).items() if k not in ("json", "run")}
        record_answer(command.run, AUDITS, command.name, recorded)
    return found


def _write_changes(found: "Findings", path: Path, name: str) -> None:
    """Write what to do; another change set that is there, perhaps edited by a person, is kept under a number."""
    from headwater.core.files import ArtifactError, read_json

    changes = found.change_set(name=name)
    with suppress(ArtifactError):
        if read_json(path) == changes.content():
            return
    if path.exists():
        free = next(p for n in count(1) if not (p := path.with_suffix(f".{n}.json")).exists())
        path.replace(free)
        say(f"  {path.name} was another; it is kept as {free.name}")
    changes.save(path)


# Options that do not change what is measured, but what is made of it.
_AFTER = (
    "run",
    "json",
    "top",
    "name",
    "verified",
    "confidence",
    "false_claims",
    "sample",
    "sample_seed",
    "among",
)


def _stamp(command: Audit) -> list[Any]:
    """Name, size and time of the files that an audit reads beside the fit."""
    program = None if command.program is None else Path(command.program.rpartition(":")[0])
    found = []
    for path in (program, command.out_of_fold):
        if path is not None and path.is_file():
            found.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
    return found


def opened(run: Path, program: str | None) -> tuple["Fit", Path | None, Any]:
    """The fit with its model and data, where a record of the training run may be, and held-out data or None."""
    from headwater.core.fit import load

    if not (run / "fit").is_dir():
        raise FileNotFoundError(
            f"{run} holds no fit; make one with `headwater fit … --out {run}`, or in Python with "
            f"headwater.fit(…, folder={str(run / 'fit')!r})."
        )
    if program is not None:
        if ":" not in program:
            raise ValueError(f"Expected --program file.py:function; got {program!r}.")
        model, data, task, heldout = from_program(program, run)
        return load(run / "fit", model, data, task), run, heldout
    if not (run / RUN).is_file():
        raise FileNotFoundError(
            f"{run} has a fit and no {RUN}, so that its model is not known; name a function that makes model, data and "
            "task: --program file.py:function."
        )
    from headwater.core.task import CausalLM

    session, record = run_session(run)
    fit = load(run / "fit", session.language.model, session.train, CausalLM())
    return fit, Path(record["fit"]["model"]), session.heldout


def from_program(spec: str, run: Path) -> tuple[Any, Any, Any, Any]:
    """Model, data, task and held-out data (or None) from a function of the user's own file, which is run."""
    import runpy

    name, _, function = spec.rpartition(":")
    if not Path(name).is_file():
        raise FileNotFoundError(
            f"There is no file {name} to run; expected --program file.py:function."
        )
    made = runpy.run_path(name).get(function)
    if not callable(made):
        raise ValueError(
            f"{name} has no function {function!r}; expected --program file.py:function."
        )
    found = made(run)
    if not isinstance(found, tuple) or len(found) not in (3, 4):
        raise ValueError(
            f"{function} of {name} must return (model, data, task), or these and held-out data; got "
            f"{type(found).__name__}."
        )
    return (*found, None)[:4]  # type: ignore[return-value]


def trajectories(given: Path | None, beside: Path | None) -> list["Trajectory"]:
    """The record of the training run: the one that is named, or the one beside the model where there is one."""
    from headwater.training.trajectory import FILE, Trajectory

    place = given or beside
    if place is None or not (given or (place / FILE).is_file()):
        return []
    return [Trajectory.load(place)]


def _probabilities(path: Path | None) -> "Tensor | None":
    """A table of probabilities, one row for each training example in order."""
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} for --out-of-fold.")
    import numpy
    import torch

    try:
        if path.suffix == ".npy":
            table = numpy.load(path, allow_pickle=False)
        else:
            table = numpy.loadtxt(path, delimiter=",", ndmin=2)
        return torch.from_numpy(numpy.asarray(table, dtype=numpy.float64))
    except ValueError as error:
        raise ValueError(
            f"{path} is no table of probabilities ({error}); expected a .npy array, or a .csv file of numbers without "
            "a heading, with a row for each training example and a column for each class."
        ) from error


def _measure(command: Audit, *, quiet: bool) -> "Findings":
    from headwater.audit import Mislabels
    from headwater.audit.report import audit

    labels = Mislabels(
        measures=command.measures,
        combine=command.combine,
        n_issues=command.issues,
        neighbours=command.neighbours,
    )
    fit, beside, heldout = opened(command.run, command.program)
    with progress_bar(quiet=quiet) as progress:
        return audit(
            fit,
            labels=labels,
            trajectories=trajectories(command.trajectory, beside),
            probabilities=_probabilities(command.out_of_fold),
            heldout=heldout,
            sections=command.sections,
            image=command.image or None,
            progress=progress,
        )


def _controlled(command: Audit, findings: "Findings", verified: "Verified") -> "Findings":
    from headwater.audit.control import controlled

    return controlled(
        findings,
        verified,
        confidence_level=command.confidence,
        false_claims=command.false_claims,
        among=command.among,
    )


def _sheet(command: Audit, findings: "Findings") -> None:
    """Write the examples that a person is to verify."""
    from headwater.audit.control import write_sheet
    from headwater.audit.report import read

    assert command.sample is not None
    texts: list[str] = []
    if "given_label" not in findings.columns:
        fit = opened(command.run, command.program)[0]
        texts = [read(fit.train, i) or "" for i in range(len(findings))]
    path = _sheet_place(command)
    options = {"among": command.among, "seed": command.sample_seed, "texts": texts}
    write_sheet(findings, path, command.sample, **options)
    again = _program(command) + (f" --name {command.name}" if command.name != "audit" else "")
    among = f" --among {command.among}" if command.among is not None else ""
    say(f"Fill in the column is_wrong of {path}, then:")
    say(f"  headwater audit {command.run}{again} --verified {path}{among}")


def _sheet_place(command: Audit) -> Path:
    """Where the sample goes, which must not be there yet."""
    path = command.run / AUDITS / f"{command.name}.to-verify.csv"
    if path.exists():
        raise ValueError(
            f"{path} exists and may have been filled in; move it away before another sample is drawn."
        )
    return path


def _program(command: Audit) -> str:
    return f" --program {command.program}" if command.program is not None else ""


def _as_json(findings: "Findings") -> dict[str, Any]:
    """The findings, with numbers that JSON knows."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not abs(value) < float("inf") else value

    columns = {name: [plain(v) for v in column] for name, column in findings.table().items()}
    return {
        "columns": columns,
        "sections": [asdict(s) | {"passes": str(s.passes)} for s in findings.sections],
        "issues": [findings.ids[i] for i in findings.issues],
        "passes": str(findings.passes),
        "facts": findings.facts,
    }
