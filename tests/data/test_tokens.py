import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.data.text import Records
from headwater.data.tokens import completion_examples, overlap, pieces, tokenize
from tests.language_cases import byte_tokenizer, tokenizer

PLAIN, WITH_BOS, BYTES = tokenizer(), tokenizer(adds_bos=True), byte_tokenizer()
BOS = 0


def records(**content) -> Records:
    n = len(next(iter(content.values())))
    return Records(ids=[f"e{i}" for i in range(n)], **content)


def pair(prompt: str, completion: str) -> Records:
    return records(prompts=[prompt], completions=[completion])


def scored(examples, i=0) -> list[str]:
    """The tokens of an example that are scored."""
    labels = examples.batch([i])["labels"][0]
    return [
        words.strip()
        for words, label in zip(examples.tokens(i), labels, strict=True)
        if label != -100
    ]


def test_batches_are_padded_on_the_right_and_padding_is_not_scored():
    examples = tokenize(records(texts=["the river runs", "a lake"]), PLAIN)
    batch = examples.batch([1, 0])
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"][0].tolist() == [*batch["input_ids"][0, :2].tolist(), -100]
    assert torch.equal(batch["labels"][1], batch["input_ids"][1])
    assert examples.lengths == [3, 2]
    assert (examples.report.n, examples.report.n_tokens, examples.report.messages) == (2, 5, [])


def test_of_a_pair_only_the_completion_is_scored():
    examples = tokenize(pair("the river runs", " to the sea"), PLAIN)
    assert scored(examples) == ["to", "the", "sea"]
    # A token that reaches over the boundary holds a character of the completion.
    assert scored(tokenize(pair("the river ru", "ns to"), PLAIN)) == ["runs", "to"]


def test_of_a_chat_only_the_assistants_turns_are_scored():
    chat = [
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": "runs to"},
        {"role": "user", "content": "the lake"},
        {"role": "assistant", "content": "stands"},
    ]
    examples = tokenize(records(messages=[chat]), PLAIN)
    assert scored(examples) == ["runs", "to", "</s>", "stands", "</s>"]
    assert examples.tokens(0)[0] == "<s>"


def test_a_template_that_renders_earlier_turns_anew_still_scores_what_was_said():
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' and loop.last %}the {% endif %}"
        "{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}by {% endif %}"
    )
    chat = [{"role": "user", "content": "a lake"}, {"role": "assistant", "content": "stands"}]
    examples = tokenize(records(messages=[chat]), PLAIN, template=template)
    assert scored(examples) == ["stands"]


def test_a_chat_without_a_template_is_refused():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="no chat template"):
        tokenize(records(messages=[chat]), tokenizer(template=None))


def test_a_doubled_bos_is_taken_out_and_reported():
    examples = tokenize(records(texts=["<s> the river", "the lake"]), WITH_BOS)
    ids = examples.batch([0, 1])["input_ids"]
    assert ids[:, 0].tolist() == [BOS, BOS]
    assert (ids == BOS).sum() == 2
    assert examples.report.n_bos_doubled_fixed == 1
    assert "'<s>' would have stood twice" in examples.report.messages[0]


def test_a_chat_template_with_its_own_bos_is_not_given_another():
    chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "sea"}]
    examples = tokenize(records(messages=[chat]), WITH_BOS)
    assert (examples.batch([0])["input_ids"] == BOS).sum() == 1
    assert examples.report.n_bos_doubled_fixed == 1
    assert tokenize(records(messages=[chat]), PLAIN).report.n_bos_doubled_fixed == 0


@pytest.mark.parametrize(
    ("words", "add_bos", "n"),
    [(PLAIN, None, 0), (PLAIN, True, 1), (WITH_BOS, None, 1), (WITH_BOS, False, 0)],
)
def test_bos_comes_as_the_tokenizer_or_the_user_says(words, add_bos, n):
    examples = tokenize(records(texts=["the river runs"]), words, add_bos=add_bos)
    assert examples.lengths == [3 + n]
    assert (examples.batch([0])["input_ids"] == BOS).sum() == n


