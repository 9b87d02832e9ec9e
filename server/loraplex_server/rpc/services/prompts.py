"""The prompts of requests as tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loraplex.v1 import generation_pb2
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.checkpoints.chat import ChatTemplate, TextRefused
from loraplex_model.checkpoints.encoding import RenderedPrompt

from loraplex_server.rpc.calls.errors import invalid, require
from loraplex_server.rpc.messages.conversation import ChatInput, read_chat, unread
from loraplex_server.runtime.lanes import Lane
from loraplex_server.text.tokenizer import TextTokenizer, TooLong


@dataclass(frozen=True, slots=True)
class Prompts:
    """Turns prompts into tokens. Large conversations are read in the threads of `lane`.

    `room` is the context length that is left for prompt and answer, `field_path` is put before the
    names of the request's fields, and a `template` replaces the base model's. The methods raise
    Refusal that names the field at fault.
    """

    tokenizer: TextTokenizer
    lane: Lane

    async def tokenise(
        self,
        request: generation_pb2.GenerateRequest,
        field_path: str,
        room: int,
        template: ChatTemplate | None = None,
    ) -> list[int]:
        """The tokens of a valid request's prompt."""
        field = field_path + (request.WhichOneof("input") or "input")
        match request.WhichOneof("input"):
            case "messages":
                return (await self.render(request.messages, field, room, template)).token_ids
            case "prompt":
                return await self.ids(request.prompt, field, room)
            case _:
                return await self.ids(list(request.token_ids.ids), field, room)

    async def ids(self, given: str | list[int], field: str, room: int) -> list[int]:
        """The tokens of a text, or those that are given, whose path in the request is `field`."""
        if isinstance(given, str):
            with _naming(field, room):
                given = await self.tokenizer.encode(given)
        _check_length(given, field, room)
        return given

    async def render(
        self,
        messages: generation_pb2.ChatMessages,
        field: str,
        room: int,
        template: ChatTemplate | None = None,
    ) -> RenderedPrompt:
        """Text and tokens of a valid conversation, whose path in the request is `field`."""
        chat = await self._chat(messages, field, template)
        with _naming(field, room):
            prompt = await self.tokenizer.render_chat(chat.messages, chat.options, template)
        _check_length(prompt.token_ids, field, room)
        return prompt

    async def _chat(
        self, messages: generation_pb2.ChatMessages, field: str, template: ChatTemplate | None
    ) -> ChatInput:
        chat = await read_chat(messages, field, self.lane)
        chosen = template or self.tokenizer.template
        if chosen is not None:
            require(unread(chat.options, chosen, field))
        return chat


@contextmanager
def refused(field: str) -> Iterator[None]:
    """Turns a text that the tokenizer refuses into Refusal that names the field."""
    try:
        yield
    except TextRefused as error:
        raise invalid([Problem(field, str(error))]) from error


@contextmanager
def _naming(field: str, room: int) -> Iterator[None]:
    """Turns the tokenizer's errors into Refusal that names the field."""
    try:
        with refused(field):
            yield
    except TooLong:
        raise _too_long(field, f"the prompt is longer than {room - 1} tokens") from None


def _check_length(ids: list[int], field: str, room: int) -> None:
    if not ids:
        raise invalid([Problem(field, "must give at least one token")])
    if len(ids) >= room:
        text = f"the prompt has {len(ids)} tokens; at most {room - 1} leave room for an answer"
        raise _too_long(field, text)


def _too_long(field: str, text: str) -> Refusal:
    return Refusal(Reason.PROMPT_TOO_LONG, text, problems=[Problem(field, text)])
