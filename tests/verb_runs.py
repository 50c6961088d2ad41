"""Commands that act on a fit, to be killed: run as a program it forks the words of a folder's `words.json`."""

import json
import os
import shutil
import sys
from pathlib import Path

from tests.forks import serve

PROGRAM = """
import torch, headwater
from headwater.models.vision import mlp
from headwater.training.optimizers import SGD
from headwater.training.run import train_model

def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    return torch.eye(3)[y].repeat(1, 2) + 0.3 * torch.randn(n, 6, generator=g), y

def parts(run):
    model = mlp([6, 8, 3])
    rule = SGD(lr=0.1, batch_size=15, epochs=8, weight_decay=1e-2)
    train_model(model, data(90, 0), headwater.Classification(), rule, folder=run, checkpoints=4)
    return model, data(90, 0), headwater.Classification(), data(60, 1)
"""


def classifier(folder: Path) -> Path:
    """A run folder with the fit of a classifier, the record of its training, and complexities."""
    import runpy

    import headwater
    from headwater.calibrate import complexity

    (folder / "program.py").write_text(PROGRAM)
    model, data, task, heldout = runpy.run_path(str(folder / "program.py"))["parts"](folder / "run")
    fit = headwater.fit(
        model, data, task, curvature="ekfac", weight_decay=1e-2, folder=folder / "run" / "fit"
    )
    for name, rows in (("validation", slice(0, 30)), ("test", slice(30, 60))):
        found = complexity(fit, tuple(t[rows] for t in heldout), damping="0.1 relative")
        found.save(folder / "run" / "complexity" / name)
    return folder


def language_model(folder: Path) -> Path:
    """A run folder with the fit of a tiny language model of given labels."""
    from headwater.cli import main
    from tests.language_cases import WORDS, saved

    saved(folder / "model")
    lines = [
        {"text": " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(8 + i % 3))}
        for i in range(12)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = [str(folder / "model"), str(folder / "train.jsonl"), "--out", str(folder / "run")]
    assert main(["fit", *words, "--curvature", "ekfac", "--fisher", "empirical"]) == 0
    return folder


def prepared(template: Path, folder: Path, words: list[str]) -> Path:
    """A folder in which a command is to be run: a copy of a template, and its words, which name the folder as {}."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    (folder / "words.json").write_text(json.dumps([w.format(folder) for w in words]))
    return folder


def words_of(folder: Path) -> list[str]:
    return json.loads((folder / "words.json").read_text())


def said(folder: Path) -> Path:
    """Where what a command printed is kept, beside its folder."""
    return folder.with_name(f"{folder.name}.said")


def _work(folder: str, wait: bool) -> None:
    from headwater.cli import main

    with said(Path(folder)).open("w") as told:
        sys.stdout = sys.stderr = told
        code = main(words_of(Path(folder)))
    if code:
        os._exit(code)


def _serve() -> None:
    import torch
    import transformers  # what a command would import first is here already

    import headwater.audit.structure
    import headwater.cli.adapt
    import headwater.cli.audit
    import headwater.cli.audit_structure
    import headwater.cli.calibrate_claims
    import headwater.cli.calibrate_ifcomp
    import headwater.cli.forget
    import headwater.forget
    import headwater.models.language
    import headwater.report.audit  # noqa: F401

    assert transformers
    torch.set_num_threads(1)
    serve(_work)


if __name__ == "__main__":
    _serve()
