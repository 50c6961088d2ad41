"""`headwater trace`: which training examples raised or lowered a completion."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from headwater.cli.common import Opened, progress_bar, run_session, say
from headwater.cli.flags import parse
from headwater.cli.question import Question, as_asked, asked_queries, check_name, record_answer

if TYPE_CHECKING:
    from headwater.core.capture import Progress
    from headwater.core.evidence import Evidence
    from headwater.core.fit import Fit
    from headwater.core.scores import Scores
    from headwater.report.explain import Partial, Rival

CANDIDATES = 300


@dataclass(frozen=True, kw_only=True)
class InfluenceFlags:
    """The method.

    Args:
        damping: A number, "0.1 relative" to the mean eigenvalue, "weight_decay", or "auto".
        rank: Hold each query's matrices as this many outer products.
        cg_steps: Refine by conjugate gradients against the exact Gauss-Newton matrix; each step costs a few passes.
        confidence_level: Of the intervals.
    """

    damping: str = "auto"
    rank: int | None = None
    cg_steps: int = 0
    confidence_level: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Trace(Question):
    """Trace completions to the training examples that raised or lowered their probability.

    Give prompts, with completions or without: the model then completes them itself. The answer is printed and
    written into the run folder, with a page to open in a browser.

    Example: headwater trace runs/mine --prompt "The river rises in" --source topic

    Args:
        rather_than: Alternatives, one a prompt: what is measured is the completion's log-probability minus the
            alternative's.
        name: Name of the trace in the run folder.
        top: How many examples to show on each side.
        index: Find candidates in the index made by `headwater index build` and by shared words, and score those by the
            curvature, and with --cg-steps the best by the exact matrix: no pass over the training data.
        rescore: With --index; --no-rescore takes the index's own scores, in milliseconds.
        candidates: With --index: how many examples each source of candidates adds, for each prompt.
        where: With --index: metadata to look among, such as source=wiki or year=1990..1999; repeat for several.
        compare: Put the strongest examples by shared words (BM25) and by embeddings beside the answer. The model's
            embeddings of the training data take a forward pass once, and are kept in the run folder.
    """

    rather_than: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    name: str = "trace"
    top: int = 8
    index: bool = False
    rescore: bool = True
    candidates: int = CANDIDATES
    where: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    compare: bool = False
    method: Annotated[InfluenceFlags, tyro.conf.arg(name="")] = field(
        default_factory=InfluenceFlags
    )

    def check(self) -> None:
        super().check()
        if self.rather_than and len(self.rather_than) != len(self.prompt):
            raise ValueError(
                f"Expected one alternative a prompt; got {len(self.prompt)} prompts and {len(self.rather_than)}."
            )
        if self.where and not self.index:
            raise ValueError("--where needs --index; without it every training example is scored.")
        if not self.index and (not self.rescore or self.candidates != CANDIDATES):
            raise ValueError(
                "--no-rescore and --candidates need --index; without it every training example is scored."
            )
        if self.index and self.method.rank is not None:
            raise ValueError(
                "--rank makes a pass over all data cheaper; leave it out with --index."
            )
        if not self.rescore and self.method != InfluenceFlags():
            raise ValueError(
                "--no-rescore takes the index's scores as they are; leave out --damping, --cg-steps and "
                "--confidence-level, or --no-rescore."
            )
        if self.candidates < self.top:
            raise ValueError(
                f"Expected --candidates of --top ({self.top}) or more; got {self.candidates}."
            )
        if self.top < 1:
            raise ValueError(f"Expected --top of 1 or more; got {self.top}.")
        check_name(self.name, "trace")


def run(words: list[str]) -> int:
    command = parse(Trace, words, prog="trace")
    evidence, page = trace(command, quiet=command.json)
    if command.json:
        print(evidence.to_json())
        return 0
    from headwater.report.terminal import show

    show(evidence)
    if command.index:
        from headwater.cli.index import looked_up

        for line in looked_up(evidence.facts):
            say(line)
    say(f"The same as a page: {page}")
    return 0


def trace(
    command: Trace,
    *,
    quiet: bool = False,
    opened: Opened | None = None,
    progress: "Progress | None" = None,
    partial: "Partial | None" = None,
) -> tuple["Evidence", Path]:
    """Trace, save the evidence and its page, and return both. A finished trace of the same question is read.

    Args:
        command: What to ask of which run.
        quiet: Show no progress.
        opened: The run's model and data with its record, where they are open already.
        progress: Called with (done, total, note), in place of a bar.
        partial: Called with the name of a stage and the evidence as far as it is known by then.
    """
    from headwater.core.distributed import current
    from headwater.core.evidence import Evidence
    from headwater.report.html import write_html

    folder = command.run / "traces" / command.name
    asked, digest = as_asked(command, _indexes(command))
    page = folder.with_name(f"{folder.name}.html")  # a name may hold dots

    def known() -> bool:
        return (
            folder.is_dir()
            and Evidence.load(folder).facts.get("question") == digest
            and page.is_file()
        )

    def note() -> None:
        record_answer(command.run, "traces", command.name, asked)

    world = current()
    if world.agreed(known):
        world.first(note)  # which a full disk may have hindered
        return Evidence.load(folder), page
    with progress_bar(quiet=quiet, to=progress) as bar:
        evidence = _trace(command, {"question": digest}, opened, bar, partial)

    def save() -> None:
        evidence.save(folder)
        write_html(evidence, page)
        note()

    world.first(save)
    return evidence, page


def _indexes(command: Trace) -> list[str]:
    """What an answer that is looked up depends on beside the question and the run."""
    if not command.index:
        return []
    from headwater.cli.index import journal_digests

    return journal_digests(command.run)


def _trace(
    command: Trace,
    facts: dict[str, Any],
    opened: Opened | None,
    progress: "Progress | None",
    partial: "Partial | None",
) -> "Evidence":
    from headwater.core.cost import peak_memory_bytes
    from headwater.core.fit import load
    from headwater.core.task import CausalLM
    from headwater.report.explain import explain
    from headwater.trace.influence import Influence

    session, record = opened or run_session(command.run)
    fitted = load(command.run / "fit", session.language.model, session.train, CausalLM())
    queries = asked_queries(command, session, command.rather_than)
    method, control = Influence(**asdict(command.method), n_intervals=command.top), session.heldout
    if command.index:
        from headwater.cli.index import indexed

        rescoring = _rescoring(command) if command.rescore else None
        fitted, method = indexed(command.run, fitted, session, record, command.where, rescoring)
        if not command.rescore:
            control = None  # it has an index of its own
    known = {
        "model": "/".join(Path(record["fit"]["model"]).parts[-2:]),
        "corpus": "/".join(Path(record["fit"]["data"]).parts[-2:]),
        "command": f"headwater trace {command.run}",
    }
    evidence = explain(
        fitted,
        queries,
        influence=method,
        measurement=command.measurement,
        top=command.top,
        control=control,
        source=command.source,
        contrast=bool(command.rather_than),
        rivals=_rivals(command.run) if command.compare else (),
        facts=known | facts,
        progress=progress,
        partial=partial,
    )
    if command.index and not command.rescore:
        return evidence
    seconds = {"fit": fitted.facts["seconds"], "trace": evidence.facts["seconds"]}
    unit = record.get("cost", {}).get("pass_seconds")
    cost = {"cost": {name: s / unit for name, s in seconds.items()}} if unit else {}
    measured = {"seconds": seconds, "peak_memory": peak_memory_bytes()} | cost
    return replace(evidence, facts=evidence.facts | measured)


def _rivals(run: Path) -> "list[Rival]":
    """What an answer is compared with: what anybody could have found without the curvature."""
    from headwater.core.distributed import current
    from headwater.report.explain import Rival
    from headwater.trace.bm25 import BM25
    from headwater.trace.similarity import EmbeddingSimilarity

    def by_embedding(fit: "Fit", queries: Any, **question: Any) -> "Scores":
        method, known = EmbeddingSimilarity(), None
        if current().size == 1:
            known = method.embedded(fit, run / "embeddings", progress=question.get("progress"))
        return method.attribute(fit, queries, known=known, **question)

    return [
        Rival(name="BM25", about="shared words, rare ones first", scores=BM25().attribute),
        Rival(
            name="embedding",
            about="cosine of the model's last hidden states, their mean taken off",
            scores=by_embedding,
        ),
    ]


def _rescoring(command: Trace) -> dict[str, Any]:
    """Options of the cascade."""
    flags = command.method
    exact = {"refine": max(10, command.top), "cg_steps": flags.cg_steps} if flags.cg_steps else {}
    return exact | {
        "candidates": command.candidates,
        "damping": flags.damping,
        "confidence_level": flags.confidence_level,
        "n_intervals": command.top,
    }
