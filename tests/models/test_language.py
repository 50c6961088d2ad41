import json

import pytest
import torch

from headwater.models.language import _Pieces, convert_gguf, generate, load_language_model
from tests.language_cases import byte_tokenizer, gpt2, llama, saved


@pytest.fixture
def folder(tmp_path):
    saved(tmp_path / "model")
    return tmp_path / "model"


def test_what_was_saved_is_loaded_ready_to_run(folder):
    language = load_language_model(folder)
    assert not language.model.training
    assert (language.context_length, language.path, language.base_path) == (32, folder, None)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(language.model(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert language.tokenizer("the river")["input_ids"] == [5, 7]


@pytest.mark.parametrize(("asked", "got"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_numbers_are_those_of_the_file_or_those_asked_for(tmp_path, asked, got):
    saved(tmp_path, llama(dtype=torch.bfloat16))
    assert load_language_model(tmp_path, dtype=asked).model.dtype == got


def test_float16_is_computed_in_float32(tmp_path):
    saved(tmp_path, llama(dtype=torch.float16))
    assert load_language_model(tmp_path).model.dtype == torch.float32


def test_gpt2_tells_its_context_under_another_name(tmp_path):
    saved(tmp_path, gpt2())
    assert load_language_model(tmp_path).context_length == 32


def test_greedy_text_repeats_and_is_the_most_probable_one(folder):
    language = load_language_model(folder)
    made = generate(language, "the river", max_new_tokens=3)
    assert made == generate(language, "the river", max_new_tokens=3, seed=5)
    ids = language.tokenizer("the river")["input_ids"]
    for _ in range(3):  # what greedy means, written out
        ids.append(int(language.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert made == language.tokenizer.decode(ids, skip_special_tokens=True)[len("the river") :]


def test_text_is_passed_on_as_it_comes(folder):
    language, pieces = load_language_model(folder), []
    made = generate(language, "the river", max_new_tokens=5, on_text=pieces.append)
    assert "".join(pieces) == made and len(pieces) == len(made.split()) > 2


def test_text_is_passed_on_in_whole_characters():
    pieces, words = [], byte_tokenizer()
    prompt, said = words("a")["input_ids"], words("né…")["input_ids"]
    streamer = _Pieces(words, prompt, pieces.append)
    for ids in ([prompt], *([i] for i in said)):
        streamer.put(torch.tensor(ids))
    streamer.end()
    assert pieces == ["n", "é", "…"]


def test_drawn_text_depends_on_the_seed_alone(folder):
    language = load_language_model(folder)
    options = {"max_new_tokens": 12, "temperature": 2.0}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = [generate(language, "the river", seed=seed, **options) for seed in range(4)]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert one == [generate(language, "the river", seed=seed, **options) for seed in range(4)]
    assert len(set(one)) > 1


def test_a_prompt_without_room_is_refused(folder):
    with pytest.raises(ValueError, match=".*".join(["40 tokens", "context of 32"])):
        generate(load_language_model(folder), "the " * 40)


def test_a_chat_prompt_is_put_into_the_template(folder):
    language = load_language_model(folder)
    prompt = "<s><user> the river </s> <assistant> "
    ids = language.tokenizer(prompt)["input_ids"]
    expected = int(language.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    made = generate(language, "the river", chat=True, max_new_tokens=1).strip()
    assert made == language.tokenizer.decode([expected], skip_special_tokens=True).strip()


def test_an_adapter_is_put_on_its_model_and_alone_can_be_trained(folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    adapted.peft_config["default"].base_model_name_or_path = "../model"  # relative to the adapter
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = torch.tensor([[5, 6, 7]])
    for language in (
        load_language_model(tmp_path / "adapter"),
        load_language_model(tmp_path / "adapter", base=folder),
        load_language_model(folder, adapter=tmp_path / "adapter"),
    ):
        assert language.base_path is not None
        assert language.base_path.resolve() == folder
        assert language.path == tmp_path / "adapter"
        assert torch.equal(language.model(input_ids=ids).logits, adapted(input_ids=ids).logits)
        trained = [n for n, p in language.model.named_parameters() if p.requires_grad]
        assert len(trained) == 6  # A and B in each of three blocks
        assert all("lora_" in name for name in trained)


def test_an_adapter_whose_model_is_gone_asks_for_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/model"})
    )
    with pytest.raises(FileNotFoundError, match=".*".join(["'org/model'", "pass base="])):
        load_language_model(tmp_path)


def test_a_name_on_a_hub_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "org/model-1b"):
        with pytest.raises(
            FileNotFoundError,
            match=".*".join([name, "does not download models; pass a local folder"]),
        ):
            load_language_model(name)


def test_a_mistyped_folder_is_answered_with_similar_names(folder):
    with pytest.raises(
        FileNotFoundError, match=".*".join(["modle does not exist; did you mean model"])
    ):
        load_language_model(folder.parent / "modle")


def test_a_folder_that_is_no_model_says_what_is_missing(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=".*".join(["no config.json"])):
        load_language_model(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=".*".join(["holds no weights"])):
        load_language_model(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=".*".join(["pickles only", r"pytorch_model\.bin"])):
        load_language_model(folder)


def test_a_model_without_a_tokenizer_asks_for_one(folder, tmp_path):
    llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=".*".join(["no tokenizer", "tokenizer="])):
        load_language_model(tmp_path / "bare")
    assert load_language_model(tmp_path / "bare", tokenizer=folder).tokenizer.bos_token == "<s>"


def test_damaged_weights_are_named(tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    saved(tmp_path, model)
    with pytest.raises(
        ValueError, match=".*".join(["NaN or infinity in 1 tensors", r"layers\.1\.mlp\.up_proj"])
    ):
        load_language_model(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused_in_one_line(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=".*".join(["lacks 9 of the model's weights"])):
        load_language_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        load_language_model(folder)
    assert "\n" not in str(caught.value)


# A real GGUF file: a llama of one block, written with the gguf package


@pytest.fixture
def gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    words, model = byte_tokenizer(), tiny_llama()
    tokens = [*words.convert_ids_to_tokens(range(len(words))), "Ġt"]  # the format wants a merge
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(len(tokens))
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ t"])
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    block = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"model.layers.0.{k}": f"blk.0.{v}" for k, v in block.items()}
    for name, p in model.state_dict().items():
        value = p.detach()
        if "q_proj" in name or "k_proj" in name:  # the file's order of the rotary halves
            value = value.view(2, 2, -1, 16).transpose(1, 2).reshape(16, 16)
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", value.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(byte_tokenizer()) + 1,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).eval()


def test_a_gguf_file_becomes_a_plain_model_once(gguf_file, tmp_path):
    pytest.importorskip("accelerate")
    cache = tmp_path / "cache"
    language = load_language_model(gguf_file, cache=cache)
    ids = torch.tensor([[5, 6, 7]])
    expected = tiny_llama()(input_ids=ids).logits
    # The same float32 numbers in the same operations.
    torch.testing.assert_close(language.model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    assert language.context_length == 64
    assert language.path.parent == cache
    config = json.loads((language.path / "config.json").read_text())
    assert "quantization_config" not in config
    made = (language.path / "model.safetensors").stat().st_mtime_ns
    again = load_language_model(gguf_file.parent, cache=cache)  # the folder that holds it
    assert again.path == language.path
    assert (again.path / "model.safetensors").stat().st_mtime_ns == made


def test_a_conversion_never_replaces_what_is_there(gguf_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match=".*".join(["is no converted model"])):
        convert_gguf(gguf_file, tmp_path / "mine")
    (tmp_path / "bad.gguf").write_bytes(b"GGUFnothing")
    with pytest.raises(ValueError, match=".*".join(["bad.gguf could not be loaded"])):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf", "mine", "tiny.gguf"]
