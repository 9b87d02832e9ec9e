"""A tokenizer in which control tokens have other names, so that their spelling is text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from loraplex_model.checkpoints.chat import TextRefused
from loraplex_model.checkpoints.control.marks import Marks
from loraplex_model.checkpoints.control.spellings import Spellings

_LETTERS: Final = "abcdefghijklmnop"
"""Digits of an alias. No normaliser changes lower-case letters."""


class AliasedTokenizer:
    """Encodes marked texts: control tokens without a mark are tokens, those with one are text.

    It is a copy of a tokenizer in which each control token has an alias, an unguessable word, in
    the vocabulary, the merges and the added tokens. Ids, and flags such as `rstrip`, are the same.
    Before a text is encoded, the control tokens without a mark are replaced by their aliases.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Mapping[str, AddedToken]) -> None:
        """`tokens` are the control tokens by their spelling."""
        secret = secrets.token_hex(16)
        self._tokens = tokens
        self._spellings = Spellings(tokens)
        self._aliases = {
            spelling: _word(f"{secret}{number:08x}") for number, spelling in enumerate(tokens)
        }
        self._ids = frozenset(tokenizer.token_to_id(spelling) for spelling in tokens)
        self._tokenizer = _renamed(tokenizer, self._aliases)

    def encode(self, text: str, marks: Marks) -> list[int]:
        """Token ids of a marked text. Raises TextRefused if the tokenizer alters aliases."""
        written = 0

        def alias(found: re.Match[str]) -> str:
            nonlocal written
            if not self._is_token(found, marks):
                return found[0]
            written += 1
            return self._aliases[found[0]]

        text = marks.remove(self._spellings.replace(text, alias))
        # The batch call releases the GIL; the single one does not.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if sum(token in self._ids for token in ids) < written:
            raise TextRefused(
                "the base model's tokenizer cannot keep the control tokens that the messages spell "
                "out apart from those of the chat template; remove them from the messages"
            )
        return ids

    def _is_token(self, found: re.Match[str], marks: Marks) -> bool:
        """Whether an occurrence is a token: without a mark, and a single word where it must be."""
        text, (start, end) = found.string, found.span()
        if end == start + 1 and text.startswith(marks.inside, end):
            return False
        if not self._tokens[found[0]].single_word:
            return True
        before = marks.remove(text[max(0, start - 2) : start])
        after = marks.remove(text[end : end + 2])
        return not (_is_word(before[-1:]) or _is_word(after[:1]))


def _word(digits: str) -> str:
    return "".join(_LETTERS[int(digit, 16)] for digit in digits)


def _is_word(character: str) -> bool:
    return re.fullmatch(r"\w", character) is not None


def _renamed(tokenizer: Tokenizer, aliases: Mapping[str, str]) -> Tokenizer:
    """A copy of a tokenizer with aliases; raises TextRefused if a token's id would change."""
    spec = json.loads(tokenizer.to_str())
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    for added in spec["added_tokens"]:
        spelling = added["content"]
        if spelling in aliases:
            added["content"] = aliases[spelling]
            added["single_word"] = False  # `_is_token` has decided
            added["normalized"] &= _is_found_within_text(tokenizer, spelling)
    _rename_in_model(spec["model"], aliases)
    renamed = Tokenizer.from_str(json.dumps(spec))
    for spelling, alias in aliases.items():
        if renamed.token_to_id(alias) != tokenizer.token_to_id(spelling):
            raise TextRefused(f"the base model's tokenizer has no id of its own for {spelling}")
    return renamed


def _rename_in_model(model: dict[str, Any], aliases: Mapping[str, str]) -> None:
    """Renames the words of a tokenizer's model; merges that form or use them are removed."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {aliases.get(word, word): token for word, token in vocabulary.items()}
    else:  # Unigram
        model["vocab"] = [[aliases.get(word, word), score] for word, score in vocabulary]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if aliases.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]


def _is_found_within_text(tokenizer: Tokenizer, spelling: str) -> bool:
    """Whether the tokenizer finds a token that is not at the start of a text.

    A normaliser that puts a character before a text puts it before normalised tokens, too, so that
    they are found at the start only.
    """
    ids = tokenizer.encode(f".{spelling}.", add_special_tokens=False).ids
    return tokenizer.token_to_id(spelling) in ids
