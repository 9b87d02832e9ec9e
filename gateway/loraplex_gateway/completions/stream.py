"""Continued prompts as they come: one event for each part."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from loraplex import AsyncStream, Delta, Finished, Started, Usage

from loraplex_gateway.completions.parts import Echoed, Parts
from loraplex_gateway.completions.request import CompletionRequest
from loraplex_gateway.generation.answers import Head, usage
from loraplex_gateway.generation.samples import Call
from loraplex_gateway.wire.events import event
from loraplex_gateway.wire.merging import merged

Echoes = Callable[[int, Started], Awaitable[Echoed]]
"""Returns a prompt, by its index, as the answer begins with it."""


class CompletionStream:
    """The events of the completions of all prompts."""

    def __init__(
        self, request: CompletionRequest, head: Head, calls: list[Call], at_once: int
    ) -> None:
        """At most `at_once` of the calls run at a time."""
        self._at_once = at_once
        self._request = request
        self._head = head
        self._calls = calls
        self._opened: list[list[AsyncStream]] = [[] for _ in calls]
        self._body = head.body("text_completion", "cmpl")
        self._prompt_tokens = [0] * len(calls)
        self._tokens = 0
        self._usages: list[Usage] = []

    def headers(self) -> dict[str, str]:
        """The headers of the response; complete once the first event is there."""
        started = (opened[0].started for opened in self._opened if opened)
        first = next((each for each in started if each is not None), None)
        return self._head.headers(first.adapters if first is not None else ())

    async def events(self, echoes: Echoes) -> AsyncGenerator[bytes, None]:
        """Yields the events. Raises ApiError, LoraplexError."""
        sources = [self._of(i, echoes) for i in range(len(self._calls))]
        async for events in merged(sources, self._at_once):
            yield events
        if self._request.usage_at_end:
            cached = sum(each.cached_prompt_tokens for each in self._usages)
            total = usage(sum(self._prompt_tokens), self._tokens, cached)
            yield event({**self._body, "choices": [], "usage": total})

    async def _of(self, index: int, echoes: Echoes) -> AsyncGenerator[bytes, None]:
        """The events of one prompt."""
        n, opened = self._request.choices, self._opened[index]
        parts = [Parts(self._request, index * n + i) for i in range(n)]
        begun, running = False, n
        last = b""
        async for part in self._calls[index].stream(opened):
            events = b"" if begun else await self._begin(index, parts, echoes)
            begun = True
            if isinstance(part, Finished):
                running -= 1
                events += self._end(parts[part.index], part)
            else:
                events += self._delta(parts[part.index], part)
            if not running:
                last += events  # everything that is known at the end is one write
            elif events:
                yield events
        self._usages.append((await opened[0].completion()).usage)
        yield last

    def _delta(self, part: Parts, delta: Delta) -> bytes:
        """The event of a part of one completion; nothing if there is nothing to tell."""
        self._tokens += len(delta.token_ids)
        if delta.text or self._request.logprobs is not None or self._request.return_token_ids:
            return self._event(part.piece(delta))
        return b""

    def _end(self, part: Parts, end: Finished) -> bytes:
        """The last event of one completion."""
        return self._event({**part.piece(_EMPTY), "logprobs": None, **part.end(end)})

    async def _begin(self, index: int, parts: list[Parts], echoes: Echoes) -> bytes:
        """Notes the size of a prompt; returns the events with the prompt if it is shown."""
        started = self._opened[index][0].started
        assert started is not None, "a stream has begun"
        self._prompt_tokens[index] = started.prompt_tokens
        if not self._request.echo:
            return b""
        echo = await echoes(index, started)
        return b"".join(self._event(part.prompt(echo, started)) for part in parts)

    def _event(self, choice: dict[str, Any]) -> bytes:
        body: dict[str, Any] = {**self._body, "choices": [choice]}
        if self._request.usage_always:
            body["usage"] = usage(sum(self._prompt_tokens), self._tokens)
        elif self._request.usage_at_end:
            body["usage"] = None
        return event(body)


class _Empty:
    """A part without anything."""

    text = ""
    token_ids = ()
    logprobs = ()


_EMPTY = _Empty()
