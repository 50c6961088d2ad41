"""Texts, completions and chats as token ids that are scored where the model was, or would be, trained.

Examples are padded on the right and never packed: attribution asks about one example at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwater.core.examples import Examples
from headwater.core.fingerprint import fingerprint_json, fingerprint_tensors
from headwater.core.prediction import IGNORE
from headwater.data.text import Message, Records

UNBOUNDED = 10**6  # a tokenizer that names a length beyond this one knows none


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """What tokenizing did.

    Attributes:
        n: Examples that are kept.
        n_tokens: Their tokens.
        n_truncated: Examples that were cut to the greatest length.
        n_bos_doubled_fixed: Examples whose beginning-of-sequence token would have come twice.
        n_dropped: Examples without a scored token, left out.
        messages: The same in sentences, for people; empty when nothing happened.
    """

    n: int
    n_tokens: int
    n_truncated: int = 0
    n_bos_doubled_fixed: int = 0
    n_dropped: int = 0
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tokens:
    """One example: token ids, and which of them are scored."""

    ids: list[int]
    scored: list[bool]


class TextExamples(Examples):
    """Tokenized texts with stable ids.

    A batch is a dictionary of `input_ids`, `attention_mask` and `labels` (-100 where not scored, not
    shifted), each (batch, pos), padded on the right.

    Attributes:
        report: What tokenizing did.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        tokenizer: Any,
        *,
        ids: Sequence[str],
        metadata: dict[str, list] | None = None,
        report: TokenReport | None = None,
    ):
        self.tokenizer, self.ids, self.metadata = tokenizer, list(ids), metadata or {}
        if len(tokens) != len(self.ids):
            raise ValueError(f"Expected {len(tokens)} ids, one for each example; got {len(ids)}.")
        self._check()
        self.lengths = [len(each.ids) for each in tokens]
        self.input_ids = [torch.tensor(each.ids) for each in tokens]
        self.labels = [
            torch.tensor(each.ids).masked_fill(~torch.tensor(each.scored), IGNORE)
            for each in tokens
        ]
        self.report = report or TokenReport(n=len(self.ids), n_tokens=sum(self.lengths))

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Token ids, attention mask and labels of the given examples, padded on the right."""
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        chosen = [int(i) for i in indices]

        def right(rows: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        return {
            "input_ids": right([self.input_ids[i] for i in chosen], pad or 0),
            "attention_mask": right([torch.ones_like(self.input_ids[i]) for i in chosen], 0),
            "labels": right([self.labels[i] for i in chosen], IGNORE),
        }

    def fingerprint(self) -> str:
        """A digest of ids, tokens and what is scored; metadata do not count."""
        parts = {
            "input_ids": torch.cat(self.input_ids),
            "labels": torch.cat(self.labels),
            "lengths": torch.tensor(self.lengths),
        }
        return fingerprint_json([self.ids, fingerprint_tensors(parts.items())])

    def subset(self, indices: Sequence[int]) -> "TextExamples":
        """The given examples under the same ids."""
        chosen = [int(i) for i in indices]
        return TextExamples(
            [
                Tokens(self.input_ids[i].tolist(), (self.labels[i] != IGNORE).tolist())
                for i in chosen
            ],
            self.tokenizer,
            ids=[self.ids[i] for i in chosen],
            metadata={k: [v[i] for i in chosen] for k, v in self.metadata.items()},
        )

    def by_token(self, index: int, *, most: int | None = None) -> "TextExamples":
        """An example for each scored token of one: that token alone is scored, and what follows it is left out.

        Args:
            index: Which example.
            most: At most so many; where there are more tokens, neighbours are scored together.
        """
        ids = self.input_ids[index].tolist()
        places = [t for t in (self.labels[index] != IGNORE).nonzero().flatten().tolist() if t > 0]
        together = 1 if most is None else max(-(-len(places) // most), 1)
        groups = [places[i : i + together] for i in range(0, len(places), together)]
        each = [Tokens(ids[: g[-1] + 1], [t in g for t in range(g[-1] + 1)]) for g in groups]
        return TextExamples(each, self.tokenizer, ids=[str(g[0]) for g in groups])

    def tokens(self, index: int) -> list[str]:
        """The text of each token; joined, they are the text that the model read."""
        return pieces(self.tokenizer, self.input_ids[index].tolist())

    def text(self, index: int) -> str:
        """The text that the model read, at once."""
        return _decode(self.tokenizer, self.input_ids[index].tolist())


def joined(parts: Sequence[TextExamples], *, ids: Sequence[str] | None = None) -> TextExamples:
    """Examples of several sources one after the other; columns that a source lacks are None there.

    Args:
        parts: The sources.
        ids: Other ids for all of them.

    Raises:
        ValueError: An id is in two of them.
    """
    if len(parts) == 1:
        return parts[0]
    names = list(dict.fromkeys(name for part in parts for name in part.metadata))
    return TextExamples(
        [
            Tokens(ids.tolist(), (labels != IGNORE).tolist())
            for part in parts
            for ids, labels in zip(part.input_ids, part.labels, strict=True)
        ],
        parts[0].tokenizer,
        ids=[name for part in parts for name in part.ids] if ids is None else ids,
        metadata={
            name: [v for p in parts for v in p.metadata.get(name, [None] * len(p))]
            for name in names
        },
    )


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    Several tokens may make up one character; it goes to the last of them, the others get "".
    """
    found: list[str] = []
    start = done = 0  # tokens [start, done) are the context of the pieces that come next
    for end in range(1, len(ids) + 1):
        before, now = (_decode(tokenizer, ids[start:stop]) for stop in (done, end))
        # An unfinished character decodes to U+FFFD; no character has more than four bytes.
        if now.endswith("\ufffd") and end < len(ids) and end - done < 4:
            found.append("")
            continue
        found.append(now[len(before) :])
        start, done = done, end
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def tokenize(
    records: Records,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    template: str | None = "auto",
    add_bos: bool | None = None,
    truncate: bool = True,
) -> TextExamples:
    """Tokenize records, scored as in training: texts whole, completions, and assistants' turns.

    Args:
        records: What `read_records` returned.
        tokenizer: A tokenizer of `transformers`, a fast one for pairs and chats.
        max_length: Most tokens of an example: the model's context; the tokenizer's when left out.
        template: Chat template as Jinja text; "auto" and None take the tokenizer's own.
        add_bos: Begin with the beginning-of-sequence token; None does as the tokenizer does.
        truncate: Cut longer examples: texts and chats at their end, pairs at the beginning of the
            prompt, so that the completion stays. False refuses them.

    Returns:
        The examples, with what happened to them in `report`.

    Raises:
        ValueError: There is no chat template, or nothing to score, or an example is too long.
    """
    if max_length is None:
        max_length = int(tokenizer.model_max_length)
        if max_length > UNBOUNDED:
            raise ValueError(
                "The tokenizer does not say how long a context the model has; pass max_length."
            )
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens; got {max_length}.")
    encoder = _Encoder(tokenizer, None if template == "auto" else template, add_bos)
    encoded = [encoder.record(records, i) for i in range(len(records))]
    pairs = records.prompts is not None
    cut = [_shorten(each, max_length, pairs=pairs, bos=tokenizer.bos_token_id) for each in encoded]
    long = [i for i, each in enumerate(encoded) if len(each.ids) > max_length]
    kept = [i for i, each in enumerate(cut) if any(each.scored[1:])]
    dropped = sorted(set(range(len(cut))) - set(kept))
    if long and not truncate:
        raise ValueError(
            f"{_examples(len(long))} longer than max_length={max_length} tokens: "
            f"{_named(records.ids, long)}. Shorten them, or pass truncate=True."
        )
    if not kept:
        raise ValueError(
            f"None of the {len(records)} examples of {records.source or 'the records'} has a token "
            f"to score after its first one: {_named(records.ids, dropped)}."
        )
    report = TokenReport(
        n=len(kept),
        n_tokens=sum(len(cut[i].ids) for i in kept),
        n_truncated=len(long),
        n_bos_doubled_fixed=encoder.n_bos_doubled,
        n_dropped=len(dropped),
        messages=[
            *_truncation(records, encoded, cut, long, max_length),
            *_doubling(records, encoder),
            *_dropping(records, dropped),
        ],
    )
    return TextExamples(
        [cut[i] for i in kept],
        tokenizer,
        ids=[records.ids[i] for i in kept],
        metadata={k: [v[i] for i in kept] for k, v in records.metadata.items()},
        report=report,
    )


