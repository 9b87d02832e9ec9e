"""The completions of one prompt, whole or as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from loraplex import (
    AsyncStream,
    Completion,
    Delta,
    Finished,
    FinishReason,
    LoraplexError,
    MatchedStop,
    TokenLogprobs,
    Usage,
)

from loraplex_gateway import errors
from loraplex_gateway.errors import ApiError
from loraplex_gateway.places import ClientsInTurn


class CompletionSample(Protocol):
    """One completion of a prompt."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> FinishReason: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def logprobs(self) -> Sequence[TokenLogprobs]: ...
    @property
    def matched_stop(self) -> MatchedStop | None: ...


class Call:
    """A request to the server for the completions of one prompt.

    Attributes:
        options: the client's options.
    """

    def __init__(
        self,
        clients: ClientsInTurn,
        model: str,
        params: Mapping[str, str],
        prompt: str | None = None,
        **options: Any,
    ) -> None:
        """`params` maps the server's fields to the request's, for errors about `model`.

        The call is made once one of `clients` is free.
        """
        self._clients = clients
        self._model = model
        self._params = params
        self._prompt = prompt
        self.options = options

    async def completion(self) -> Completion:
        """Returns the completions at once. Raises ApiError."""
        async with self._clients.one() as client:
            try:
                return await client.generate(self._prompt, **self.options)
            except LoraplexError as error:
                raise self._failure(error) from None

    async def stream(self, opened: list[AsyncStream]) -> AsyncIterator[Delta | Finished]:
        """Yields the parts as they come, and the end of each completion. Raises ApiError.

        The stream itself is put into `opened`. The call on the server ends with this iterator.
        """
        async with self._clients.one() as client:
            try:
                stream = client.stream(self._prompt, **self.options)
                opened.append(stream)
                async with aclosing(stream):
                    async for part in stream.parts():
                        yield part
            except LoraplexError as error:
                raise self._failure(error) from None

    def _failure(self, error: LoraplexError) -> ApiError:
        if error.reason == "ADAPTER_NOT_FOUND":
            if "mix" not in self.options:
                return errors.not_found(self._model, error.request_id)
            missing = errors.of(error)
            missing.param = "loraplex.mix"
            return missing
        return errors.of(error, self._params)


def samples_of(completion: Completion) -> list[CompletionSample]:
    """The first completion of a prompt and its alternatives."""
    return [completion, *completion.alternatives]
