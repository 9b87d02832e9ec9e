"""The text side of one request: the engine's outputs become what the client is sent."""

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
    """What one output brings; `finish` is "stop", "length" or, while the completion goes on, ""."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Logprobs]
    finish: str


class Completion:
    """A completion as it grows.

    A stop string ends it with the token that completes the string: that token counts, and those
    which the engine computed after it are dropped.
    """

    def __init__(
        self, tokenizer: TextTokenizer, prompt: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(prompt)
        self._stops = StopMatcher(stop_strings)
        self.tokens = 0
        """Tokens returned so far."""

    def take(self, output: Output) -> Piece:
        """The new part; nothing may follow once its `finish` is set."""
        texts = []
        taken, stopped = 0, False
        for token in output.token_ids:
            text, stopped = self._stops.push(self._detokenizer.push(token))
            texts.append(text)
            taken += 1
            if stopped:
                break
        if output.finish is not None and not stopped:
            text, stopped = self._stops.push(self._detokenizer.finish())
            texts.append(text)
            if not stopped:
                texts.append(self._stops.finish())
        self.tokens += taken
        finish = "stop" if stopped else output.finish or ""
        return Piece("".join(texts), output.token_ids[:taken], output.logprobs[:taken], finish)


def logprobs_proto(
    tokenizer: TextTokenizer, logprobs: Sequence[Logprobs]
) -> list[generation_pb2.TokenLogprobs]:
    """Log-probabilities with the tokens' texts."""

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
