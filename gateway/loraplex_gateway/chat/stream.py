"""The answer to a conversation as it comes: one event for each part."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from loraplex import AsyncStream, Delta, Finished

from loraplex_gateway.chat import tooling
from loraplex_gateway.chat.request import ChatRequest
from loraplex_gateway.generation import logprobs
from loraplex_gateway.generation.answers import Head, stop_reason, usage
from loraplex_gateway.generation.samples import Call, samples_of
from loraplex_gateway.wire.events import event


class ChatStream:
    """The events of one answer, or of `n`."""

    def __init__(self, request: ChatRequest, plan: tooling.ToolPlan | None, head: Head) -> None:
        self._request = request
        self._head = head
        self._opened: list[AsyncStream] = []
        self._readers = [tooling.reader(plan) for _ in range(request.choices)]
        self._calls = [False] * request.choices
        self._tokens = 0
        self._body = head.body("chat.completion.chunk", "chatcmpl")
        self._reads_tools = plan is not None

    def headers(self) -> dict[str, str]:
        """The headers of the response; complete once the first event is there."""
        started = self._opened[0].started if self._opened else None
        return self._head.headers(started.adapters if started is not None else ())

    async def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        """Yields the events. Raises ApiError."""
        begun, running = False, self._request.choices
        last = b""
        async for part in call.stream(self._opened):
            events = b"" if begun else self._first()
            begun = True
            if isinstance(part, Finished):
                running -= 1
                events += self._end(part)
            else:
                events += self._delta(part)
            if not running:
                last += events  # everything that is known at the end is one write
            elif events:
                yield events
        (stream,) = self._opened
        completion = await stream.completion()
        if self._request.usage_at_end:
            generated = sum(each.usage.completion_tokens for each in samples_of(completion))
            numbers = completion.usage
            total = usage(numbers.prompt_tokens, generated, numbers.cached_prompt_tokens)
            last += event({**self._body, "choices": [], "usage": total})
        yield last

    def _first(self) -> bytes:
        """The events that begin the messages."""
        more: dict[str, Any] = {}
        started = self._opened[0].started
        if self._request.return_token_ids and started is not None:
            more["prompt_token_ids"] = list(started.prompt_token_ids)
        return b"".join(
            self._event(i, {"role": "assistant", "content": ""}, **more)
            for i in range(self._request.choices)
        )

    def _delta(self, delta: Delta) -> bytes:
        """The events of a part; nothing while it is not certain what its text is a part of."""
        index, request = delta.index, self._request
        self._tokens += len(delta.token_ids)
        extra: dict[str, Any] = {}
        if request.logprobs:
            as_ids = bool(request.return_tokens_as_token_ids)
            given = request.top, as_ids, request.skips_special
            extra["logprobs"] = logprobs.chat_logprobs(delta.logprobs, *given)
        if request.return_token_ids:
            extra["token_ids"] = list(delta.token_ids)
        if not self._reads_tools:
            if not (delta.text or extra):
                return b""
            return self._event(index, {"content": delta.text}, **extra)
        parts = [tooling.chat_delta(each) for each in self._readers[index].feed(delta.text)]
        return self._parts(index, parts, extra)

    def _end(self, end: Finished) -> bytes:
        """The last events of one answer."""
        index = end.index
        rest = [tooling.chat_delta(each) for each in self._readers[index].end()]
        events = self._parts(index, rest, {})
        is_open = self._readers[index].is_open
        reason = tooling.ended(end.finish_reason, self._calls[index], is_open)
        stop = stop_reason(end.matched_stop, self._request.stop_token_ids)
        return events + self._event(index, {}, finish_reason=reason, stop_reason=stop)

    def _parts(self, index: int, parts: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
        """An event for each part; what was asked for beside the text goes with the first."""
        if extra and not parts:
            parts = [{}]
        events = b""
        for part in parts:
            self._calls[index] = self._calls[index] or "tool_calls" in part
            events += self._event(index, part, **extra)
            extra = {}
        return events

    def _event(self, index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        body: dict[str, Any] = {**self._body, "choices": [choice]}
        if "prompt_token_ids" in choice:
            body["prompt_token_ids"] = choice.pop("prompt_token_ids")
        if self._request.usage_always:
            body["usage"] = self._usage()
        elif self._request.usage_at_end:
            body["usage"] = None
        return event(body)

    def _usage(self) -> dict[str, Any]:
        """The numbers of tokens up to now."""
        started = self._opened[0].started
        return usage(started.prompt_tokens if started is not None else 0, self._tokens)
