"""Pretrained language models from the disk: model folders, GGUF files, and peft adapters.

Nothing is downloaded, no code of a model folder is run, and no pickled weights are read.
"""

import difflib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

import torch
from torch import nn

from headwater.core.files import read_json, write_json
from headwater.core.quantized import load_quantized, save_quantized
from headwater.core.replacing import whole_folder
from headwater.extras import require

DType = Literal["auto", "float32", "bfloat16"]
ORIGIN = "headwater.json"  # in a converted folder: what it was made from
QUANTIZED = "quantized"  # in a model folder: its weights, those of some layers in a few bits


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A causal language model, ready to be run and traced.

    Attributes:
        model: The model in evaluation mode; of an adapted model only the adapter requires gradients.
        tokenizer: Its tokenizer.
        context_length: Most tokens that it can read.
        path: The folder it was loaded from.
        base_path: The folder of the model that an adapter changes; None without an adapter.
    """

    model: nn.Module
    tokenizer: Any
    context_length: int
    path: Path
    base_path: Path | None = None


def load_language_model(
    path: str | Path,
    *,
    dtype: DType = "auto",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    cache: str | Path | None = None,
) -> LanguageModel:
    """Load a language model from a local folder or a GGUF file.

    Args:
        path: A model folder with safetensors, a GGUF file or a folder that holds one, the folder of a
            peft adapter, or a model quantized by `headwater adapt`.
        dtype: Numbers to compute in; "auto" takes those of the file (float32 instead of float16,
            which a CPU computes badly in).
        adapter: Folder of a peft adapter to put on the model.
        base: The model that the adapter at `path` changes, when it lies elsewhere than the adapter
            says.
        tokenizer: Folder of the tokenizer, if it is another one.
        cache: Where a GGUF file's converted weights are kept; the user's cache folder when left out.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ImportError: The extra "language" is not installed.
        ValueError: What lies there cannot be used; the message says why and what to do.
    """
    folder = _existing(Path(path))
    if (folder / "adapter_config.json").is_file():
        if adapter is not None:
            raise ValueError(
                f"{folder} is an adapter already; pass the model's folder as the path."
            )
        folder, adapter = _base_of(folder, base), folder
    elif base is not None:
        raise ValueError(f"base= goes with the folder of an adapter; {folder} is none.")
    if gguf := _gguf_file(folder):
        folder = convert_gguf(gguf, _cache(cache) / _origin(gguf)["fingerprint"][:16])
    model = _load_model(folder, dtype)
    if adapter is not None:
        model = _load_adapter(model, _existing(Path(adapter)))
    _require_finite(model, adapter or folder)
    places = [tokenizer] if tokenizer is not None else [adapter, folder]
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    found = _load_tokenizer([Path(place) for place in places if place is not None])
    return LanguageModel(
        model=model.eval(),
        tokenizer=found,
        context_length=int(
            getattr(config, "max_position_embeddings", None)
            or getattr(config, "n_positions", None)
            or found.model_max_length
        ),
        path=folder if adapter is None else Path(adapter),
        base_path=None if adapter is None else folder,
    )


def generate(
    language: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int = 32,
    seed: int = 0,
    temperature: float = 0.0,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt, greedily unless a temperature is given.

    Args:
        language: The model.
        prompt: The text to continue, or with `chat` what the user says.
        max_new_tokens: Most tokens to add.
        seed: Seed of the draws at a temperature.
        temperature: Divides the logits; 0 takes the most probable token each time.
        chat: Put the prompt into the model's chat template and return the answer.
        on_text: Called with each piece of text as it comes; the pieces join to what is returned.

    Returns:
        What was added, without special tokens; prompt and completion join to one text.

    Raises:
        ValueError: The prompt leaves no room in the context, or there is no chat template.
    """
    transformers = require("transformers", extra="language")
    tokenizer, model = language.tokenizer, language.model
    text = prompt
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template; leave chat out.")
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not encoded:
        if tokenizer.bos_token_id is None:
            raise ValueError("The prompt is empty; give the model something to continue.")
        encoded = [tokenizer.bos_token_id]
    if encoded[:2] == [tokenizer.bos_token_id] * 2:
        encoded = encoded[1:]
    if len(encoded) + max_new_tokens > language.context_length:
        raise ValueError(
            f"The prompt's {len(encoded)} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"model's context of {language.context_length}; shorten one of them."
        )
    ends = getattr(model.generation_config, "eos_token_id", None)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=_first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0),
        **options,
    )
    ids = torch.tensor([encoded], device=next(model.parameters()).device)
    streamer = None if on_text is None else _Pieces(tokenizer, encoded, on_text)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=streamer,
        )[0]
    before, after = (_readable(tokenizer, part) for part in (encoded, out.tolist()))
    return after[len(before) :]


