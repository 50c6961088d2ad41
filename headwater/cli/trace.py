"""`headwater trace`: which training examples raised or lowered a completion."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from headwater.cli.common import Session, progress_bar, run_session, say
from headwater.cli.flags import RUN, parse, to_json

if TYPE_CHECKING:
    from headwater.core.evidence import Evidence
    from headwater.data.tokens import TextExamples


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
class Trace:
    """Trace completions to the training examples that raised or lowered their probability.

    Give prompts, with completions or without: the model then completes them itself. The answer is printed and
    written into the run folder, with a page to open in a browser.

    Example: headwater trace runs/mine --prompt "The river rises in" --source topic

    Args:
        run: The run folder of `headwater fit`.
        prompt: Prompts; repeat or list several.
        completion: Completions, one a prompt; generated when left out.
        rather_than: Alternatives, one a prompt: what is measured is the completion's log-probability minus the
            alternative's.
        queries: A file of prompts and completions, in place of --prompt.
        name: Name of the trace in the run folder.
        source: Metadata column to total scores by.
        top: How many examples to show on each side.
        max_new_tokens: Longest generated completion.
        chat: Put prompts into the model's chat template.
        measurement: What is asked of a completion.
        index: Look up the index made by `headwater index build`, without a pass over the training data.
        where: With --index: metadata to look among, such as source=wiki or year=1990..1999; repeat for several.
        json: Print the result as JSON.
    """

    run: tyro.conf.Positional[Path]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    completion: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    rather_than: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    queries: Path | None = None
    name: str = "trace"
    source: str | None = None
    top: int = 8
    max_new_tokens: int = 24
    chat: bool = False
    measurement: Literal["log_prob", "loss"] = "log_prob"
    index: bool = False
    where: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    method: Annotated[InfluenceFlags, tyro.conf.arg(name="")] = field(
        default_factory=InfluenceFlags
    )
    json: bool = False


def run(words: list[str]) -> int:
    command = parse(Trace, words, prog="trace")
    _check(command)
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


def _check(command: Trace) -> None:
    if not command.prompt and command.queries is None:
        raise ValueError('Expected --prompt "…" or --queries FILE; got neither.')
    if command.prompt and command.queries is not None:
        raise ValueError("Expected --prompt or --queries; got both.")
    if command.completion and len(command.completion) != len(command.prompt):
        raise ValueError(
            f"Expected one completion a prompt; got {len(command.prompt)} prompts and {len(command.completion)} "
            "completions. Leave --completion out to let the model complete the prompts."
        )
    if command.rather_than and len(command.rather_than) != len(command.prompt):
        raise ValueError(
            f"Expected one alternative a prompt; got {len(command.prompt)} prompts and {len(command.rather_than)}."
        )
    if command.where and not command.index:
        raise ValueError("--where needs --index; without it every training example is scored.")
    if command.top < 1:
        raise ValueError(f"Expected --top of 1 or more; got {command.top}.")
    if "/" in command.name or command.name in ("", ".", ".."):
        raise ValueError(f"Expected a plain name for the trace; got {command.name!r}.")


def trace(command: Trace, *, quiet: bool = False) -> tuple["Evidence", Path]:
    """Trace, save the evidence and its page, and return both. A finished trace of the same question is read."""
    from headwater.core.evidence import Evidence
    from headwater.core.files import read_json, write_json
    from headwater.core.fingerprint import fingerprint_json
    from headwater.report.html import write_html

    folder = command.run / "traces" / command.name
    asked = {k: v for k, v in to_json(command).items() if k not in ("json", "run")}
    page = folder.with_name(f"{folder.name}.html")  # a name may hold dots
    if not (command.run / RUN).is_file():
        run_session(command.run)  # says what is missing
    asked_digest = fingerprint_json([asked, _inputs(command)])
    if folder.is_dir():
        evidence = Evidence.load(folder)
        if evidence.facts.get("question") == asked_digest and page.is_file():
            return evidence, page
    evidence = _trace(command, {"question": asked_digest}, quiet=quiet)
    evidence.save(folder)
    write_html(evidence, page)
    record = read_json(command.run / RUN)
    record.setdefault("traces", {})[command.name] = asked
    write_json(command.run / RUN, record)
    return evidence, page


def _inputs(command: Trace) -> list[Any]:
    """What an answer depends on beside the question: the fit, and name, size and time of every file read."""
    from headwater.core.files import read_json
    from headwater.core.store import Artifact

    record = read_json(command.run / RUN)["fit"]
    manifest = Artifact.open(command.run / "fit", kind="fit").manifest
    named = [record["model"], record["data"], record["heldout"], command.queries]
    paths = [Path(p) for p in named if p is not None]
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    stamps = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    found = [record["heldout"], record["columns"], manifest["files"], stamps]
    if command.index:
        from headwater.cli.index import journal_digests

        found.append(journal_digests(command.run))
    return found


def _trace(command: Trace, facts: dict[str, Any], *, quiet: bool) -> "Evidence":
    from headwater.core.cost import peak_memory_bytes
    from headwater.core.fit import load
    from headwater.core.task import CausalLM
    from headwater.report.explain import explain
    from headwater.trace.influence import Influence

    session, record = run_session(command.run)
    fitted = load(command.run / "fit", session.language.model, session.train, CausalLM())
    queries = traced_queries(command, session)
    method, control = Influence(**asdict(command.method), n_intervals=command.top), session.heldout
    if command.index:
        from headwater.cli.index import indexed

        fitted, method = indexed(command.run, fitted, session, record, command.where)
        control = None  # it has an index of its own
    known = {
        "model": "/".join(Path(record["fit"]["model"]).parts[-2:]),
        "corpus": "/".join(Path(record["fit"]["data"]).parts[-2:]),
        "command": f"headwater trace {command.run}",
    }
    with progress_bar(quiet=quiet) as progress:
        evidence = explain(
            fitted,
            queries,
            influence=method,
            measurement=command.measurement,
            top=command.top,
            control=control,
            source=command.source,
            contrast=bool(command.rather_than),
            facts=known | facts,
            progress=progress,
        )
    if command.index:
        return evidence
    seconds = {"fit": fitted.facts["seconds"], "trace": evidence.facts["seconds"]}
    unit = record.get("cost", {}).get("pass_seconds")
    cost = {"cost": {name: s / unit for name, s in seconds.items()}} if unit else {}
    measured = {"seconds": seconds, "peak_memory": peak_memory_bytes()} | cost
    return replace(evidence, facts=evidence.facts | measured)


def traced_queries(command: Trace, session: Session) -> "TextExamples":
    """The queries; alternatives, where there are any, follow the completions."""
    from headwater.cli.common import read_examples
    from headwater.cli.flags import DataFlags
    from headwater.data.tokens import completion_examples
    from headwater.models.language import generate

    if command.queries is not None:
        return read_examples(
            command.queries, DataFlags(prompt="prompt", completion="completion"), session.language
        )
    language, prompts = session.language, command.prompt
    completions = command.completion or tuple(
        generate(language, p, max_new_tokens=command.max_new_tokens, chat=command.chat)
        for p in prompts
    )
    both = (
        (prompts + prompts, completions + command.rather_than)
        if command.rather_than
        else (prompts, completions)
    )
    examples = completion_examples(
        language.tokenizer, *both, chat=command.chat, max_length=language.context_length
    )
    for message in examples.report.messages:
        say(f"  queries: {message}")
    return examples
