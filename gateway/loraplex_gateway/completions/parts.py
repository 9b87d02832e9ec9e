"""What a text completion consists of: the text, its log-probabilities, and the prompt before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraplex import AsyncClient, Completion, Finished, ModelDescription, Started

from loraplex_gateway.completions.request import CompletionRequest, Prompt
from loraplex_gateway.generation import logprobs
from loraplex_gateway.generation.answers import finish_reason, stop_reason
from loraplex_gateway.generation.logprobs import TextLogprobs
from loraplex_gateway.generation.samples import CompletionSample
from loraplex_gateway.tokens.texts import VocabularyTexts


@dataclass(frozen=True, slots=True)
class Echoed:
    """A prompt as the answer begins with it.

    Attributes:
        text: its text; "" if it is not shown.
        first: the text of its first token, which has no log-probability.
        is_shown: whether the first token is a part of the text, unlike one that was put in front.
    """

    text: str = ""
    first: str = ""
    is_shown: bool = True


async def echoed(
    client: AsyncClient,
    texts: VocabularyTexts,
    base: ModelDescription,
    request: CompletionRequest,
    prompt: Prompt,
    answer: Completion | Started,
) -> Echoed:
    """The prompt's text, and what is known of its first token. Raises LoraplexError."""
    if not request.echo:
        return Echoed()
    text = prompt if isinstance(prompt, str) else await texts.text(client, prompt)
    if not request.scores_prompt:
        return Echoed(text)
    ids = answer.prompt_token_ids
    first = await texts.one(client, ids[0]) if ids else ""
    bos = base.bos_token
    put_in_front = bool(ids) and bos is not None and ids[0] == bos.token_id
    return Echoed(text, first, not put_in_front or text.startswith(first))


class Parts:
    """Makes the parts of one completion of a prompt, in their order."""

    def __init__(self, request: CompletionRequest, index: int) -> None:
        self._request = request
        self._index = index
        self._scores = TextLogprobs(bool(request.return_tokens_as_token_ids))

    def prompt(self, echo: Echoed, answer: Completion | Started) -> dict[str, Any]:
        """The part with the prompt."""
        scored = None
        if self._request.scores_prompt:
            first = self._scores.unscored(echo.first, echo.is_shown)
            scored = logprobs.joined([first, self._scores.of(answer.prompt_logprobs)])
            self._scores.cut()
        return self._choice(echo.text, scored)

    def piece(self, piece: Any) -> dict[str, Any]:
        """A part of the answer, or all of it: what has a text, tokens and log-probabilities."""
        scored = None
        if self._request.logprobs is not None:
            scored = self._scores.of(piece.logprobs, self._request.skips_special)
        choice = self._choice(piece.text, scored)
        if self._request.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return choice

    def end(self, sample: CompletionSample | Finished) -> dict[str, Any]:
        """What is added to the last part."""
        return {
            "finish_reason": finish_reason(sample.finish_reason),
            "stop_reason": stop_reason(sample.matched_stop, self._request.stop_token_ids),
        }

    def whole(self, echo: Echoed, answer: Completion, sample: CompletionSample) -> dict[str, Any]:
        """The prompt, if it is shown, and the whole answer as one part."""
        before = self.prompt(echo, answer) if self._request.echo else None
        choice = self.piece(sample)
        if before is not None:
            choice["text"] = before["text"] + choice["text"]
            if before["logprobs"] is not None:
                choice["logprobs"] = logprobs.joined([before["logprobs"], choice["logprobs"]])
        if self._request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.prompt_logprobs(answer.prompt_logprobs)
        if self._request.return_token_ids:
            choice["prompt_token_ids"] = list(answer.prompt_token_ids)
        return {**choice, **self.end(sample)}

    def _choice(self, text: str, scored: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "index": self._index,
            "text": text,
            "logprobs": scored,
            "finish_reason": None,
            "stop_reason": None,
        }
