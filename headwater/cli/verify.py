"""`headwater verify`: repeat the fine-tuning without the named examples, and see whether the scores were right."""

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from headwater.cli.common import (
    Opened,
    Session,
    emit_json,
    finetuning,
    progress_bar,
    read_examples,
    require_trained_on,
    run_session,
    say,
    trace_name,
)
from headwater.cli.flags import RUN, parse, require, restore

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headwater.cli.finetune import Finetune
    from headwater.cli.trace import Trace
    from headwater.core.capture import Progress
    from headwater.data.tokens import TextExamples
    from headwater.models.language import LanguageModel
    from headwater.training.changes import ChangeSet
    from headwater.training.retraining import Retrain
    from headwater.training.verify import Verification


_NOT_OF_A_TRACE = ("run", "name", "json", "audit", "changes", "program", "trajectory")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Repeat the fine-tuning without a trace's top examples, without as many at random, and with the top ones twice.

    What the scores predicted for each completion is shown beside what then happened, in nats. The runs differ from
    the original in the weights of those examples alone: same seed, same order. Finished runs are kept.

    With --changes it is a change set that is made: one that `headwater serve` exported, or an audit's. With --name the
    trace's completions are measured under it; without, as with --audit, the loss of held-out examples.

    Example: headwater verify runs/mine --top 10

    Args:
        run: The run folder of `headwater fit`, of a model made by `headwater finetune`.
        name: Name of the trace; the only one there is, when left out. With --changes: whose completions to measure.
        top: Examples of each completion that are left out.
        query: Numbers of the completions to ask about, from 1; all when left out, with one run for their union.
        seeds: Repeats with other seeds: several make a statement about the expected outcome, not about this run.
        random_seed: Seed of the random choice.
        audit: Name of an audit in the run folder whose change set is to be verified, in place of a trace.
        changes: File of a change set, in place of the audit's own or the trace's top examples.
        program: For models of other kinds: file.py:function, as for `headwater audit`.
        trajectory: With --program: folder of the recorded training run; the run folder when left out.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    name: str | None = None
    top: int = 10
    query: tuple[int, ...] = ()
    seeds: int = 1
    random_seed: int = 0
    audit: str | None = None
    changes: Path | None = None
    program: str | None = None
    trajectory: Path | None = None
    json: bool = False

    def check(self) -> None:
        """Refuse what no run can be made with."""
        require("--top", self.top, "at least 1", self.top >= 1)
        require("--seeds", self.seeds, "at least 1", self.seeds >= 1)
        require("--query", self.query, "1 or more", all(q >= 1 for q in self.query))
        audited = self.audit is not None or self.changes is not None
        if self.audit is not None and self.name is not None:
            raise ValueError(
                "--audit verifies an audit's change set by the held-out loss, not a trace; leave out --name, or give "
                "the change set as --changes FILE."
            )
        if audited and self.name is None and self.query:
            raise ValueError("--query asks about a trace's completions; give its --name.")
        if (self.program or self.trajectory) and (not audited or self.name is not None):
            raise ValueError(
                "--program and --trajectory go with --audit or --changes, without --name."
            )


def run(words: list[str]) -> int:
    command = parse(Verify, words, prog="verify")
    changes = changes_of(command)
    if changes is not None and command.name is None:
        from headwater.cli.verify_audit import verify_changes

        found, _ = verify_changes(command, changes, quiet=command.json)
    else:
        found, _ = verify(command, changes, quiet=command.json)
    if command.json:
        emit_json(asdict(found))
        return 0
    from headwater.report.verification import show

    show(found)
    return 0


def changes_of(command: Verify) -> "ChangeSet | None":
    """The change set that a command names; None where it names none."""
    from headwater.cli.audit import AUDITS, CHANGES
    from headwater.training.changes import ChangeSet

    if command.audit is None and command.changes is None:
        return None
    place = command.changes or command.run / AUDITS / f"{command.audit}.{CHANGES}"
    if not place.is_file():
        raise FileNotFoundError(
            f"There is no {place}; make it with `headwater audit {command.run}`, or name a change set with --changes."
        )
    return ChangeSet.load(place)


