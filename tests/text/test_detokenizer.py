"""Tokens to text in pieces: the text of the whole, in whole characters, for every decoder."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from loraplex_server.text.detokenizer import (
    ByteLevelText,
    PieceText,
    StreamText,
    TokenTexts,
)
from rpc.harness import make_tokenizer
from text.test_tokenizer import metaspace
from tokenizers import AddedToken, Tokenizer, decoders, models

REPLACEMENT = "\ufffd"
SPECIAL = ["<s>", "</s>", "<|im_start|>"]
WORDS = [
    *"ab.!?'",
    "é",
    "日本",
    REPLACEMENT,
    "x" + REPLACEMENT,
    REPLACEMENT + "\u0301",
    "n't",
    "##s",
]
SPACED = ["▁", "▁▁", "▁a", "▁the", "▁é", "▁日", "a▁b", "▁" + REPLACEMENT]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def added(tokenizer: Tokenizer) -> Tokenizer:
    """Adds special tokens, and added tokens that are not special."""
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIAL]
    )
    tokenizer.add_tokens(["<think>", "日本語"])
    return tokenizer


def byte_level() -> Tokenizer:
    return added(make_tokenizer())


def fallback(*steps: Any) -> Tokenizer:
    words = ["<unk>", *BYTES, *SPACED, *WORDS]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(list(steps))
    return added(tokenizer)


def llama() -> Tokenizer:
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    return fallback(*steps, decoders.Strip(" ", 1, 0))


def gemma() -> Tokenizer:
    return fallback(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())


def byte_metaspace() -> Tokenizer:
    return fallback(decoders.ByteFallback(), decoders.Metaspace())


def unigram() -> Tokenizer:
    words = ["<unk>", *SPACED, *WORDS]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 0))
    tokenizer.decoder = decoders.Metaspace()
    return added(tokenizer)


def word_piece() -> Tokenizer:
    words = ["[UNK]", *WORDS, "##b", "##é", "##" + REPLACEMENT, "do", "can"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return added(tokenizer)


def word_level() -> Tokenizer:
    words = ["[UNK]", *WORDS]
    return added(Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")))


KINDS = {
    each.__name__: (each(), kind)
    for each, kind in (
        (byte_level, ByteLevelText),
        (llama, PieceText),
        (gemma, PieceText),
        (byte_metaspace, PieceText),
        (unigram, PieceText),
        (word_piece, PieceText),
        (word_level, PieceText),
    )
}
kinds = pytest.mark.parametrize("name", list(KINDS))


def pieces(
    tokenizer: Tokenizer, prompt: list[int], completion: list[int], skip: bool
) -> tuple[list[str], str]:
    """The pieces of a completion, and what its end adds."""
    detokenizer = TokenTexts(tokenizer).detokenizer(prompt, skip)
    return [detokenizer.push(token) for token in completion], detokenizer.finish()


def runs(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[bytes]:
    """The bytes of each run of tokens of one byte, as byte fallback sees them."""
    found, is_in_run = [b""], False
    special = {t for t, a in tokenizer.get_added_tokens_decoder().items() if a.special}
    for token in ids:
        if skip and token in special:
            continue
        word = tokenizer.id_to_token(token)
        if word in BYTES:
            found[-1:] = [found[-1] + bytes([BYTES.index(word)])]
            is_in_run = True
        elif word is not None and is_in_run:
            found.append(b"")
            is_in_run = False
    return found


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def whole(tokenizer: Tokenizer, prompt: list[int], completion: list[int], skip: bool) -> str:
    """The completion's text as the library decodes it after the prompt, all at once."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    text = tokenizer.decode([*prompt, *completion], skip_special_tokens=skip)
    assert text.startswith(before)
    return text[len(before) :]


def sequences(name: str) -> st.SearchStrategy[list[int]]:
    """Any tokens, and often special ones, bytes of characters, and U+FFFD."""
    tokenizer, _ = KINDS[name]
    size = tokenizer.get_vocab_size()
    special = [tokenizer.token_to_id(word) for word in SPECIAL]
    texts = st.text("aé日😺\ufffd ", min_size=1, max_size=3)
    if name in {"llama", "gemma", "byte_metaspace"}:
        characters = texts.map(lambda t: [tokenizer.token_to_id(BYTES[b]) for b in t.encode()])
        one = st.integers(257, size - 1).map(lambda token: [token])
    else:
        characters = texts.map(lambda t: tokenizer.encode(t, add_special_tokens=False).ids)
        one = st.integers(0, size + 2).map(lambda token: [token])
    part = st.one_of(one, characters, st.sampled_from(special).map(lambda token: [token]))
    return st.lists(part, max_size=12).map(lambda parts: [token for p in parts for token in p])