def completion_examples(
    tokenizer: Any,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    chat: bool = False,
    ids: Sequence[str] | None = None,
    metadata: dict[str, list] | None = None,
    spans: Sequence[tuple[int, int] | None] | None = None,
    max_length: int | None = None,
    add_bos: bool | None = None,
) -> TextExamples:
    """Queries: completions to be traced, each scored after its prompt.

    Args:
        tokenizer: The model's tokenizer.
        prompts: What came before, not scored.
        completions: What is asked about.
        chat: The prompt is a user's turn and the completion the assistant's answer.
        ids: Names of the queries; "query-1", "query-2", … when left out.
        metadata: Columns that travel into the results.
        spans: First character, and the one after the last, of the part of each completion that is asked about; None
            for all of it. What comes after it is left out: it has no part in the probability of what came before.
        max_length: Most tokens of a query.
        add_bos: As in `tokenize`.

    Raises:
        ValueError: A span holds nothing, or reaches beyond its completion.
    """
    for span, completion in zip(spans or (), completions, strict=bool(spans)):
        if span is not None and not 0 <= span[0] < span[1] <= len(completion):
            raise ValueError(
                f"Expected a span within the {len(completion)} characters of the completion; got {list(span)}."
            )
    names = [f"query-{i + 1}" for i in range(len(prompts))] if ids is None else list(ids)
    content: dict[str, Any] = {"prompts": list(prompts), "completions": list(completions)}
    if chat:
        content = {
            "messages": [
                [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
                for asked, said in zip(prompts, completions, strict=True)
            ]
        }
    content["spans"] = None if spans is None else list(spans)
    records = Records(ids=names, metadata=metadata or {}, source="the queries", **content)
    return tokenize(records, tokenizer, max_length=max_length, add_bos=add_bos)


def overlap(heldout: TextExamples, train: TextExamples, what: str = "held-out example") -> str:
    """What held-out or added examples share with the training data, in a sentence; empty when they share nothing.

    An example is shared when its id is, or when its tokens are those of a training example under another id.
    """
    known = {
        tuple(tokens.tolist()): i for i, tokens in zip(train.ids, train.input_ids, strict=True)
    }
    named = set(train.ids) & set(heldout.ids)
    equal = [
        (i, known[key])
        for i, tokens in zip(heldout.ids, heldout.input_ids, strict=True)
        if i not in named and (key := tuple(tokens.tolist())) in known
    ]
    parts = [f"{len(named):,} by id, such as {min(named)!r}"] if named else []
    if equal:
        parts.append(
            f"{len(equal):,} by content, such as {equal[0][0]!r}, which is {equal[0][1]!r} there"
        )
    n = len(named) + len(equal)
    examples = f"1 {what} also occurs" if n == 1 else f"{n:,} {what}s also occur"
    return f"{examples} in the training data ({'; '.join(parts)})." if n else ""


class _Encoder:
    """Records to token ids, with at most one beginning-of-sequence token."""

    def __init__(self, tokenizer: Any, template: str | None, add_bos: bool | None):
        self.tokenizer, self.template, self.add_bos = tokenizer, template, add_bos
        self.bos = tokenizer.bos_token_id
        if add_bos and self.bos is None:
            raise ValueError("The tokenizer has no beginning-of-sequence token; leave add_bos out.")
        self.adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]
        self.n_bos_doubled = 0

    def record(self, records: Records, i: int) -> Tokens:
        if records.texts is not None:
            return self._encode(records.texts[i], None)
        part = None if records.spans is None else records.spans[i]
        if records.prompts is not None and records.completions is not None:
            prompt, completion = records.prompts[i], records.completions[i]
            span, text = (len(prompt), len(prompt) + len(completion)), prompt + completion
            return self._part(self._encode(text, [_within(span, part, completion, text)]), part)
        assert records.messages is not None
        text, spans = self._chat(records.messages[i], records.ids[i])
        if part is not None:
            said = [m["content"] for m in records.messages[i] if m["role"] == "assistant"][-1]
            spans = [_within(spans[-1], part, said, text)]
        return self._part(self._encode(text, spans, templated=True), part)

    def _part(self, tokens: Tokens, part: tuple[int, int] | None) -> Tokens:
        """The tokens up to the last scored one, where a part is asked about."""
        if part is None or True not in tokens.scored:
            return tokens
        end = len(tokens.scored) - tokens.scored[::-1].index(True)
        return Tokens(tokens.ids[:end], tokens.scored[:end])

    def _encode(
        self, text: str, spans: list[tuple[int, int]] | None, *, templated: bool = False
    ) -> Tokens:
        """Encode a text whose characters in `spans` are scored; None scores all of it."""
        if spans is not None and not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} cannot say which characters a token covers, as "
                "completions and chats need it; use the fast tokenizer (tokenizer.json)."
            )
        encoded = self.tokenizer(
            text,
            add_special_tokens=not templated,
            return_offsets_mapping=spans is not None,
            verbose=False,  # what is too long is reported by name
        )
        ids = list(encoded["input_ids"])
        scored = [True] * len(ids)
        if spans is not None:
            scored = _covered(encoded["offset_mapping"], spans)
        return self._one_bos(ids, scored, templated)

    def _one_bos(self, ids: list[int], scored: list[bool], templated: bool) -> Tokens:
        bos = self.bos
        if bos is None:
            return Tokens(ids, scored)
        # A rendered chat brings its own; encoding it as plain text would have put one before it.
        doubled = templated and self.adds_bos and ids[:1] == [bos]
        while ids[:2] == [bos, bos]:
            ids, scored, doubled = ids[1:], scored[1:], True
        self.n_bos_doubled += doubled
        if self.add_bos and ids[:1] != [bos]:
            ids, scored = [bos, *ids], [False, *scored]
        if self.add_bos is False and self.adds_bos and not templated and ids[:1] == [bos]:
            ids, scored = ids[1:], scored[1:]
        return Tokens(ids, scored)

    def _chat(self, messages: list[Message], name: str) -> tuple[str, list[tuple[int, int]]]:
        """A chat as text, and the stretches of it that the assistant says."""
        text = self._render(messages)
        spans: list[tuple[int, int]] = []
        done = 0
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opened = self._render(messages[:k], add_generation_prompt=True)
            closed = self._render(messages[: k + 1])
            if closed.startswith(opened) and text.startswith(closed.rstrip()):
                spans.append((len(opened), len(closed.rstrip())))
            else:  # a template that renders earlier turns anew: look for the words themselves
                said = message["content"].strip()
                start = text.find(said, done)
                if start < 0:
                    raise ValueError(
                        f"The chat template does not show the assistant's turn {k + 1} of {name!r} "
                        "as it is written; pass a template that does."
                    )
                spans.append((start, start + len(said)))
            done = spans[-1][1]
        return text, spans

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        if not messages and not add_generation_prompt:
            return ""
        if self.template is None and not self.tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, which chats need; pass template=, or give "
                "prompt and completion columns."
            )
        options = {} if self.template is None else {"chat_template": self.template}
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )


