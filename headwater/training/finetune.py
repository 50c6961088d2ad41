"""Fine-tune a language model on a few texts: low-rank adapters or all weights, one plain loop.

The objective is the mean loss over all scored tokens of the training data, so that every token of
every example counts alike. A batch of B examples contributes the sum of its token losses over the
tokens that an average batch scores. Dropout stays off: the run repeats exactly from its seed.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.checkpoint import SAVE_EVERY, Cadence, Checkpoint
from headwater.core.examples import Examples, to_device
from headwater.core.files import ArtifactMismatch, require_same
from headwater.core.fingerprint import fingerprint_json, fingerprint_model
from headwater.core.locks import FolderLock
from headwater.core.prediction import IGNORE
from headwater.core.task import CausalLM
from headwater.extras import require
from headwater.models.language import LanguageModel, load_language_model, quiet
from headwater.training.optimizers import learning_rate
from headwater.training.record import moments_of, stage_of
from headwater.training.trajectory import (
    FILE,
    CheckpointRecord,
    Trajectory,
    checkpoint_steps,
    keep_checkpoint,
)

Progress = Callable[[int, int, str], None]
BETAS, EPSILON = (0.9, 0.999), 1e-8
CHECKPOINTS = 6  # kept for attribution where adapters are trained, which are small


@dataclass(frozen=True, kw_only=True, eq=False)
class Finetuned:
    """A fine-tuned model and the record of its training.

    Attributes:
        language: The fine-tuned model.
        trajectory: What training did.
        path: The folder that holds adapter or model, tokenizer, `trajectory.json` and its checkpoints.
    """

    language: LanguageModel
    trajectory: Trajectory
    path: Path


def finetune(
    language: LanguageModel,
    examples: Examples,
    *,
    out: str | Path,
    lora_rank: int | None = 8,
    lora_alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    layers_from: int | None = None,
    epochs: int = 3,
    batch_tokens: int = 512,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    warmup: int = 5,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    checkpoints: int | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Fine-tune with AdamW, a short warmup and a learning rate that falls to zero linearly.

    A finished run of the same inputs is read instead of made again, and a killed one goes on where
    it stopped. The model given is not changed.

    Args:
        language: The model to start from.
        examples: Training data, from `headwater.data.tokens.tokenize`.
        out: Folder for adapter or model, tokenizer and `trajectory.json`.
        lora_rank: Rank of the adapters; None trains all weights.
        lora_alpha: Scale of the adapters, twice the rank when left out.
        target_modules: Names of the linear layers that get adapters, or patterns such as
            "*.mlp.*"; all within the blocks when left out.
        layers_from: Train the blocks from this number on only. The backward pass stops there,
            which makes a few last blocks cheap to train on a CPU.
        epochs: Passes over the data.
        batch_tokens: Most tokens of a batch, padding included.
        lr: Greatest learning rate.
        weight_decay: AdamW's decay of the trained parameters.
        warmup: Steps until the learning rate is reached.
        seed: Seed of the adapters' initial weights and of the order of examples.
        weights: Weight of the loss of some examples, by id: 0 leaves one out, 2 counts it twice. The order of the
            examples and the scale of the loss stay those of the run without weights.
        checkpoints: Trained parameters kept along the way, with the optimizer's moments, beside the initial ones: what
            SOURCE and exact unrolling follow the run by. They change nothing else. When left out, 6 with adapters
            and none where all weights are trained; a run that was made or begun already keeps what it has.
        progress: Called with (steps done, steps in all, note).

    Raises:
        FloatingPointError: The loss was not finite; the message names the examples. The state
            before that step is kept.
        ArtifactMismatch: The folder holds another run, or this one without the checkpoints asked for.
        ValueError: Nothing is left to train, or an option does not fit the model.
    """
    if checkpoints is not None and checkpoints < 0:
        raise ValueError(f"checkpoints must be 0 or more; got {checkpoints}.")
    if epochs < 1 or batch_tokens < 1 or not lr > 0:
        raise ValueError(
            f"epochs, batch_tokens and lr must be positive; got {epochs}, {batch_tokens}, {lr}."
        )
    options = {
        "lora_rank": lora_rank,
        "lora_alpha": 2 * lora_rank if lora_alpha is None and lora_rank else lora_alpha,
        "target_modules": None if target_modules is None else list(target_modules),
        "layers_from": layers_from,
        "epochs": epochs,
        "batch_tokens": batch_tokens,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "seed": seed,
    }
    if weights and (counted := _checked(weights, examples)):
        options["weights"] = counted
    made_from = {
        "model": fingerprint_model(language.model),
        "data": examples.fingerprint(),
        "options": fingerprint_json(options),
    }
    out = Path(out)
    with FolderLock(out):
        if (out / FILE).is_file():
            return _finished(out, language, made_from, checkpoints)
        model = _trainable(language.model, options)
        run = _Run(model, examples, options, made_from, out, checkpoints, progress)
        trajectory = run.train()
        if lora_rank is None:
            model.save_pretrained(out)
        else:
            model.peft_config["default"].base_model_name_or_path = str(language.path.resolve())
            model.save_pretrained(out, save_embedding_layers=False)
        language.tokenizer.save_pretrained(out)
        trajectory.save(out)  # last: a folder that has it is complete
        run.checkpoint.clear()
    tuned = replace(
        language,
        model=model.eval(),
        path=out,
        base_path=language.path if lora_rank else None,
    )
    return Finetuned(language=tuned, trajectory=trajectory, path=out)


