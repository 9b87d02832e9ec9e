"""The calls about the base model, written once for both clients."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from loraplex import requests
from loraplex.connection import ServerConnection
from loraplex.model.values import DetokenizedText, ModelDescription, RenderedChat, TokenizedText
from loraplex.replies import read
from loraplex.requests import ConversationOptions, Message, fill
from loraplex.v1 import model_pb2


class ModelCalls:
    """The calls of the model service. Every call may raise LoraplexError."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._call = connection.call

    async def get_model(self, *, timeout: float | None = None) -> ModelDescription:
        """Returns the server's base model, with its end tokens and its chat template."""
        method, request = self._connection.stubs.model.GetModel, model_pb2.GetModelRequest()
        return read(ModelDescription, (await self._call(method, request, timeout)).model)

    async def render_chat(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | None = None,
        timeout: float | None = None,
        **options: Unpack[ConversationOptions],
    ) -> RenderedChat:
        """Returns the prompt that `generate` makes of a conversation, without generating.

        `ConversationOptions` lists the options. Raises InvalidRequest if the chat template does not
        take the conversation.
        """
        request = requests.render_chat(messages, adapter, options)
        method = self._connection.stubs.model.RenderChat
        return read(RenderedChat, await self._call(method, request, timeout))

    async def tokenize(
        self,
        text: str,
        *,
        special_tokens: bool = True,
        pieces: bool = False,
        timeout: float | None = None,
    ) -> TokenizedText:
        """Returns the tokens of a text of at most 4 MiB.

        With `special_tokens`, the token that begins a prompt comes first, if the model has one, as
        in a prompt of `generate`. With `pieces`, the bytes of each token are returned too. Raises
        InvalidRequest if the model has no tokenizer.
        """
        request = fill(
            model_pb2.TokenizeRequest,
            text=text,
            no_special_tokens=not special_tokens,
            with_pieces=pieces,
        )
        method = self._connection.stubs.model.Tokenize
        return read(TokenizedText, await self._call(method, request, timeout))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        pieces: bool = False,
        timeout: float | None = None,
    ) -> DetokenizedText:
        """Returns the text of at most 1048576 tokens, in which no special token is left out.

        With `skip_special_tokens`, special tokens are left out. With `pieces`, the bytes of each
        token are returned too. Raises InvalidRequest if the model has no tokenizer.
        """
        request = fill(
            model_pb2.DetokenizeRequest,
            token_ids=token_ids,
            skip_special_tokens=skip_special_tokens,
            with_pieces=pieces,
        )
        method = self._connection.stubs.model.Detokenize
        return read(DetokenizedText, await self._call(method, request, timeout))