def _within(
    span: tuple[int, int], part: tuple[int, int] | None, said: str, text: str
) -> tuple[int, int]:
    """Where a part of what was said stands in the text that holds it, somewhere in the span."""
    if part is None:
        return span
    start = text.find(said, span[0])
    if start < 0:
        raise ValueError(
            "The chat template changes the answer, so that a part of it cannot be found; ask about all of it."
        )
    return start + part[0], start + part[1]


def _covered(offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a character of the spans, or close the text after one that does."""
    scored: list[bool] = []
    for start, end in offsets:
        if start == end:  # added by the tokenizer: the end of a completion is part of it
            scored.append(bool(scored) and scored[-1])
        else:
            scored.append(any(start < stop and end > first for first, stop in spans))
    return scored


def _shorten(tokens: Tokens, max_length: int, *, pairs: bool, bos: int | None) -> Tokens:
    """At most `max_length` tokens: the first ones, or, of a pair, those of the completion."""
    ids, scored = tokens.ids, tokens.scored
    excess = len(ids) - max_length
    if excess <= 0:
        return tokens
    if not pairs or True not in scored:
        return Tokens(ids[:max_length], scored[:max_length])
    prompt = scored.index(True)
    # One token stays before the completion, since the first token of a sequence is not scored: the
    # one that begins a sequence if there is one, else the last of the prompt.
    keep = 1 if ids[:1] == [bos] else 0
    first = max(keep, min(keep + excess, prompt if keep else prompt - 1))
    rest = slice(first, first + max_length - keep)
    return Tokens(ids[:keep] + ids[rest], scored[:keep] + scored[rest])


# What the report says


def _truncation(
    records: Records,
    encoded: Sequence[Tokens],
    cut: Sequence[Tokens],
    long: Sequence[int],
    max_length: int,
) -> list[str]:
    if not long:
        return []
    verb = "is" if len(long) == 1 else "are"
    lost = sum(len(encoded[i].ids) - len(cut[i].ids) for i in long)
    what = "their ends were cut"
    if records.prompts is not None:
        short = [i for i in long if sum(cut[i].scored) < sum(encoded[i].scored)]
        what = "their prompts were cut at the beginning, the completions are whole"
        if short:
            what += f" except for the ends of {_named(records.ids, short)}"
    return [
        f"{len(long):,} of {len(records):,} examples {verb} longer than {max_length} tokens; {what} "
        f"({lost:,} tokens in all): {_named(records.ids, long)}."
    ]


def _doubling(records: Records, encoder: _Encoder) -> list[str]:
    if not encoder.n_bos_doubled:
        return []
    return [
        f"{encoder.tokenizer.bos_token!r} would have stood twice at the beginning of "
        f"{encoder.n_bos_doubled:,} of {len(records):,} examples (once in the text, once added by "
        "the tokenizer); it stands there once."
    ]


def _dropping(records: Records, dropped: Sequence[int]) -> list[str]:
    if not dropped:
        return []
    return [
        f"{_examples(len(dropped))} without a token to score and left out: "
        f"{_named(records.ids, dropped)}."
    ]


def _examples(n: int) -> str:
    return "1 example is" if n == 1 else f"{n:,} examples are"


def _named(ids: Sequence[str], chosen: Sequence[int]) -> str:
    names = ", ".join(repr(ids[i]) for i in chosen[:5])
    return names + (f" and {len(chosen) - 5:,} more" if len(chosen) > 5 else "")
