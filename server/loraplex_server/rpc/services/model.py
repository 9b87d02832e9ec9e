"""ModelService: the base model, and what it makes of texts, conversations and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import grpc
from loraplex.v1 import model_pb2, model_pb2_grpc
from loraplex_model.base.info import public_name
from loraplex_model.base.refusal import Problem, Refusal, Subject
from loraplex_model.checkpoints.tokenizer import SpeltToken

from loraplex_server.access.principals import caller
from loraplex_server.access.rules import require_base
from loraplex_server.engine.messages import ModelInfo
from loraplex_server.registry.registry import Registry
from loraplex_server.rpc.calls.bounds import MAX_TOKEN_IDS
from loraplex_server.rpc.calls.errors import for_client, invalid, require
from loraplex_server.rpc.messages import validate
from loraplex_server.rpc.services.admission import Admission
from loraplex_server.rpc.services.prompts import Prompts, refused
from loraplex_server.rpc.services.resolve import WeightedAdapter, records, room_beside
from loraplex_server.text.tokenizer import INLINE_CHARACTERS

P = ParamSpec("P")
T = TypeVar("T")

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class ModelService(model_pb2_grpc.ModelServiceServicer):
    """See loraplex/v1/model.proto. The parts that it uses live as long as the server."""

    model: ModelInfo
    registry: Registry
    prompts: Prompts
    admission: Admission
    bounds: validate.ModelBounds
    template_source: str
    """Where the chat template comes from: "model" or "operator"."""

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: _Context
    ) -> model_pb2.GetModelResponse:
        """Describes the base model."""
        tokenizer = self.prompts.tokenizer
        model = model_pb2.Model(
            name=self.model.base.name or public_name(self.model.name),
            fingerprint=self.model.base.fingerprint,
            architecture=tokenizer.architecture,
            max_context=self.bounds.max_context,
            vocab_size=self.bounds.vocab_size,
            eos_tokens=map(_named, tokenizer.eos_tokens),
            has_tokenizer=tokenizer.has_tokenizer,
            hidden_size=self.model.base.config.hidden_size,
            has_structured_output=self.bounds.max_structure > 0,
        )
        if (bos := tokenizer.bos_token) is not None:
            model.bos_token.CopyFrom(_named(bos))
        if (template := tokenizer.template) is not None:
            model.chat_template.sha256 = template.sha256
            model.chat_template.source = self.template_source
            model.chat_template.takes_tools = template.takes_tools
            model.chat_template.variables.extend(template.variables)
            model.chat_template.text = template.source
        return model_pb2.GetModelResponse(model=model)

    async def RenderChat(
        self, request: model_pb2.RenderChatRequest, context: _Context
    ) -> model_pb2.RenderChatResponse:
        """Renders a conversation as Generate does."""
        require(validate.render_chat(request))
        with self.admission.enter():
            adapters = await self._resolve(request.adapter_id)
            room = room_beside(adapters, self.bounds.max_context)
            template = await self.registry.template(records(adapters))
            prompt = await self.prompts.render(request.messages, "messages", room, template)
        return model_pb2.RenderChatResponse(text=prompt.text, token_ids=prompt.token_ids)

    async def Tokenize(
        self, request: model_pb2.TokenizeRequest, context: _Context
    ) -> model_pb2.TokenizeResponse:
        """Returns the tokens of a text."""
        with self.admission.enter(), refused("text"):
            found = await self.prompts.tokenizer.tokens(
                request.text, not request.no_special_tokens, request.with_pieces
            )
            if len(found.token_ids) > MAX_TOKEN_IDS:
                text = f"has {len(found.token_ids)} tokens; at most {MAX_TOKEN_IDS} are returned"
                raise invalid([Problem("text", text)])
            return await self._off_the_loop(
                len(found.token_ids),
                model_pb2.TokenizeResponse,
                token_ids=found.token_ids,
                pieces=found.pieces,
            )

    async def Detokenize(
        self, request: model_pb2.DetokenizeRequest, context: _Context
    ) -> model_pb2.DetokenizeResponse:
        """Returns the text of tokens."""
        size = len(request.token_ids)
        with self.admission.enter(), refused("token_ids"):
            require(await self._off_the_loop(size, validate.detokenize, request, self.bounds))
            found = await self.prompts.tokenizer.text_of(
                request.token_ids, request.skip_special_tokens, request.with_pieces
            )
            return await self._off_the_loop(
                size, model_pb2.DetokenizeResponse, text=found.text, pieces=found.pieces
            )

    async def _off_the_loop(
        self, size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Returns `work(*args, **kwargs)`, computed in a thread if it is about many tokens."""
        if size <= INLINE_CHARACTERS:
            return work(*args, **kwargs)
        return await self.prompts.lane.run(work, *args, **kwargs)

    async def _resolve(self, adapter_id: str) -> Sequence[WeightedAdapter]:
        if not adapter_id:
            require_base(caller())
            return ()
        try:
            return (WeightedAdapter(await self.registry.servable(adapter_id, caller()), 1.0),)
        except Refusal as error:
            subject = Subject("loraplex.v1.Adapter", adapter_id)
            raise for_client(error, subject, "adapter_id") from error


def _named(token: SpeltToken) -> model_pb2.NamedToken:
    return model_pb2.NamedToken(token_id=token.token_id, text=token.text)