def test_long_texts_lose_their_end_and_the_report_says_so():
    texts = ["the river runs to the sea", "a lake"]
    examples = tokenize(records(texts=texts), PLAIN, max_length=4)
    assert examples.lengths == [4, 2]
    assert examples.report.n_truncated == 1
    assert (
        "longer than 4 tokens; their ends were cut (2 tokens in all): 'e0'"
        in examples.report.messages[0]
    )
    with pytest.raises(ValueError, match="longer than max_length=4 tokens: 'e0'"):
        tokenize(records(texts=texts), PLAIN, max_length=4, truncate=False)


@pytest.mark.parametrize("words", [PLAIN, WITH_BOS])
@given(n_prompt=st.integers(1, 12), n_completion=st.integers(1, 12), room=st.integers(2, 26))
def test_a_long_pair_keeps_its_completion_and_loses_the_beginning_of_its_prompt(
    words, n_prompt, n_completion, room
):
    prompt, completion = ["north"] * (n_prompt - 1) + ["by"], [" sea"] * n_completion
    examples = tokenize(pair(" ".join(prompt), "".join(completion)), words, max_length=room)
    bos = int(words is WITH_BOS)
    assert examples.lengths == [min(room, bos + n_prompt + n_completion)]
    assert scored(examples) == ["sea"] * min(n_completion, room - 1)
    kept = room - n_completion - bos
    if kept >= 1:  # the end of the prompt is what stays of it
        assert examples.tokens(0)[bos : bos + min(kept, n_prompt)][-1].strip() == "by"
    if bos:
        assert examples.tokens(0)[0] == "<s>"
    whole = n_completion <= room - 1
    messages = " ".join(examples.report.messages)
    assert ("except for the ends of 'e0'" in messages) == (not whole)
    assert bool(messages) == (bos + n_prompt + n_completion > room)


def test_the_greatest_length_is_the_tokenizers_unless_given():
    texts = records(texts=["the " * 40])
    assert tokenize(texts, PLAIN).lengths == [32]
    unbounded = tokenizer()
    unbounded.model_max_length = 10**30
    with pytest.raises(ValueError, match="pass max_length"):
        tokenize(texts, unbounded)


def test_examples_without_a_scored_token_are_left_out_by_name():
    found = records(texts=["the river", "sea", "", "a lake"])
    found.metadata["k"] = [0, 1, 2, 3]
    examples = tokenize(found, PLAIN)
    assert examples.ids == ["e0", "e3"]
    assert examples.metadata == {"k": [0, 3]}
    assert examples.report.n_dropped == 2
    assert "'e1', 'e2'" in examples.report.messages[0]
    with pytest.raises(ValueError, match="None of the 1 examples"):
        tokenize(records(texts=["sea"]), PLAIN)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=2, max_size=30))