class _Pieces:
    """What `transformers` calls a streamer: passes text on as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], on_text: Callable[[str], None]):
        self.tokenizer, self.on_text, self.ids, self.begun = tokenizer, on_text, list(prompt), False
        self.done = len(_readable(tokenizer, prompt))

    def put(self, ids: torch.Tensor) -> None:
        if not self.begun:  # the prompt comes first
            self.begun = True
            return
        self.ids += ids.flatten().tolist()
        if not (text := _readable(self.tokenizer, self.ids)).endswith("\ufffd"):
            self._pass_on(text)

    def end(self) -> None:
        self._pass_on(_readable(self.tokenizer, self.ids))

    def _pass_on(self, text: str) -> None:
        if piece := text[self.done :]:
            self.on_text(piece)
        self.done = len(text)


def convert_gguf(path: str | Path, out: str | Path) -> Path:
    """Make a plain float32 model folder from a GGUF file; a finished conversion is taken as it is.

    Args:
        path: The GGUF file.
        out: The folder to make.

    Returns:
        The folder.

    Raises:
        ValueError: The file cannot be read, or the folder holds something else.
    """
    path, out = Path(path).resolve(), Path(out)
    origin = _origin(path)
    if (out / ORIGIN).is_file():
        if read_json(out / ORIGIN).get("fingerprint") == origin["fingerprint"]:
            return out
        raise ValueError(
            f"{out} was converted from another file than {path}; choose another folder."
        )
    if out.exists():
        raise ValueError(f"{out} exists and is no converted model; choose another folder.")
    transformers = require("transformers", extra="language")
    for module in ("gguf", "accelerate"):
        require(module, extra="language")
    partial = out.with_name(f".{out.name}.partial-{token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        options = {"gguf_file": path.name, "local_files_only": True}
        # The bars of reading a GGUF file cannot be turned off; they go to stderr.
        with _understood(path), quiet(), redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, **options
            )
            _forget_quantization(model)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        write_json(partial / ORIGIN, origin)
        try:
            os.replace(partial, out)
        except OSError:  # another process was faster
            if not (out / ORIGIN).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _forget_quantization(model: Any) -> None:
    """A dequantized model still says that it is quantized, and then refuses to be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model, "quantization_method"):
        del model.quantization_method


# Finding


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    near = _near(path)
    hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path))
    if hub and not near and (len(path.parts) == 1 or not path.parent.exists()):
        raise FileNotFoundError(
            f"There is no folder {str(path)!r}. Headwater does not download models; pass a local "
            "folder with config.json, *.safetensors and a tokenizer."
        )
    raise FileNotFoundError(
        f"{path} does not exist; " + (f"did you mean {near}?" if near else "check the path.")
    )


def _near(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return " or ".join(difflib.get_close_matches(path.name, names, n=3, cutoff=0.75))


def _gguf_file(path: Path) -> Path | None:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{path} is a file; expected a model folder or a .gguf file.")
        return path
    if (path / "config.json").is_file() and _weights(path):
        return None
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} GGUF files; pass one of {', '.join(p.name for p in files)}."
        )
    return files[0] if files else None