def _checked(weights: Mapping[str, float], examples: Examples) -> dict[str, float]:
    """The weights that are not 1, in the order of their ids."""
    unknown = set(weights) - set(examples.ids)
    if unknown:
        raise ValueError(f"weights name {sorted(unknown)[0]!r}, which is no training example.")
    broken = [name for name, w in weights.items() if not math.isfinite(w)]
    if broken:
        raise ValueError(f"Weights must be finite; that of {broken[0]!r} is {weights[broken[0]]}.")
    return {name: float(w) for name, w in sorted(weights.items()) if w != 1}


def _finished(
    out: Path, language: LanguageModel, made_from: dict[str, str], checkpoints: int | None
) -> Finetuned:
    trajectory = Trajectory.load(out)
    require_same(trajectory.made_from, made_from, f"{out} holds a finished run")
    asked = checkpoint_steps([trajectory.steps], checkpoints) if checkpoints else []
    kept = {each.step for each in trajectory.checkpoints}
    if not kept.issuperset(asked):
        raise ArtifactMismatch(
            f"{out} holds the finished run with {len(kept) or 'no'} checkpoints, and not the {checkpoints} asked for, "
            "which cannot be added; fine-tune into another folder (the run repeats exactly), or leave checkpoints out."
        )
    adapted = (out / "adapter_config.json").is_file()
    dtype = str(next(language.model.parameters()).dtype).removeprefix("torch.")
    tuned = load_language_model(
        out,
        base=language.path if adapted else None,
        dtype=dtype if dtype in ("float32", "bfloat16") else "auto",  # type: ignore[arg-type]
    )
    return Finetuned(language=tuned, trajectory=trajectory, path=out)