def test_the_pieces_join_to_the_text_whatever_it_is(text):
    ids = BYTES(text)["input_ids"]
    assert len(ids) == len(text.encode())  # one token a byte: most characters here have several
    found = pieces(BYTES, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_a_character_of_several_tokens_goes_to_the_last_of_them():
    assert pieces(BYTES, BYTES("a€b")["input_ids"]) == ["a", "", "", "€", "b"]


def test_pieces_of_broken_bytes_are_not_held_back_for_ever():
    broken = [BYTES.convert_tokens_to_ids("â")] * 9  # a byte that begins a character of three
    found = pieces(BYTES, broken)
    assert len(found) == 9
    assert found[3] != ""


def test_a_subset_keeps_names_tokens_and_metadata():
    found = records(texts=["the river", "a lake stands", "by the sea"])
    found.metadata["k"] = [0, 1, 2]
    examples = tokenize(found, PLAIN)
    part = examples.subset([2, 0])
    assert part.ids == ["e2", "e0"]
    assert part.metadata == {"k": [2, 0]}
    assert part.tokens(0) == examples.tokens(2)
    assert torch.equal(part.batch([0])["labels"], examples.batch([2])["labels"])
    assert part.fingerprint() == examples.subset([2, 0]).fingerprint() != examples.fingerprint()


def test_the_fingerprint_knows_ids_tokens_and_what_is_scored():
    base = tokenize(pair("the river", " runs"), PLAIN)
    assert base.fingerprint() == tokenize(pair("the river", " runs"), PLAIN).fingerprint()
    others = [
        tokenize(pair("the", " river runs"), PLAIN),
        tokenize(pair("the river", " stands"), PLAIN),
        tokenize(Records(ids=["x"], prompts=["the river"], completions=[" runs"]), PLAIN),
    ]
    assert len({each.fingerprint() for each in [base, *others]}) == 4


def test_queries_score_the_completion_after_the_prompt_or_the_users_turn():
    found = completion_examples(PLAIN, ["the river", "a lake"], [" runs", " stands"])
    assert found.ids == ["query-1", "query-2"]
    assert [scored(found, i) for i in (0, 1)] == [["runs"], ["stands"]]
    chat = completion_examples(PLAIN, ["the river"], ["runs"], chat=True, ids=["q"])
    assert chat.ids == ["q"]
    assert scored(chat) == ["runs", "</s>"]
    assert "<user>" in "".join(chat.tokens(0))


def test_a_part_of_a_completion_is_scored_and_what_follows_it_left_out():
    said = " runs to the sea"
    found = completion_examples(PLAIN, ["the river"] * 2, [said] * 2, spans=[(6, 12), None])
    assert scored(found, 0) == ["to", "the"]
    assert "".join(found.tokens(0)) == "the river runs to the"
    assert scored(found, 1) == ["runs", "to", "the", "sea"]
    inside = completion_examples(PLAIN, ["the river"], [said], spans=[(7, 8)])
    assert scored(inside) == ["to"]  # the token that holds the character
    chat = completion_examples(PLAIN, ["the sea"], ["to the sea"], chat=True, spans=[(3, 10)])
    assert scored(chat) == ["the", "sea"] and chat.tokens(0)[-1].strip() == "sea"


@pytest.mark.parametrize("span", [(0, 0), (-1, 3), (3, 99), (5, 2)])
def test_a_span_outside_the_completion_is_refused(span):
    with pytest.raises(ValueError, match="span within the 5 characters"):
        completion_examples(PLAIN, ["the river"], [" runs"], spans=[span])


def test_each_scored_token_is_a_question_of_its_own():
    found = completion_examples(PLAIN, ["the river"], [" runs to the sea"])
    each = found.by_token(0)
    assert [scored(each, i) for i in range(len(each))] == [["runs"], ["to"], ["the"], ["sea"]]
    assert [len(each.tokens(i)) for i in range(len(each))] == [3, 4, 5, 6]
    pairs = found.by_token(0, most=3)
    assert [scored(pairs, i) for i in range(len(pairs))] == [["runs", "to"], ["the", "sea"]]


def test_held_out_examples_are_found_in_the_training_data_by_id_and_by_content():
    def examples(**texts):
        return tokenize(Records(ids=list(texts), texts=list(texts.values())), PLAIN)

    train = examples(a="the river runs", b="a lake", c="the sea")
    assert overlap(examples(x="the hill", y="the river"), train) == ""
    assert overlap(examples(x="the hill", b="the city"), train) == (
        "1 held-out example also occurs in the training data (1 by id, such as 'b')."
    )
    # Same tokens, other spaces; an example that has both in common counts once.
    both = examples(x="a   lake", a="the river runs", y="the sea", z="the old sea")
    assert overlap(both, train) == (
        "3 held-out examples also occur in the training data (1 by id, such as 'a'; 2 by content, "
        "such as 'x', which is 'b' there)."
    )


def test_a_prompt_with_its_completion_equals_the_same_text_scored_whole():
    train = tokenize(records(texts=["the river runs to the sea"]), PLAIN)
    asked = Records(ids=["q"], prompts=["the river runs"], completions=[" to the sea"])
    assert "'q', which is 'e0' there" in overlap(tokenize(asked, PLAIN), train)
