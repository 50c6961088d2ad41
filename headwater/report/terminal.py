"""Evidence as tables in the terminal."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from headwater.core.evidence import Answer, Evidence, Influencer, SourceTotal
from headwater.report import text

RAISED, LOWERED = "bright_blue", "dark_orange"
_SOURCES = 8  # at most this many sources are listed; the others are added up
_HALF = 12  # characters from zero to the end of a bar
# Stand-ins of the same width where the output cannot hold ours.
_PLAIN = str.maketrans("–−±·…→×‹›█▒─│", "--~..>x<>#=-|")


def show(evidence: Evidence, console: Console | None = None, width: int | None = None) -> None:
    """Print evidence: each answer with the examples behind it, then the facts.

    Colour and weight show which tokens carried a score; where there is no colour the strongest
    tokens stand in ‹angle brackets›.

    Args:
        evidence: What to show.
        console: Where to; standard output if left out.
        width: Characters a line; the console's own width if left out.
    """
    console = console or Console()
    colour = console.color_system is not None and not console.no_color
    printer = _Printer(colour=colour, digits=text.score_decimals(evidence))
    blocks = [
        block
        for number, answer in enumerate(evidence.answers, start=1)
        for block in printer.answer(answer, f"Answer {number} of {len(evidence.answers)}")
    ]
    blocks += [Rule(Text("How this was found"), style="dim"), printer.facts(evidence)]
    console.print(Encodable(Group(*blocks)), width=width)


@dataclass(frozen=True)
class Encodable:
    """A renderable, without the characters that the console's encoding lacks."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.content, options):
            content = segment.text
            if options.ascii_only:
                content = content.translate(_PLAIN)
                content = content.encode(options.encoding, "replace").decode(options.encoding)
            yield Segment(content, segment.style, segment.control)


@dataclass(frozen=True, kw_only=True)
class _Printer:
    """The parts of the output, for one console and one number of decimals."""

    colour: bool
    digits: int

    def answer(self, answer: Answer, label: str) -> Iterator[RenderableType]:
        yield Rule(Text(f"{label} · {_clean(answer.query_id, 40)}"), style="dim")
        yield self._asked(answer)
        yield Text("")
        yield Text(
            f"{answer.n_train:,} training examples were scored. {text.noise(answer, self.digits)}"
        )
        for heading, side, style in (
            ("Raised it", answer.raised, RAISED),
            ("Lowered it", answer.lowered, LOWERED),
        ):
            yield Text(f"\n{heading}", style=f"bold {style}")
            yield self._ranked(side, answer) if side else Text("  no example", style="dim")
        if answer.sources:
            yield self._sources(answer)
        if answer.layers:
            shares = (
                f"{_clean(n, 30)} {text.percent(share)}" for n, share in answer.layers.items()
            )
            yield Text(f"\nCarried by layers: {' · '.join(shares)}")
        yield Text("")

    def facts(self, evidence: Evidence) -> Table:
        table = _grid(2)
        for label, value in text.facts(evidence):
            table.add_row(Text(_clean(label, 24), style="dim"), Text(_clean(value, 2000)))
        return table

    def _asked(self, answer: Answer) -> Table:
        table = _grid(2)
        prompt = text.stripped(answer.prompt[-2000:])
        table.add_row(
            Text("prompt", style="dim"), Text(f"…{prompt[-400:]}" if len(prompt) > 400 else prompt)
        )
        table.add_row(Text("completion", style="dim"), self._completion(answer))
        table.add_row(Text(_clean(answer.measurement, 20), style="dim"), self._value(answer))
        return table

    def _completion(self, answer: Answer) -> Text:
        if not answer.completion_tokens:
            return Text(_clean(answer.completion, 400).lstrip(), style="bold")
        shown = Text(style="bold")
        for token, log_prob in zip(
            answer.completion_tokens[:200], _padded(answer.completion_log_probs), strict=False
        ):
            piece = text.shortened(text.stripped(token), 200)
            shown.append(piece if shown else piece.lstrip(), style=_surprise(log_prob))
        return shown

    def _value(self, answer: Answer) -> Text:
        n = len(answer.completion_tokens)
        shown = Text(f"{text.number(answer.value, max(self.digits - 1, 2))} nats")
        if n and answer.completion_log_probs:
            pairs = zip(answer.completion_log_probs, answer.completion_tokens, strict=True)
            least, token = min(pairs)
            name = _clean(token, 20).strip()
            shown.append(
                f" over {n} tokens; the least likely, {name!r}, {text.number(least, 2)}"
                if n > 1
                else " over 1 token"
            )
        return shown

    def _ranked(self, influencers: tuple[Influencer, ...], answer: Answer) -> Table:
        table = Table(
            box=None, pad_edge=False, expand=True, header_style="dim", padding=(0, 2, 0, 0)
        )
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("nats [95 %]", max_width=22)
        table.add_column("p", no_wrap=True)
        table.add_column("training example", ratio=1)
        for rank, influencer in enumerate(influencers, start=1):
            low, high = influencer.low, influencer.high
            score = Text(
                text.signed(influencer.score, self.digits),
                style=f"bold {LOWERED if influencer.score < 0 else RAISED}",
            )
            score.append(f" {text.interval(low, high, self.digits)}", style="not bold default")
            table.add_row(
                str(rank),
                score,
                text.p_value(influencer.significance),
                Group(self._name(influencer, answer.source_column), self._snippet(influencer)),
            )
        return table

    def _name(self, influencer: Influencer, column: str | None) -> Text:
        name = Text(_clean(text.title(influencer), 60), style="bold")
        source = text.source(influencer, column)
        if source is not None:
            name.append(f" · {_clean(source, 40)}", style="not bold cyan")
        return name

    def _snippet(self, influencer: Influencer, limit: int = 150) -> Text:
        """The stretch of an example that carried most of its score, its strongest tokens marked."""
        tokens, scores = influencer.tokens, influencer.token_scores
        start, stop = text.window(scores, [len(t) for t in tokens], limit)
        weights = scores[start:stop] or (0.0,) * (stop - start)
        faint, strong = _thresholds(weights)
        snippet = Text("… " if start else "")
        marked = zip(tokens[start:stop], (_mark(w, faint, strong) for w in weights), strict=True)
        for mark, group in groupby(marked, key=lambda pair: pair[1]):
            piece = text.shortened(text.stripped("".join(token for token, _ in group)), 2 * limit)
            piece = piece if len(snippet) > 2 * bool(start) else piece.lstrip()
            if mark.startswith("bold") and not self.colour and piece.strip():
                lead = len(piece) - len(piece.lstrip())
                piece = f"{piece[:lead]}‹{piece[lead:]}›"
            snippet.append(piece, style=mark)
        return snippet.append(" …") if stop < len(tokens) else snippet

    def _sources(self, answer: Answer) -> RenderableType:
        column = _clean(answer.source_column or "source", 30)
        table = _grid(5)
        table.columns[1].justify = table.columns[4].justify = "right"
        table.columns[2].no_wrap = table.columns[3].no_wrap = True
        totals = _strongest(answer.sources)
        largest = max((max(t.raised, -t.lowered) for t in totals), default=0.0)
        digits = text.decimals(v for t in totals for v in (t.raised, t.lowered, t.net))
        table.add_row(
            *(Text(label, style="dim") for label in ("", "n", "lowered", "raised", "net"))
        )
        for total in totals:
            table.add_row(
                Text(_clean(total.name, 24)),
                f"{total.n:,}",
                Text(("▒" * _length(-total.lowered, largest)).rjust(_HALF), style=LOWERED),
                Text(("█" * _length(total.raised, largest)).ljust(_HALF), style=RAISED),
                text.signed(total.net, digits),
            )
        heading = Text(f"\nBy {column}, all {answer.n_train:,} training examples, in nats")
        return Group(heading, Padding(table, (0, 0, 0, 2)))