def verify(
    command: Verify,
    changed: "ChangeSet | None" = None,
    *,
    quiet: bool = False,
    opened: Opened | None = None,
    progress: "Progress | None" = None,
) -> tuple["Verification", Path]:
    """Retrain as the command says, save what was found, and return it with its file; a finished one is read.

    Args:
        command: The trace, and what is to be done.
        changed: A change set, in place of the trace's top examples.
        quiet: Show no progress.
        opened: The run's model and data with its record, where they are open already.
        progress: Called with (done, total, note), in place of a progress bar.
    """
    from headwater.cli.trace import InfluenceFlags, Trace
    from headwater.core.evidence import Evidence
    from headwater.core.files import read_json
    from headwater.core.fingerprint import fingerprint_json
    from headwater.training.verify import Verification

    name = trace_name(command.run, command.name)
    if name is None:
        raise ValueError(
            f"{command.run} holds no trace to verify; ask one with `headwater trace {command.run} --prompt …`."
        )
    record = read_json(command.run / RUN)
    if name not in record.get("traces", {}):  # killed before it was recorded
        raise ValueError(
            f"{command.run / RUN} does not say how the trace {name!r} was asked; ask it again with `headwater trace`."
        )
    tuning, trajectory = finetuning(
        Path(record["fit"]["model"]), "repeated", "headwater.training.verify.verify"
    )
    source = trajectory.made_from
    evidence = Evidence.load(command.run / "traces" / name)
    asked = record["traces"][name]
    asked["method"] = restore(InfluenceFlags, asked["method"])
    said = tuple(answer.completion for answer in evidence.answers)
    question = restore(Trace, asked | {"run": str(command.run)})
    if question.queries is None:  # what the model completed then, not what it would now
        question = replace(question, completion=said)
    wrong = [q for q in command.query if q > len(said)]
    if wrong:
        raise ValueError(
            f"The trace has {len(said)} completions; --query {wrong[0]} is none of them."
        )
    folder = command.run / "verify" / name
    options = {k: v for k, v in asdict(command).items() if k not in _NOT_OF_A_TRACE}
    if changed is not None:
        changed.training_weights()  # refuses what cannot be trained
        options = options | {"top": None, "changes": asdict(changed)}
    asked_digest = evidence.facts.get("question")
    fit = _fit_made_from(command.run)
    made = fingerprint_json([options, tuning, source, asked_digest, list(said), fit])
    place = folder / f"{'' if changed is None else 'changes-'}{made[:16]}.json"
    if place.is_file():
        say(f"  read from {place}")
        return Verification.load(place), place
    with progress_bar(quiet=quiet, to=progress) as bar:
        session, _ = opened or run_session(command.run)
        found = _verify(command, changed, question, session, tuning, source, folder, bar)
    if changed is not None:
        found = replace(found, facts=found.facts | {"change_set": changed.name})
    found.save(place)
    say(f"  saved in {place}")
    return found, place


def _fit_made_from(run: Path) -> list[Any]:
    """What tells one fit of a run folder from another: its content, and the options that scores depend on."""
    from headwater.core.store import Artifact

    manifest = Artifact.open(run / "fit", kind="fit").manifest
    timed = ("seconds", "versions")
    facts = {k: v for k, v in manifest["facts"]["fit"].items() if k not in timed}
    return [manifest["made_from"], manifest["files"], facts]