@kinds
@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans())
def test_the_pieces_are_the_text_that_the_library_gives_for_the_whole(
    name: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer, _ = KINDS[name]
    prompt, completion = data.draw(sequences(name)), data.draw(sequences(name))
    if name == "byte_level":  # special tokens may stand within a character of several tokens
        prompt += tokenizer.encode("x", add_special_tokens=False).ids
        completion += tokenizer.encode("x", add_special_tokens=False).ids  # no half a character
    else:
        assume(all(map(is_text, runs(tokenizer, completion, skip))))
        prompt.append(tokenizer.token_to_id("a"))  # otherwise a run of bytes may go on
    given, rest = pieces(tokenizer, prompt, completion, skip)
    assert "".join(given) + rest == whole(tokenizer, prompt, completion, skip)


@kinds
@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_a_first_text_is_stripped_as_the_library_strips_it(
    name: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer, _ = KINDS[name]
    special = [tokenizer.token_to_id(word) for word in SPECIAL]
    prompt, completion = (
        data.draw(st.lists(st.sampled_from(special), max_size=9)),
        data.draw(sequences(name)),
    )
    given, rest = pieces(tokenizer, prompt, completion, skip)
    if name == "byte_level":
        assume(not whole(tokenizer, prompt, completion, skip).endswith(REPLACEMENT))
    else:
        assume(all(map(is_text, runs(tokenizer, completion, skip))))
    assert "".join(given) + rest == whole(tokenizer, prompt, completion, skip)


BEGINNINGS = {
    chr(point).encode()[:size]
    for point in range(0x80, 0x110000, 64)  # those that differ in more than the last byte
    if not 0xD800 <= point < 0xE000
    for size in range(1, len(chr(point).encode()))
}
"""The bytes that may become a character."""


@given(st.lists(st.integers(0, 255), max_size=12))
@example([0xEF, 0xBF, 0xBD])
@example([0xF0, 0x9F, 0x98])
@example([0xE6, 0x97, 0xA5, 0xFF, 0xE6, 0x97])
@example([0xED, 0xA0])
@example([0xC0, 0x80])
def test_only_an_incomplete_character_at_the_very_end_has_no_text(data: list[int]) -> None:
    tokenizer, _ = KINDS["byte_level"]
    texts = TokenTexts(tokenizer)
    letters = {texts.level_bytes(t): t for t in range(tokenizer.get_vocab_size())}
    given, rest = pieces(tokenizer, [], [letters[bytes([byte])] for byte in data], True)
    for size in (3, 2, 1):
        if bytes(data[-size:]) in BEGINNINGS:
            del data[-size:]
            break
    assert "".join(given) + rest == tokenizer.decode([letters[bytes([byte])] for byte in data])


class CountingTokenizer:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.fault("detokenizer-quadratic")
@pytest.mark.parametrize("word", ["<s>", "\u00e2", "<0xE6>", "<0xFF>", "a", REPLACEMENT])
@kinds
def test_a_token_decodes_a_bounded_number_of_tokens(name: str, word: str) -> None:
    """However long no character is complete."""
    tokenizer, _ = KINDS[name]
    token = tokenizer.token_to_id(word)
    counting = CountingTokenizer(tokenizer)
    for completion in ([token] * 2000, [token, 0] * 1000):
        for skip in (True, False):
            texts = TokenTexts(counting)  # type: ignore[arg-type]
            detokenizer = texts.detokenizer([0] * 2000, skip)
            for each in completion:
                detokenizer.push(each if each is not None else 1 << 20)
            detokenizer.finish()
            assert counting.decoded <= 8 * len(completion)
            counting.decoded = 0


def test_a_run_of_bytes_keeps_the_characters_before_a_byte_at_fault() -> None:
    tokenizer = metaspace()
    run = [3 + byte for byte in "日".encode()]
    the = tokenizer.token_to_id("▁the")
    given, rest = pieces(tokenizer, [the], [*run, 3 + 0xFF, *run, the], True)
    assert "".join(given) + rest == "日" + REPLACEMENT * 4 + " the"
    given, rest = pieces(tokenizer, [the], [*run[:2], the, *run[:2]], True)
    assert "".join(given) + rest == REPLACEMENT * 2 + " the"


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma", "unigram", "word_piece"])
def test_a_token_of_the_replacement_character_is_text_like_any_other(name: str) -> None:
    tokenizer, _ = KINDS[name]
    if name == "byte_level":
        completion = tokenizer.encode(REPLACEMENT).ids * 3
    else:
        completion = [tokenizer.token_to_id(REPLACEMENT)] * 3
    prompt = [tokenizer.token_to_id("a")]
    given, rest = pieces(tokenizer, prompt, completion, True)
    assert "".join(given) + rest == whole(tokenizer, prompt, completion, True)
    assert ("".join(given) + rest).replace(" ", "") == REPLACEMENT * 3
    assert rest == ""


def test_a_word_keeps_its_space_whatever_the_prompt_ends_in() -> None:
    tokenizer = metaspace()
    tokenizer.add_special_tokens(["</s>"])
    the = tokenizer.token_to_id("▁the")
    cat = [3 + byte for byte in "😺".encode()]
    for prompt in ([1, the], [the, *cat * 2], [the, *cat[:3]], [the, *[2] * 100]):
        given, _ = pieces(tokenizer, prompt, [the], True)
        assert given == [" the"], prompt
    given, _ = pieces(tokenizer, [1], [*cat, *cat, the], False)
    assert given == ["", "", "", "😺", "", "", "", "😺", " the"]


@kinds
def test_every_kind_of_decoder_is_known(name: str) -> None:
    tokenizer, kind = KINDS[name]
    assert type(TokenTexts(tokenizer).detokenizer([], True)) is kind


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
    ids=lambda decoder: json.loads(decoder.__getstate__())["type"],
)
def test_a_decoder_that_looks_at_several_tokens_decodes_them_together(decoder: Any) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c</w>": 2}, []))
    tokenizer.decoder = decoder
    assert type(TokenTexts(tokenizer).detokenizer([0], True)) is StreamText


def test_special_tokens_are_text_on_request() -> None:
    tokenizer, _ = KINDS["byte_level"]
    start, x = tokenizer.token_to_id("<|im_start|>"), tokenizer.encode("x").ids
    assert pieces(tokenizer, [20], [start, *x], True) == (["", "x"], "")
    assert pieces(tokenizer, [20], [start, *x], False) == (["<|im_start|>", "x"], "")