def _base_of(folder: Path, base: str | Path | None) -> Path:
    """The folder of the model that an adapter changes."""
    if base is not None:
        return _existing(Path(base))
    named = _config(folder / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise ValueError(f"The adapter in {folder} does not name its model; pass base=.")
    for place in (Path(named), folder / named):
        if place.exists():
            return place
    raise FileNotFoundError(
        f"The adapter in {folder} changes the model {named!r}, which is not there; pass base= with "
        "its local folder. Headwater does not download models."
    )


def _cache(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    home = os.environ.get("HEADWATER_CACHE") or Path.home() / ".cache" / "headwater"
    return Path(home) / "models"


def _origin(path: Path) -> dict[str, Any]:
    """A file's name, size, and a digest of its size, beginning and end."""
    size, part = path.stat().st_size, 1 << 22
    with path.open("rb") as file:
        head = file.read(part)
        file.seek(max(0, size - part))
        tail = file.read(part)
    digest = blake2b(f"{size}\n".encode() + head + tail, digest_size=32).hexdigest()
    return {"made_from": path.name, "bytes": size, "fingerprint": digest}


# Loading


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _require_safetensors(folder: Path) -> None:
    if _weights(folder):
        return
    pickled = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickled:
        raise ValueError(
            f"{folder} holds its weights as pickles only ({', '.join(pickled[:3])}); reading a pickle "
            "can run code, so Headwater reads safetensors. Save the model again with "
            "model.save_pretrained(folder)."
        )
    raise ValueError(f"{folder} holds no weights (*.safetensors); pass the folder of a model.")


def _load_model(folder: Path, dtype: DType) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, so it is no model folder; pass the folder that holds "
            "config.json and *.safetensors, or a .gguf file."
        )
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"Expected dtype 'auto', 'float32' or 'bfloat16'; got {dtype!r}.")
    transformers = require("transformers", extra="language")
    if (folder / QUANTIZED).is_dir():
        return _load_quantized(folder, dtype)
    _require_safetensors(folder)
    with _understood(folder), quiet():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}, …), "
            "which would be random numbers; pass the folder of a causal language model."
        )
    if dtype == "auto" and model.dtype == torch.float16:
        model = model.float()
    return model


def _load_quantized(folder: Path, dtype: DType) -> Any:
    transformers = require("transformers", extra="language")
    with _understood(folder), quiet():
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.random.fork_rng(devices=[]):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        load_quantized(model, folder / QUANTIZED)
    if dtype != "auto":
        for p in model.parameters():  # scales keep their precision
            p.data = p.data.to(getattr(torch, dtype))
    return model


def save_quantized_language(
    language: LanguageModel,
    model: nn.Module,
    out: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    made_from: Mapping[str, str] | None = None,
    table: Mapping[str, list] | None = None,
) -> None:
    """Write a quantized language model as a folder that `load_language_model` reads, whole or not at all.

    Args:
        language: The model it was made of.
        model: The quantized model.
        out: The folder; a quantized model that is there is replaced.
        facts: What is to be known of it.
        made_from: Fingerprints of what it was made from.
        table: A row for each quantized layer.

    Raises:
        ValueError: The folder holds something else than a quantized model.
    """
    refuse_other_folder(Path(out))
    with whole_folder(Path(out), replace=True) as partial:
        model.config.save_pretrained(partial)  # type: ignore[union-attr, operator]
        language.tokenizer.save_pretrained(partial)
        save_quantized(model, partial / QUANTIZED, facts=facts, made_from=made_from, table=table)


def refuse_other_folder(out: Path) -> None:
    """Let a quantized model be replaced, and nothing else.

    Raises:
        ValueError: There is something else.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file; choose a folder for the quantized model.")
    if out.exists() and any(out.iterdir()) and not (out / QUANTIZED).is_dir():
        raise ValueError(
            f"{out} holds something else than a quantized model; choose another folder."
        )


def _load_adapter(model: Any, folder: Path) -> Any:
    peft = require("peft", extra="language")
    _config(folder / "adapter_config.json")
    _require_safetensors(folder)
    with _understood(folder), quiet():
        return peft.PeftModel.from_pretrained(
            model, folder, is_trainable=True, use_safetensors=True, local_files_only=True
        )


def _load_tokenizer(places: Sequence[Path]) -> Any:
    """The tokenizer in the first of the folders that has one."""
    transformers = require("transformers", extra="language")
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
    )
    for folder in places:
        if any((folder / name).is_file() for name in names):
            with _understood(folder), quiet():
                return transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
    raise ValueError(
        f"{places[-1]} has no tokenizer (tokenizer.json); pass tokenizer= with the folder of one."
    )


def _require_finite(model: nn.Module, folder: str | Path) -> None:
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ValueError(
            f"The weights in {folder} hold NaN or infinity in {len(broken)} tensors "
            f"({', '.join(broken[:3])}); the file is damaged, or training diverged."
        )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; pass the folder of a peft adapter.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Say which model could not be loaded, in one line."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise ValueError(f"{path} could not be loaded: {why}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no notices of libraries to their developers."""
    logging = require("transformers", extra="language").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _readable(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