def _grid(n_columns: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(n_columns):
        table.add_column()
    return table


def _clean(value: str, width: int) -> str:
    return text.shortened(text.stripped(value[: 20 * width]), width)


def _padded(log_probs: tuple[float, ...]) -> Iterator[float]:
    yield from log_probs
    while True:
        yield math.nan


def _surprise(log_prob: float) -> str:
    """Style of a token of the completion: the less likely, the warmer."""
    if not math.isfinite(log_prob) or log_prob > math.log(0.5):
        return ""
    return "yellow" if log_prob > math.log(0.1) else "red"


def _thresholds(weights: Sequence[float], n: int = 5) -> tuple[float, float]:
    """From which size on a token score is shown faintly, and strongly: the `n` largest at most."""
    sizes = sorted((abs(w) for w in weights if math.isfinite(w)), reverse=True)
    largest = sizes[0] if sizes else 0.0
    return 0.2 * largest, max([0.5 * largest, *sizes[n - 1 : n]])


def _mark(weight: float, faint: float, strong: float) -> str:
    """Style of a token of an example, by its score."""
    if weight == 0 or not abs(weight) >= faint:
        return ""
    colour = RAISED if weight > 0 else LOWERED
    return f"bold {colour}" if abs(weight) >= strong else colour


def _length(value: float, largest: float) -> int:
    return min(math.ceil(_HALF * value / largest), _HALF) if largest > 0 and value > 0 else 0


def _strongest(totals: tuple[SourceTotal, ...]) -> list[SourceTotal]:
    """The sources with the largest totals, and one more for all others."""
    ranked = sorted(totals, key=lambda t: t.lowered - t.raised)
    shown, others = ranked[:_SOURCES], ranked[_SOURCES:]
    if len(others) == 1:
        return ranked
    if others:
        sums = {
            name: sum(getattr(t, name) for t in others)
            for name in ("raised", "lowered", "net", "n")
        }
        shown.append(SourceTotal(name=f"{len(others)} others", **sums))
    return shown
