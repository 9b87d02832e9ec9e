"""The cost of a token does not grow with the tokens before it that complete no character."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loraplex_server.text import decode_stream
from loraplex_server.text.decode_stream import REPLACEMENT, StreamText
from rpc.harness import make_tokenizer
from text.test_tokenizer import metaspace

pytestmark = pytest.mark.fault("detokenizer-quadratic")

TOKENIZER = make_tokenizer()
EOS = 1
HALVES = [t for t in range(TOKENIZER.get_vocab_size()) if TOKENIZER.decode([t]) == REPLACEMENT]
"""Tokens of one byte each that is no character."""


class Counting:
    """A tokenizer, and a stream as `tokenizers.DecodeStream`, that count the tokens they decode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def stream(self, ids: list[int] | None = None, skip_special_tokens: bool = False) -> Any:
        return CountingStream(list(ids or ()))


class CountingStream:
    def __init__(self, ids: list[int]) -> None:
        self._ids, self._prefix, self._prefix_index = ids, "", 0

    def step(self, tokenizer: Counting, token: int) -> str | None:
        if not self._prefix and self._ids:
            prefix = tokenizer.decode(self._ids, True)
            if not prefix.endswith(REPLACEMENT):
                self._prefix, self._prefix_index = prefix, len(self._ids)
        self._ids.append(token)
        text = tokenizer.decode(self._ids, True)
        if len(text.encode()) <= len(self._prefix.encode()) or text.endswith(REPLACEMENT):
            return None
        if not text.startswith(self._prefix):
            raise ValueError("not the same prefix")
        new = text[len(self._prefix) :]
        rest = len(self._ids) - self._prefix_index
        self._ids = self._ids[self._prefix_index :]
        self._prefix, self._prefix_index = tokenizer.decode(self._ids, True), rest
        return new


PENDING = {
    "bytes that are no character": (TOKENIZER, HALVES[:1] * 2000),
    "many such bytes": (TOKENIZER, (HALVES * 2000)[:2000]),
    "special tokens": (TOKENIZER, [EOS] * 2000),
    "byte fallbacks": (metaspace(), [3 + 0x80] * 2000),
    "beginnings of characters": (metaspace(), [3 + 0xE6, 3 + 0x97] * 1000),
}


@pytest.mark.parametrize("case", list(PENDING))
def test_a_token_decodes_a_bounded_number_of_tokens(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, completion = PENDING[case]
    counting = Counting(tokenizer)
    monkeypatch.setattr(decode_stream, "DecodeStream", counting.stream)
    text = StreamText(counting, [20])  # type: ignore[arg-type]
    for token in completion:
        text.push(token)
    assert counting.decoded <= 100 * len(completion)
    text.finish()
    assert counting.decoded <= 100 * len(completion)


pieces = st.lists(
    st.one_of(
        st.lists(st.sampled_from(HALVES), max_size=150),
        st.text(max_size=6).map(lambda text: TOKENIZER.encode(text).ids),
        st.integers(0, 60).map(lambda count: [EOS] * count),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(pieces)
@example([HALVES * 3, TOKENIZER.encode("日本語").ids, HALVES, [EOS] * 100])
def test_long_runs_without_a_character_give_the_text_of_the_whole(parts: list[list[int]]) -> None:
    completion = [token for part in parts for token in part]
    text = StreamText(TOKENIZER, [20])
    given = [text.push(token) for token in completion]
    assert not any(piece.endswith(REPLACEMENT) for piece in given)
    whole = TOKENIZER.decode(completion, skip_special_tokens=True)
    assert "".join(given) + text.finish() == whole.rstrip(REPLACEMENT)


def test_a_word_after_many_special_tokens_keeps_its_space() -> None:
    tokenizer = metaspace()
    tokenizer.add_special_tokens(["</s>"])
    the = tokenizer.token_to_id("▁the")
    text = StreamText(tokenizer, [the])
    given = [text.push(token) for token in [the, *[2] * 100, the, *[3 + 0x80] * 100, the]]
    assert "".join(given) == " the the" + REPLACEMENT * 100 + " the"
