"""Turns the engine's outputs for one request into text, tokens and log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from loraplex.v1 import generation_pb2

from loraplex_server.engine.messages import Logprobs, Output
from loraplex_server.text.detokenizer import Detokenizer
from loraplex_server.text.stops import StopMatcher
from loraplex_server.text.tokenizer import TextTokenizer

SLICE_ENTRIES: Final = 1024
"""Tokens and alternatives whose log-probabilities are put into a reply without a pause: 1 ms."""

SLICE_OUTPUTS: Final = 256
"""Outputs of the engine that are turned into text without a pause."""

FINISH_REASONS: Final = {
    "stop": generation_pb2.FINISH_REASON_STOP,
    "length": generation_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a completion. `finish` is "stop" or "length" in the last part, otherwise "".

    `stop_text` or `stop_token` is what ended a completion by "stop".
    """

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Logprobs]
    finish: str
    stop_text: str | None = None
    stop_token: int | None = None

    @property
    def matched_stop(self) -> generation_pb2.MatchedStop | None:
        """What ended the completion; None unless it ended by "stop"."""
        if self.stop_text is not None:
            return generation_pb2.MatchedStop(text=self.stop_text)
        if self.stop_token is not None:
            return generation_pb2.MatchedStop(token_id=self.stop_token)
        return None


class CompletionBuilder:
    """Builds a completion from the engine's outputs.

    Stop strings are searched for in the text with its special tokens, whether or not the returned
    text has them. The token that completes a stop string is the last one: it counts, and tokens
    that the engine computed after it are dropped. A stop string that is complete with fewer than
    `min_tokens` tokens is passed over.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        stop_strings: Sequence[str],
        skip_special_tokens: bool = True,
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._shown = tokenizer.detokenizer(prompt, skip_special_tokens)
        self._searched = self._shown
        if stop_strings and skip_special_tokens:
            self._searched = tokenizer.detokenizer(prompt, False)
        self._stops = StopMatcher(stop_strings, include_stop)
        self._min_tokens = min_tokens
        self.tokens = 0
        """Number of tokens returned so far."""
        self.base_tokens = 0
        """As in `Output`, of the first one."""
        self.cached_tokens = 0
        """As in `Output`, of the first one."""

    def take(self, outputs: Sequence[Output]) -> Piece:
        """Adds outputs and returns the new part; not to be called after a part with a `finish`."""
        tokens = [token for output in outputs for token in output.token_ids]
        logprobs = [entry for output in outputs for entry in output.logprobs]
        finish = outputs[-1].finish or ""
        texts = []
        stopped = False
        for at, token in enumerate(tokens):
            text, stopped = self._push(token, self.tokens + at + 1)
            texts.append(text)
            if stopped:
                del tokens[at + 1 :], logprobs[at + 1 :]
                break
        if finish and not stopped:
            text, stopped = self._push(None, self.tokens + len(tokens))
            texts.append(text)
            if not stopped:
                texts.append(self._stops.finish())
        self.tokens += len(tokens)
        text = "".join(texts)
        if stopped:
            return Piece(text, tokens, logprobs, "stop", stop_text=self._stops.matched)
        return Piece(text, tokens, logprobs, finish, stop_token=outputs[-1].stop_token)

    def _push(self, token: int | None, count: int) -> tuple[str, bool]:
        """Adds a token, or None for the end; returns new text, and whether a stop string ended.

        `count` tokens have been added then.
        """

        def text(source: Detokenizer) -> str:
            return source.finish() if token is None else source.push(token)

        shown = text(self._shown)
        searched = shown if self._searched is self._shown else text(self._searched)
        return self._stops.push(searched, shown, count >= self._min_tokens)


async def add_logprobs(
    field: RepeatedCompositeFieldContainer[generation_pb2.TokenLogprobs],
    tokenizer: TextTokenizer,
    logprobs: Iterable[Logprobs],
) -> None:
    """Adds log-probabilities to a field of a reply, with the tokens' texts and bytes.

    Lets other tasks run after every `SLICE_ENTRIES` tokens and alternatives.
    """
    text, raw, is_special = tokenizer.token_text, tokenizer.token_bytes, tokenizer.is_special
    entries = 0
    for each in logprobs:
        if entries >= SLICE_ENTRIES:
            entries = 0
            await asyncio.sleep(0)
        added = field.add()
        chosen = added.chosen
        chosen.SetInParent()
        chosen.token_id, chosen.logprob = each.token_id, each.logprob
        chosen.text, chosen.raw = text(each.token_id), raw(each.token_id)
        chosen.special = is_special(each.token_id)
        for token, value in each.top:
            one = added.top.add(token_id=token, logprob=value, text=text(token), raw=raw(token))
            one.special = is_special(token)
        entries += 1 + len(each.top)


def slices(outputs: Sequence[Output]) -> Iterator[Sequence[Output]]:
    """The outputs in their order, at most `SLICE_OUTPUTS` at a time."""
    for at in range(0, len(outputs), SLICE_OUTPUTS):
        yield outputs[at : at + SLICE_OUTPUTS]
