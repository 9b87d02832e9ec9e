"""ModelService: the base model, and what it makes of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from loraplex.v1 import model_pb2, model_pb2_grpc
from loraplex_model.base.info import public_name
from loraplex_model.base.refusal import Refusal, Subject
from loraplex_model.checkpoints.tokenizer import SpeltToken

from loraplex_server.access.principals import caller
from loraplex_server.access.rules import require_base
from loraplex_server.engine.messages import ModelInfo
from loraplex_server.registry.registry import Registry
from loraplex_server.rpc.calls.errors import for_client, require
from loraplex_server.rpc.messages import validate
from loraplex_server.rpc.services.admission import Admission
from loraplex_server.rpc.services.prompts import Prompts
from loraplex_server.rpc.services.resolve import WeightedAdapter, records, room_beside

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
            has_structured_output=self.bounds.max_structure > 0,
        )
        if (bos := tokenizer.bos_token) is not None:
            model.bos_token.CopyFrom(_named(bos))
        if (template := tokenizer.template) is not None:
            model.chat_template.sha256 = template.sha256
            model.chat_template.source = self.template_source
            model.chat_template.takes_tools = template.takes_tools
            model.chat_template.variables.extend(template.variables)
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
