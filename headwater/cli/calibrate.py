"""`headwater calibrate`: how sure one may be, of a classifier's probabilities and of claims about examples."""

from headwater.cli.calibrate_claims import Draw, Select, draw, select
from headwater.cli.calibrate_ifcomp import Hedge, hedge
from headwater.cli.flags import Actions, run_action

ACTIONS: Actions = {"ifcomp": (Hedge, hedge), "draw": (Draw, draw), "select": (Select, select)}


def run(words: list[str]) -> int:
    return run_action("calibrate", words, ACTIONS, example="ifcomp runs/mine")