def _verify(
    command: Verify,
    changed: "ChangeSet | None",
    question: "Trace",
    session: Session,
    tuning: dict[str, Any],
    source: dict[str, str],
    folder: Path,
    bar: "Progress | None",
) -> "Verification":
    import torch

    from headwater.cli.finetune import Finetune
    from headwater.cli.flags import DataFlags
    from headwater.cli.question import asked_queries
    from headwater.core.fingerprint import fingerprint_json, fingerprint_model
    from headwater.core.fit import load
    from headwater.core.task import CausalLM
    from headwater.models.language import load_language_model
    from headwater.trace.influence import Influence
    from headwater.training.verify import changes, verify

    again = restore(Finetune, tuning | {"columns": restore(DataFlags, tuning["columns"])})
    base = load_language_model(again.model, dtype=again.dtype, base=again.base)
    examples = read_examples(again.data, again.columns, base)
    given = {"model": fingerprint_model(base.model), "data": examples.fingerprint()}
    other = [name for name, value in given.items() if source[name] != value]
    if other:
        place = {"model": again.model, "data": again.data}[other[0]]
        raise ValueError(
            f"{place} has changed since the fine-tuning, which can no longer be repeated; bring it back as it was, or "
            "fine-tune and fit again."
        )
    require_trained_on(session, tuning, given["data"])
    fitted = load(command.run / "fit", session.language.model, session.train, CausalLM())
    queries = asked_queries(question, session, question.rather_than)
    n = len(queries) // 2 if question.rather_than else len(queries)
    weights = torch.cat([torch.eye(n), -torch.eye(n)], 1) if question.rather_than else None
    method = Influence(**asdict(question.method), n_intervals=0)
    measurement = question.measurement

    def measured(model: "nn.Module") -> "Tensor":
        values = _measured(model, queries, measurement)
        return values if weights is None else weights.to(values) @ values

    retrain = fine_tuner(again, base, examples, folder, measured, bar)
    scores = method.attribute(
        fitted,
        queries,
        measurement=measurement,
        weights=weights,
        names=queries.ids[:n],
        progress=bar,
    )
    chosen, seed = [q - 1 for q in command.query] or None, command.random_seed
    if changed is None:
        planned = changes(scores, k=command.top, queries=chosen, seed=seed)
    else:
        planned = changed.planned(examples.ids, seed=seed)
    seeds = [again.seed + i for i in range(command.seeds)]
    # in another number format the traced model is not quite the one that was trained
    alike = _formats(session.language.model) == _formats(base.model)
    before = measured(session.language.model) if command.seeds == 1 and alike else None
    made = fingerprint_json([tuning, source, measurement, queries.fingerprint(), n])
    found = verify(
        retrain,
        scores,
        planned,
        seeds=seeds,
        before=before,
        cache=folder / "measured" / made[:16],
        progress=bar,
    )
    clear((folder / "runs").glob("*"))  # and what verifications left that were given up
    asked = {queries.ids[q] for q in chosen or range(n)}
    return replace(found, outcomes=tuple(o for o in found.outcomes if o.query_id in asked))


def fine_tuner(
    again: "Finetune",
    base: "LanguageModel",
    examples: "TextExamples",
    folder: Path,
    measure: "Callable[[nn.Module], Tensor]",
    progress: "Progress | None" = None,
) -> "Retrain":
    """What repeats a fine-tuning with other weights of the examples and measures the model; runs are cleared away.

    Where the fine-tuning itself was made under a change set, the new weights multiply its weights.

    Args:
        again: The fine-tuning.
        base: The model that it began with.
        examples: What it was fine-tuned on.
        folder: Where the runs lie meanwhile.
        measure: What is measured of a model.
        progress: Called with (done, total, note).
    """
    import torch

    from headwater.core.fingerprint import fingerprint_json
    from headwater.training.changes import ChangeSet
    from headwater.training.finetune import finetune

    made: list[Path] = []
    first = {} if again.changes is None else ChangeSet.load(again.changes).training_weights()
    start = torch.tensor([first.get(name, 1.0) for name in examples.ids])

    def retrain(new: "Tensor", seed: int) -> "Tensor":
        clear(made)  # by now their measurements are kept
        new = new * start.to(new)
        changed = {examples.ids[i]: float(new[i]) for i in (new != 1).nonzero()[:, 0].tolist()}
        out = folder / "runs" / fingerprint_json([changed, seed])[:16]
        done = finetune(
            base,
            examples,
            out=out,
            lora_rank=again.lora_rank,
            layers_from=again.layers_from,
            epochs=again.epochs,
            lr=again.lr,
            weight_decay=again.weight_decay,
            batch_tokens=again.batch_tokens,
            seed=seed,
            weights=changed,
            checkpoints=0,
            progress=progress,
        )
        made.append(out)
        return measure(done.language.model)

    return retrain


def clear(runs: Iterable[Path]) -> None:
    """Remove the folders of runs, but for those that another process is writing."""
    from headwater.core.files import FolderBusy
    from headwater.core.locks import FolderLock
    from headwater.training.trajectory import FILE

    for run in [r for r in runs if r.is_dir()]:
        with suppress(FolderBusy, FileNotFoundError), FolderLock(run):
            # First: without it, what a kill leaves of the folder is no finished run.
            (run / FILE).unlink(missing_ok=True)
            shutil.rmtree(run)


def _formats(model: "nn.Module") -> set:
    """Number formats of a model's weights, adapters aside."""
    return {p.dtype for name, p in model.named_parameters() if "lora_" not in name}


def _measured(model: "nn.Module", queries: Any, measurement: str) -> "Tensor":
    """The measurement of every query."""
    from headwater.core.capture import plan_batches
    from headwater.core.forward import evaluate
    from headwater.core.task import CausalLM

    task = CausalLM(measurement_of=measurement)
    return evaluate(model, queries, task.measurement, batches=plan_batches(queries))
