"""The command line: one file per command, and each body is parse, call, show.

Commands load on first use, so that `headwater --help` answers at once: nothing heavy may be imported at the top of
this package.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS: dict[str, str] = {
    "finetune": "fine-tune a language model with a low-rank adapter, recording the run",
    "doctor": "prove on a few examples that the numbers will be right",
    "plan": "say what a fit and a trace will take on this machine",
    "fit": "fit the curvature of a model over its training data, into a run folder",
    "index": "make the training data's rows once, so that questions take milliseconds",
    "trace": "which training examples raised or lowered a completion",
    "timeline": "when in a fine-tuning a completion was learnt, and from which examples",
    "adapt": "quantize a model to a few bits, with the statistics of its fit",
    "audit": "doubtful labels, odd inputs: what is wrong with the training data",
    "verify": "retrain without the named examples: predicted beside actual",
    "calibrate": "how sure one may be: hedged probabilities, claims with a bound on false ones",
    "forget": "edit weights so that the model recites less, and take it back exactly",
    "bench": "measure attribution methods against retraining, on real data",
    "survey": "look at every training example once: self-influence, outliers, near-duplicates",
    "report": "write the evidence page of a run as one file that needs no server",
    "serve": "open a local page over a run: ask, look, mark examples, verify",
    "show": "show a saved trace again",
    "rerun": "repeat a run from its run.json",
    "cite": "BibTeX for what a run used",
}
TOGETHER = (
    "fit",
    "trace",
    "index build",
    "index add",
)  # what several processes share under torchrun

ELSEWHERE = {"serve": "headwater.web.serve"}  # commands of a layer above this one, by name only

HELP = """usage: headwater COMMAND ...

Trace what a language model does back to the data that taught it.

commands:
{commands}

examples:
  headwater doctor path/to/model data.jsonl
  headwater fit path/to/model data.jsonl --out runs/mine --heldout other.jsonl
  headwater trace runs/mine --prompt "The river rises in" --source topic
  headwater timeline runs/mine --prompt "The river rises in"
  headwater adapt quip runs/mine --bits 3 --out runs/small
  headwater audit runs/mine
  headwater serve runs/mine
  headwater audit structure runs/mine
  headwater verify runs/mine
  headwater report runs/mine

Every command has --help, and --json for machines. fit, index build and trace run on several processes or machines:
  torchrun --nproc-per-node 2 -m headwater fit path/to/model data.jsonl --out runs/mine
Models of other kinds: see the Python interface.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 a check failed, 2 the user's mistake, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        lines = (f"  {name:10} {about}" for name, about in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    if words[0] == "--version":
        from headwater import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(words[0], COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(COMMANDS)}."
        print(f"headwater: there is no command {words[0]!r}{hint}", file=sys.stderr)
        return 2
    # Idle threads of PyTorch sleep: on a busy machine small steps are many times faster. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from headwater.cli.common import guarded, one_voice

    def run() -> int:
        place = ELSEWHERE.get(words[0], f"headwater.cli.{words[0]}")
        return import_module(place).run(words[1:])

    name = " ".join(words[: 1 + (words[0] in ("adapt", "calibrate", "forget", "index"))])
    return guarded(lambda: one_voice(run, name, shared=name in TOGETHER))