@dataclass(frozen=True, eq=False)
class _Run:
    """One training run, from its beginning or from where it was stopped."""

    model: Any
    examples: Examples
    options: dict[str, Any]
    made_from: dict[str, str]
    out: Path
    checkpoints: int | None
    progress: Progress | None

    @property
    def checkpoint(self) -> Checkpoint:
        """The state to go on from."""
        return Checkpoint(self.out / "checkpoint")

    def train(self) -> Trajectory:
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=self.options["lr"],
            betas=BETAS,
            eps=EPSILON,
            weight_decay=self.options["weight_decay"],
        )
        epochs, seed = self.options["epochs"], self.options["seed"]
        order = [
            batch
            for epoch in range(epochs)
            for batch in batches(
                self.examples, tokens=self.options["batch_tokens"], seed=seed, epoch=epoch
            )
        ]
        per_epoch = len(order) // epochs
        rates = [
            learning_rate(
                step,
                len(order),
                lr=self.options["lr"],
                schedule="linear",
                warmup=self.options["warmup"],
            )
            for step in range(len(order))
        ]
        scale = _scored(self.examples) / per_epoch
        losses, kept, n_kept = self._resume(parameters, optimizer)
        keep = checkpoint_steps([len(order)], n_kept) if n_kept else []
        cadence = Cadence(SAVE_EVERY)
        for step in range(len(losses), len(order)):
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.zero_grad()
            total, mean = self._loss(order[step])
            if not math.isfinite(mean):
                self._save(parameters, optimizer, losses, kept, n_kept)
                raise FloatingPointError(self._not_finite(step, order[step], rates[step]))
            (total / scale).backward()
            optimizer.step()
            losses.append(mean)
            done = step + 1
            if done in keep:
                moments, lr_sum = moments_of(optimizer, parameters), sum(rates[:done])
                kept.append(keep_checkpoint(self.out, done, parameters, moments, lr_sum=lr_sum))
            if cadence.due or (done % per_epoch == 0 and done < len(order)):
                with cadence.saving():
                    self._save(parameters, optimizer, losses, kept, n_kept)
            if self.progress is not None:
                epoch = min(step // per_epoch, epochs - 1) + 1
                self.progress(
                    done,
                    len(order),
                    f"fine-tuning: epoch {epoch}/{epochs}, {mean:.2f} nats a token",
                )
        broken = [name for name, p in parameters.items() if not torch.isfinite(p).all()]
        if broken:
            raise FloatingPointError(
                f"Training ended with weights that are not finite ({broken[0]}); lower lr."
            )
        moved = sum(
            float((p.detach() - start[n]).double().square().sum()) for n, p in parameters.items()
        )
        return Trajectory(
            optimizer="AdamW",
            lr=rates,
            weight_decay=self.options["weight_decay"],
            betas=list(BETAS),
            batches=[[self.examples.ids[i] for i in batch] for batch in order],
            normalizers=[scale] * len(order),
            losses=losses,
            seed=seed,
            trained=list(parameters),
            distance=moved,
            made_from=self.made_from,
            stages=[replace(stage_of(optimizer, "fine-tune"), stop=len(order))],
            checkpoints=kept,
        )

    def _loss(self, indices: Sequence[int]) -> tuple[Tensor, float]:
        """Summed loss of a batch, to be differentiated, and its mean over scored tokens."""
        batch = to_device(self.examples.batch(indices), next(self.model.parameters()).device)
        losses = CausalLM().loss(self.model, batch)
        n = int((batch["labels"][:, 1:] != IGNORE).sum())
        weights = self.options.get("weights", {})
        total = losses * losses.new_tensor(
            [weights.get(self.examples.ids[i], 1.0) for i in indices]
        )
        return total.sum(), losses.sum().item() / n

    def _not_finite(self, step: int, indices: Sequence[int], lr: float) -> str:
        """Which examples of a batch have a loss that is not finite."""
        with torch.no_grad():
            alone = [i for i in indices if not math.isfinite(self._loss([i])[1])] or list(indices)
        ids = ", ".join(repr(self.examples.ids[i]) for i in alone)
        return (
            f"The loss of step {step + 1} is not finite on the examples {ids}. The state before it "
            f"is kept in {self.checkpoint.folder}. Lower lr (now {lr:.3g}) or look at the examples, "
            "and fine-tune into another folder."
        )

    def _save(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.AdamW,
        losses: list[float],
        kept: list[CheckpointRecord],
        n_kept: int,
    ) -> None:
        tensors: dict[str, Tensor] = {}
        for name, p in parameters.items():
            tensors[f"parameter.{name}"] = p.detach()
            for key, value in optimizer.state[p].items():
                tensors[f"{key}.{name}"] = value.detach()
        facts = {"made_from": self.made_from, "losses": losses}
        listed = {"checkpoints": n_kept, "kept": [asdict(each) for each in kept]}
        self.checkpoint.save(tensors, facts | listed)

    def _resume(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW
    ) -> tuple[list[float], list[CheckpointRecord], int]:
        """Put parameters and optimizer into the saved state; losses and checkpoints so far, and how many to keep."""
        saved, asked = self.checkpoint.load(), self.checkpoints
        if saved is None:
            default = CHECKPOINTS if self.options["lora_rank"] else 0
            n_kept = default if asked is None else asked
            return [], [keep_checkpoint(self.out, 0, parameters)] if n_kept else [], n_kept
        tensors, facts = saved
        place = f"{self.checkpoint.folder.parent} holds an unfinished run"
        require_same(facts["made_from"], self.made_from, place)
        begun = facts.get("checkpoints", 0)
        if asked is not None and asked != begun:
            raise ArtifactMismatch(
                f"{place} that was begun with checkpoints={begun}; go on with that number, or choose another folder."
            )
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[f"parameter.{name}"])
        for name, p in parameters.items() if facts["losses"] else ():
            optimizer.state[p] = {
                key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else p.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        kept = [CheckpointRecord(**each) for each in facts.get("kept", [])]
        return list(facts["losses"]), kept, begun


def batches(examples: Examples, *, tokens: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Numbers of the examples of each step of an epoch, in an order drawn from the seed.

    Examples of like length come together, so that little is padding. Which ones those are changes
    from epoch to epoch, how many steps an epoch has does not.

    Args:
        examples: The training data.
        tokens: Most tokens of a batch, padding included; a longer example is a batch of its own.
        seed: Seed of the order.
        epoch: Number of the epoch.
    """
    lengths = examples.lengths or [1] * len(examples)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(examples), generator=generator).tolist()
    cut: list[list[int]] = []
    for i in sorted(shuffled, key=lambda i: lengths[i]):  # stable: equal lengths stay shuffled
        if cut and (len(cut[-1]) + 1) * lengths[i] <= tokens:
            cut[-1].append(i)
        else:
            cut.append([i])
    yield from (cut[k] for k in torch.randperm(len(cut), generator=generator).tolist())


def _scored(examples: Examples) -> int:
    """Scored tokens of all examples."""
    parts = torch.arange(len(examples)).split(64)
    return sum(
        int((examples.batch(part.tolist())["labels"][:, 1:] != IGNORE).sum()) for part in parts
    )


# What is trained


def _trainable(model: nn.Module, options: dict[str, Any]) -> Any:
    """A copy of the model in which only what is trained requires gradients."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has an adapter already; merge it with model.merge_and_unload(), save that, "
            "and fine-tune what is saved."
        )
    blocks, first = _blocks(model), options["layers_from"] or 0
    if not 0 <= first < len(blocks):
        raise ValueError(f"layers_from must be 0 to {len(blocks) - 1}; got {first}.")
    rank = options["lora_rank"]
    if rank is None:
        return _unfrozen(model, blocks[first:] if first else None)
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, or None for all weights; got {rank}.")
    peft = require("peft", extra="language")
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and any(name.startswith(f"{block}.") for block in blocks[first:])
    ]
    wanted = options["target_modules"]
    if wanted is not None:
        linear = [
            (name, module)
            for name, module in linear
            if any(name == w or name.endswith(f".{w}") or fnmatch(name, w) for w in wanted)
        ]
    if not linear:
        names = ", ".join(wanted or ()) or "any name"
        raise ValueError(f"The model has no linear layers of {names} from block {first} on.")
    # The copy shares the frozen weights' memory, but has parameters of its own.
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=options["lora_alpha"],
        lora_dropout=0.0,
        target_modules=[name for name, _ in linear],
        fan_in_fan_out=type(linear[0][1]).__name__ == "Conv1D",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(options["seed"])
        return peft.get_peft_model(copy.deepcopy(model, shared), config).eval()


def _unfrozen(model: nn.Module, blocks: Sequence[str] | None) -> nn.Module:
    low = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    if low:
        raise ValueError(
            f"Small steps are lost in {str(low.pop()).removeprefix('torch.')} weights; load the model "
            "with dtype='float32', or train adapters with lora_rank=8."
        )
    model = copy.deepcopy(model).eval()
    for name, p in model.named_parameters():
        p.requires_grad_(blocks is None or any(name.startswith(f"{block}.") for block in blocks))
    return model


def _blocks(model: nn.Module) -> list[str]:
    """Names of the model's blocks, in order: the children of its largest module list."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        raise ValueError(
            "The model has no list of blocks, so it cannot be fine-tuned block by block."
        )
    name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return [f"{name}.{i}" for i in range(len(lists[name]))]
