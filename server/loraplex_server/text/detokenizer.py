"""Incremental conversion of tokens to text, in whole characters.

The joined pieces of a completion are its text as the tokenizer decodes it after the prompt, without
an incomplete character at the very end. How pieces are found depends on the tokenizer's decoder:

- a byte-level decoder joins the bytes of all tokens (`ByteLevelText`);
- most others give each token a text of its own, and make characters from tokens of one byte each
  (`PieceText`);
- the rest is decoded again with every token (`StreamText`).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, Protocol

from tokenizers import Tokenizer, pre_tokenizers

from loraplex_server.text.decode_stream import StreamText

REPLACEMENT: Final = "\ufffd"


class Detokenizer(Protocol):
    """Converts one completion to text, piece by piece. The time per token is bounded."""

    def push(self, token: int, /) -> str:
        """Adds a token and returns the text that is complete with it; "" within a character."""

    def finish(self) -> str:
        """Returns the rest of the text. No token may be pushed afterwards."""


class TokenTexts:
    """What the tokens of one tokenizer contribute to a text. Makes detokenizers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, each in added.items() if each.special)
        decoder = tokenizer.decoder
        self._form = json.loads(decoder.__getstate__()) if decoder is not None else None
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str] = {}

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool = True) -> Detokenizer:
        """Returns a detokenizer for a completion of `prompt`."""
        if _is_byte_level(self._form):
            return ByteLevelText(self, skip_special_tokens)
        if not _is_local(self._form) or not self._anchor:
            return StreamText(self._tokenizer, prompt, skip_special_tokens)
        return PieceText(self, prompt, skip_special_tokens)

    @property
    def are_bytes(self) -> bool:
        """Whether the vocabulary has a token for each byte."""
        return _is_byte_level(self._form) or self._falls_back

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of texts without special tokens."""
        return token in self._special

    def is_visible(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether the tokenizer gives a token to its decoder."""
        if skip_special_tokens and token in self._special:
            return False
        return self._tokenizer.id_to_token(token) is not None

    def text(self, token: int) -> str:
        """Text of a token after another one, where its bytes count as a character of their own."""
        text = self._pieces.get(token)
        if text is None:
            text = self._pieces[token] = self.after_anchor([token])
        return text

    def raw(self, token: int) -> bytes:
        """Bytes of a token after another one, special or not; b"" for an id without a token."""
        if _is_byte_level(self._form):
            return self.level_bytes(token)
        return self.fallback_byte(token) or self.text(token).encode()

    def raws(self, tokens: Sequence[int]) -> list[bytes]:
        """Bytes of each token of a text, which joined are the text with its special tokens.

        The first token may lack a space that it has after another one.
        """
        found = list(map(self.raw, tokens))
        if not _is_byte_level(self._form):
            shown = (at for at, token in enumerate(tokens) if self.is_visible(token, False))
            at = next(shown, None)
            # A part of a character alone would become U+FFFD.
            if at is not None and self.fallback_byte(tokens[at]) < b"\x80":
                found[at] = self.alone([tokens[at]]).encode()
        return found

    def after_anchor(self, tokens: Sequence[int]) -> str:
        """Text of tokens after another one, as some decoders strip the beginning of a text."""
        return self.alone([*self._anchor, *tokens])[len(self._anchor_text) :]

    def alone(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def level_bytes(self, token: int) -> bytes:
        """Bytes of a token of a byte-level tokenizer."""
        found = self._bytes.get(token)
        if found is None:
            word = self._tokenizer.id_to_token(token) or ""
            mapped = [self._alphabet.get(letter, -1) for letter in word]
            found = word.encode() if -1 in mapped else bytes(mapped)
            self._bytes[token] = found
        return found

    def fallback_byte(self, token: int) -> bytes:
        """The byte of a token such as <0xE6>; b"" for other tokens, and without byte fallback."""
        found = self._bytes.get(token)
        if found is None:
            word = self._tokenizer.id_to_token(token) or ""
            found = self._bytes[token] = _byte(word) if self._falls_back else b""
        return found

    @cached_property
    def _falls_back(self) -> bool:
        return any(form["type"] == "ByteFallback" for form in _parts(self._form))

    @cached_property
    def _anchor(self) -> list[int]:
        """A token after which others are decoded; empty if the vocabulary has none."""
        for token in range(self._tokenizer.get_vocab_size(with_added_tokens=True)):
            if self.is_visible(token, False) and not self.fallback_byte(token):
                return [token]
        return []

    @cached_property
    def _anchor_text(self) -> str:
        return self.alone(self._anchor)

    @cached_property
    def _alphabet(self) -> Mapping[str, int]:
        """The byte of each letter: its code point, or in order the byte that is none of these."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        same = [letter for letter in letters if ord(letter) < 256]
        others = sorted(set(range(256)) - set(map(ord, same)))
        return {**{c: ord(c) for c in same}, **dict(zip(letters[len(same) :], others, strict=True))}


class ByteLevelText:
    """Text of tokens that are bytes. Bytes that are no character become U+FFFD."""

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool) -> None:
        self._texts = texts
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """See Detokenizer."""
        if self._skip and self._texts.is_special(token):
            return ""
        return self._decoder.decode(self._texts.level_bytes(token))

    def finish(self) -> str:
        """See Detokenizer."""
        rest = self._decoder.decode(b"", final=True)
        return rest if len(rest) > 1 else ""  # an incomplete character is one U+FFFD


class PieceText:
    """Text of tokens that have a text each, and of runs of tokens of one byte each.

    A run gives its characters as they become complete. The decoders of byte fallback turn each byte
    of a run into U+FFFD if not all of it is text; here the characters before the first byte at
    fault stay, since they were returned already.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._texts = texts
        self._skip = skip_special_tokens
        self._is_first = not any(self._is_visible(token) for token in reversed(prompt))
        self._held: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._is_broken = False

    def push(self, token: int) -> str:
        """See Detokenizer."""
        if not self._is_visible(token):
            return ""
        byte = self._texts.fallback_byte(token)
        if byte:
            return self._push_byte(token, byte)
        text = self._end_run() + self._piece(token)
        self._is_first = False
        return text

    def finish(self) -> str:
        """See Detokenizer."""
        return ""

    def _is_visible(self, token: int) -> bool:
        return self._texts.is_visible(token, self._skip)

    def _piece(self, token: int) -> str:
        return self._texts.alone([token]) if self._is_first else self._texts.text(token)

    def _push_byte(self, token: int, byte: bytes) -> str:
        self._held.append(token)
        try:
            if not self._is_broken and not self._decoder.decode(byte):
                return ""
        except UnicodeDecodeError:
            self._is_broken = True
        if self._is_broken:
            text = REPLACEMENT * len(self._held)
        elif self._is_first:
            text = self._texts.alone(self._held)
        else:
            text = self._texts.after_anchor(self._held)
        self._is_first = False
        self._held.clear()
        return text

    def _end_run(self) -> str:
        """Text of the bytes that another token follows, so that they never become a character."""
        text = REPLACEMENT * len(self._held)
        self._is_first = self._is_first and not self._held
        self._held.clear()
        self._decoder.reset()
        self._is_broken = False
        return text


class NoText:
    """The detokenizer of a model without a tokenizer."""

    def push(self, token: int) -> str:
        """Returns ""."""
        return ""

    def finish(self) -> str:
        """Returns ""."""
        return ""


def _parts(form: Any) -> Iterable[Any]:
    """The decoders that a decoder consists of."""
    if form is None:
        return ()
    return form["decoders"] if form["type"] == "Sequence" else (form,)


def _is_byte_level(form: Any) -> bool:
    return [each["type"] for each in _parts(form) if each["type"] != "Fuse"] == ["ByteLevel"]


def _is_local(form: Any) -> bool:
    """Whether a token's text, bytes apart, depends only on whether it is the first of the text."""
    fused = False
    for each in _parts(form):
        match each["type"]:
            case "Fuse":
                fused = True
            case "Replace":
                # In the joined text, a longer pattern could lie across two tokens.
                is_letter = len(each["pattern"].get("String", "")) == 1
                if fused and not is_letter:
                    return False
            case "Strip":
                if fused and (each["stop"] > 0 or each["start"] > 1):
                    return False
            case "ByteFallback" | "Metaspace" | "WordPiece":
                if fused:
                    return False
            case _:
                return False
    return True


def _byte(word: str) -> bytes:
    """The byte that a word such as <0xE6> stands for; b"" for other words."""
    if len(word) != 6 or not word.startswith("<0x") or not word.endswith(">"):
        return b""
    try:
        return bytes.fromhex(word[3:5])
    except ValueError:
        return b""
