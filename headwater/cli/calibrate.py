"""`headwater calibrate`: how sure a model is, so that it can be taken at its word."""

from typing import Any

from headwater.cli.calibrate_ifcomp import Hedge, hedge
from headwater.cli.flags import parse


def run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        lines = (f"  {k:8} {(v[0].__doc__ or '').splitlines()[0]}" for k, v in ACTIONS.items())
        print("usage: headwater calibrate ACTION ...\n\nactions:\n" + "\n".join(lines))
        print("\nExample: headwater calibrate ifcomp runs/mine")
        return 0
    if words[0] not in ACTIONS:
        raise ValueError(f"Expected one of {', '.join(ACTIONS)}; got {words[0]!r}.")
    flags, action = ACTIONS[words[0]]
    return action(parse(flags, words[1:], prog=f"calibrate {words[0]}"))


ACTIONS: dict[str, tuple[Any, Any]] = {"ifcomp": (Hedge, hedge)}
