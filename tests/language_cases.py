"""Tiny language models with random weights, and a tokenizer of a few words, made in memory."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from headwater.models.language import LanguageModel

WORDS = [
    "the",
    "a",
    "river",
    "lake",
    "flows",
    "runs",
    "to",
    "from",
    "sea",
    "hill",
    "rises",
    "in",
    "north",
    "south",
    "old",
    "city",
    "stands",
    "by",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(*, adds_bos: bool = False, template: str | None = TEMPLATE) -> Fast:
    """A tokenizer whose words are those of `WORDS`."""
    words = {word: i for i, word in enumerate([*SPECIAL, *WORDS, "."])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    found = Fast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        extra_special_tokens=["<user>", "<assistant>"],
        model_max_length=32,
    )
    found.chat_template = template
    return found


def byte_tokenizer() -> Fast:
    """A tokenizer with one token for each byte, so that some characters have several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    made.decoder = decoders.ByteLevel()
    return Fast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", model_max_length=64)


def llama(*, layers: int = 3, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    vocab = len(SPECIAL) + len(WORDS) + 1
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def saved(folder, model=None, **options) -> LanguageModel:
    """A tiny model with its tokenizer, saved into a folder."""
    model, words = model or llama(), tokenizer(**options)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return LanguageModel(model=model, tokenizer=words, context_length=32, path=folder)
