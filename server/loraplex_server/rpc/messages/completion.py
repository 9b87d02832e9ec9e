"""Turns the engine's outputs for one request into text, tokens and log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from loraplex.v1 import generation_pb2

from loraplex_server.engine.messages import Logprobs, Output
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
    """Part of a completion. `finish` is "stop" or "length" in the last part, otherwise ""."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Logprobs]
    finish: str


class CompletionBuilder:
    """Builds a completion from the engine's outputs.

    The token that completes a stop string is the last one: it counts, and tokens that the engine
    computed after it are dropped.
    """

    def __init__(
        self, tokenizer: TextTokenizer, prompt: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(prompt)
        self._stops = StopMatcher(stop_strings)
        self.tokens = 0
        """Number of tokens returned so far."""

    def take(self, outputs: Sequence[Output]) -> Piece:
        """Adds outputs and returns the new part; not to be called after a part with a `finish`."""
        tokens = [token for output in outputs for token in output.token_ids]
        logprobs = [entry for output in outputs for entry in output.logprobs]
        finish = outputs[-1].finish or ""
        texts = []
        stopped = False
        for at, token in enumerate(tokens):
            text, stopped = self._stops.push(self._detokenizer.push(token))
            texts.append(text)
            if stopped:
                del tokens[at + 1 :], logprobs[at + 1 :]
                break
        if finish and not stopped:
            text, stopped = self._stops.push(self._detokenizer.finish())
            texts.append(text)
            if not stopped:
                texts.append(self._stops.finish())
        self.tokens += len(tokens)
        return Piece("".join(texts), tokens, logprobs, "stop" if stopped else finish)


async def add_logprobs(
    field: RepeatedCompositeFieldContainer[generation_pb2.TokenLogprobs],
    tokenizer: TextTokenizer,
    logprobs: Iterable[Logprobs],
) -> None:
    """Adds log-probabilities to a field of a reply, with the tokens' texts.

    Lets other tasks run after every `SLICE_ENTRIES` tokens and alternatives.
    """
    text = tokenizer.token_text
    entries = 0
    for each in logprobs:
        if entries >= SLICE_ENTRIES:
            entries = 0
            await asyncio.sleep(0)
        added = field.add()
        chosen = added.chosen
        chosen.SetInParent()
        chosen.token_id, chosen.logprob, chosen.text = (
            each.token_id,
            each.logprob,
            text(each.token_id),
        )
        for token, value in each.top:
            added.top.add(token_id=token, logprob=value, text=text(token))
        entries += 1 + len(each.top)


def slices(outputs: Sequence[Output]) -> Iterator[Sequence[Output]]:
    """The outputs in their order, at most `SLICE_OUTPUTS` at a time."""
    for at in range(0, len(outputs), SLICE_OUTPUTS):
        yield outputs[at : at + SLICE_OUTPUTS]
