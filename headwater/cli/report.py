"""`headwater report`: everything a run folder shows, as one file to be mailed, opened without a server and printed."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from headwater.cli.common import emit_json, say
from headwater.cli.flags import parse, require


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the evidence page of a run as one self-contained HTML file; nothing is computed.

    It holds the saved traces, verifications and timelines, the survey of the training data and the run itself, and asks
    nothing of any network. What it cannot do is compute: it then names the command to type.

    Example: headwater report runs/mine --out evidence.html

    Args:
        run: The run folder.
        out: The file; report.html in the run folder when left out.
        examples: Most training examples to list: those of largest self-influence, where there are more.
        json: Print the path and size as JSON.
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None
    examples: int = 10_000
    json: bool = False

    def check(self) -> None:
        """Refuse a number of examples below zero."""
        require("--examples", self.examples, "0 or more", self.examples >= 0)


def run(words: list[str]) -> int:
    command = parse(Report, words, prog="report")
    from headwater.report.page import write_report
    from headwater.report.text import size

    path = write_report(command.run, command.out, examples=command.examples)
    n_bytes = path.stat().st_size
    if command.json:
        emit_json({"path": str(path), "bytes": n_bytes})
    else:
        say(f"Wrote {path} ({size(n_bytes)}).")
    return 0
