"""Turns the engine's outputs for one request into text, tokens and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loraplex.v1 import generation_pb2

from loraplex_server.engine.messages import Logprobs, Output
from loraplex_server.text.stops import StopMatcher
from loraplex_server.text.tokenizer import TextTokenizer

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


def logprobs_proto(
    tokenizer: TextTokenizer, logprobs: Sequence[Logprobs]
) -> list[generation_pb2.TokenLogprobs]:
    """Log-probabilities as messages, with the tokens' texts."""

    def one(token: int, value: float) -> generation_pb2.TokenLogprob:
        return generation_pb2.TokenLogprob(
            token_id=token, logprob=value, text=tokenizer.token_text(token)
        )

    return [
        generation_pb2.TokenLogprobs(
            chosen=one(entry.token_id, entry.logprob), top=[one(t, v) for t, v in entry.top]
        )
        for entry in logprobs
    ]
