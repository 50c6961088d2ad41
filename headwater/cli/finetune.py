"""`headwater finetune`: fine-tune a language model with a low-rank adapter, recording the run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from headwater.cli.common import emit_json, progress_bar, read_examples, say
from headwater.cli.flags import CHANGES, FINETUNE, DataFlags, parse, require, to_json


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Fine-tune a language model on your own examples, and record what was done for the trace.

    Example: headwater finetune path/to/model train.jsonl --out runs/mine/model --epochs 3

    Args:
        model: Model folder, or GGUF file.
        data: JSONL, CSV, Parquet or text file, or a folder of them.
        out: Where the adapter goes.
        base: Folder of the base model, where an adapter does not name it.
        dtype: Number format of the base weights.
        lora_rank: Rank of the adapter.
        layers_from: Adapt blocks from this number on; fewer blocks are cheaper.
        epochs: Passes over the data.
        lr: Learning rate of AdamW, after a short warm-up, falling to zero.
        weight_decay: Weight decay of AdamW.
        batch_tokens: Most tokens in a batch.
        checkpoints: Checkpoints kept for SOURCE, exact unrolling and the timeline, with the optimizer's moments: 6 when
            left out, 0 keeps none.
        seed: Seed of the order of examples and of the adapter's first weights.
        changes: File of a change set, as `headwater serve` exports it: examples to leave out, and how often others
            count. The order of the examples stays as it is without.
        json: Print the result as JSON.
    """

    model: tyro.conf.Positional[Path]
    data: tyro.conf.Positional[Path]
    out: Path
    base: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    lora_rank: int = 8
    layers_from: int = 0
    epochs: int = 3
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_tokens: int = 512
    checkpoints: int | None = None
    seed: int = 0
    changes: Path | None = None
    columns: Annotated[DataFlags, tyro.conf.arg(name="")] = field(default_factory=DataFlags)
    json: bool = False

    def check(self) -> None:
        """Refuse what no run can be made with."""
        require("--lora-rank", self.lora_rank, "at least 1", self.lora_rank >= 1)
        require("--layers-from", self.layers_from, "0 or more", self.layers_from >= 0)
        require("--epochs", self.epochs, "at least 1", self.epochs >= 1)
        require("--lr", self.lr, "above 0", self.lr > 0)
        require("--weight-decay", self.weight_decay, "0 or more", self.weight_decay >= 0)
        require("--batch-tokens", self.batch_tokens, "at least 1", self.batch_tokens >= 1)
        kept = self.checkpoints
        require("--checkpoints", kept, "0 or more", kept is None or kept >= 0)


def run(words: list[str]) -> int:
    command = parse(Finetune, words, prog="finetune")
    from headwater.core.files import read_json, write_json
    from headwater.models.language import load_language_model
    from headwater.training.changes import ChangeSet
    from headwater.training.finetune import finetune

    changes = None if command.changes is None else ChangeSet.load(command.changes)
    weights = None if changes is None else changes.training_weights()
    language = load_language_model(command.model, dtype=command.dtype, base=command.base)
    examples = read_examples(command.data, command.columns, language)
    with progress_bar() as progress:
        done = finetune(
            language,
            examples,
            out=command.out,
            lora_rank=command.lora_rank,
            layers_from=command.layers_from,
            epochs=command.epochs,
            lr=command.lr,
            weight_decay=command.weight_decay,
            batch_tokens=command.batch_tokens,
            seed=command.seed,
            weights=weights,
            checkpoints=command.checkpoints,
            progress=progress,
        )
    record, place = to_json(command) | {"json": False}, command.out / FINETUNE
    del record["checkpoints"]  # they change nothing, and trajectory.json lists them
    if changes is not None:
        kept = command.out / CHANGES  # a copy that stays as it was
        if not kept.is_file() or ChangeSet.load(kept) != changes:
            changes.save(kept)
        record["changes"] = str(kept.resolve())
    if not place.is_file() or read_json(place) != record:  # traces ask whether the folder changed
        write_json(place, record)  # so that the run can be repeated
    losses = done.trajectory.losses
    if command.json:
        emit_json(
            {
                "out": str(command.out),
                "steps": len(losses),
                "first_loss": losses[0],
                "last_loss": losses[-1],
            }
        )
    else:
        say(f"{len(losses)} steps; the adapter is in {command.out}.")
    return 0
