"""Log-probabilities in the two forms that OpenAI's interfaces have, and in vLLM's for prompts.

A chosen token has one value, which appears as the same number wherever it is shown: programs that
score texts call a token greedy if its value equals the largest of its alternatives.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, Final

from loraplex import TokenLogprob, TokenLogprobs

LOWEST: Final = -9999.0
"""Shown for what is less probable, down to impossible: JSON has no infinity."""


def value(entry: TokenLogprob) -> float:
    """The log-probability of a token as JSON can hold it."""
    return max(entry.logprob, LOWEST)


def raw(entry: TokenLogprob) -> bytes | None:
    """The bytes of a token; None if they are not known."""
    if entry.raw:
        return entry.raw
    return None if "\N{REPLACEMENT CHARACTER}" in entry.text else entry.text.encode()


def shown(entry: TokenLogprob, as_ids: bool) -> str:
    """The text of a token, or its id as text."""
    return f"token_id:{entry.token_id}" if as_ids else entry.text


def chat_logprobs(
    entries: Sequence[TokenLogprobs],
    top: int,
    as_ids: bool = False,
    skip_special: bool = True,
) -> dict[str, Any]:
    """The log-probabilities of a part of a chat answer, with `top` alternatives each.

    The bytes of all tokens are those of the answer's text; with `skip_special`, special tokens have
    none, since the text leaves them out.
    """

    def shown(entry: TokenLogprob) -> dict[str, Any]:
        return _chat_token(entry, as_ids, skip_special and entry.special)

    return {
        "content": [
            {**shown(each.chosen), "top_logprobs": [shown(one) for one in each.top[:top]]}
            for each in entries
        ],
        "refusal": None,
    }


def _chat_token(entry: TokenLogprob, as_ids: bool, is_left_out: bool) -> dict[str, Any]:
    data = None if is_left_out else raw(entry)
    return {
        "token": shown(entry, as_ids),
        "logprob": value(entry),
        "bytes": None if data is None else list(data),
    }


class TextLogprobs:
    """Collects the log-probabilities of a text completion, and where its tokens begin.

    Offsets count the characters of the text that stand before a token. All tokens of which one
    character is made have the same, and so has what follows a token that the text leaves out.
    """

    def __init__(self, as_ids: bool = False) -> None:
        self._as_ids = as_ids
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def unscored(self, text: str, is_shown: bool = True) -> dict[str, Any]:
        """The first token of a prompt, which has no value; `is_shown` if the text contains it."""
        found = _columns([text], [None], [None], [self._offset])
        if is_shown:
            self._advance(text.encode())
        return found

    def cut(self) -> None:
        """Ends the text so far: what begins a character without its rest is shown as one."""
        self._offset += len(self._decoder.decode(b"", final=True))
        self._decoder.reset()

    def of(self, entries: Sequence[TokenLogprobs], skip_special: bool = False) -> dict[str, Any]:
        """The next tokens; with `skip_special`, the text leaves special ones out."""
        offsets = []
        for each in entries:
            if skip_special and each.chosen.special:
                offsets.append(self._offset)
                continue
            data = raw(each.chosen) or each.chosen.text.encode()
            if data and data[0] & 0xC0 != 0x80:  # continues no character
                self.cut()
            offsets.append(self._offset)
            self._advance(data)
        return _columns(
            [shown(each.chosen, self._as_ids) for each in entries],
            [value(each.chosen) for each in entries],
            [self._top(each) for each in entries],
            offsets,
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Values by text. Of two tokens with one text, the larger; the chosen one is there.

        The chosen token keeps its place unless another with its text is more probable.
        """
        found: dict[str, float] = {}
        for one in (*entry.top, entry.chosen):
            name = shown(one, self._as_ids)
            found[name] = max(value(one), found.get(name, LOWEST))
        return found

    def _advance(self, data: bytes) -> None:
        """Counts the characters that are whole with these bytes."""
        self._offset += len(self._decoder.decode(data))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several parts as one."""
    return {name: [entry for part in parts for entry in part[name]] for name in _columns()}


def prompt_logprobs(entries: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
    """The log-probabilities of a prompt as vLLM shows them: by token id, the first is None."""
    return [None, *(dict(_ranked(each)) for each in entries)]


def _ranked(entry: TokenLogprobs) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chosen token without a rank, unless it is among the most probable ones."""
    for rank, one in [(None, entry.chosen), *enumerate(entry.top, 1)]:
        shown = {"logprob": value(one), "rank": rank, "decoded_token": one.text}
        yield str(one.token_id), shown


def _columns(
    tokens: Sequence[str] = (),
    values: Sequence[float | None] = (),
    top: Sequence[dict[str, float] | None] = (),
    offsets: Sequence[int] = (),
) -> dict[str, Any]:
    return {
        "tokens": list(tokens),
        "token_logprobs": list(values),
        "top_logprobs": list(top),
        "text_offset": list(offsets),
    }
