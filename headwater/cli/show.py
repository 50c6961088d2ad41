"""`headwater show`: a saved trace again."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from headwater.cli.common import say, trace_name
from headwater.cli.flags import parse


@dataclass(frozen=True, kw_only=True)
class Show:
    """Show a saved trace, or what a run folder holds; nothing is computed.

    Example: headwater show runs/mine --name trace

    Args:
        run: The run folder.
        name: Name of the trace; the only one there is, when left out.
        html: Write the page to this file.
        json: Print the evidence as JSON.
    """

    run: tyro.conf.Positional[Path]
    name: str | None = None
    html: Path | None = None
    json: bool = False


def run(words: list[str]) -> int:
    command = parse(Show, words, prog="show")
    from headwater.core.evidence import Evidence
    from headwater.report.html import write_html
    from headwater.report.terminal import show

    name = trace_name(command.run, command.name)
    if name is None:
        say(
            f"{command.run} holds a fit and no trace; ask one with `headwater trace {command.run} --prompt …`."
        )
        return 0
    evidence = Evidence.load(command.run / "traces" / name)
    if command.html is not None:
        write_html(evidence, command.html)
        say(f"Wrote {command.html}.")
    elif command.json:
        print(evidence.to_json())
    else:
        show(evidence)
    return 0
