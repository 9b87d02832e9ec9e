"""ModelService: the base model, and conversations rendered as Generate renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import generation_pb2, model_pb2, model_pb2_grpc
from rpc.harness import EOS, VOCAB, Running, ask, refusal, running

USER = {"role": "user", "content": "hi"}
TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if loud %}!{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def give_template(folder: Path, template: str | None) -> None:
    file = folder / "model" / "model.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "chat_template": template}))


def stub(up: Running) -> Any:
    return model_pb2_grpc.ModelServiceStub(up.channel)


def chat(*messages: Any, **options: Any) -> generation_pb2.ChatMessages:
    return generation_pb2.ChatMessages(messages=messages or (USER,), **options)


async def test_the_model_is_described(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        model = (await stub(up).GetModel(model_pb2.GetModelRequest())).model
        assert model.name
        assert model.fingerprint == up.server.engine.hello.model.base.fingerprint
        assert model.architecture == "LlamaForCausalLM"
        assert (model.vocab_size, model.has_tokenizer) == (VOCAB, True)
        assert 0 < model.max_context <= up.server.engine.hello.model.max_context
        assert EOS in [token.token_id for token in model.eos_tokens]
        assert [t.text for t in model.eos_tokens if t.token_id == EOS] == ["</s>"]
        assert not model.HasField("bos_token")
        assert len(model.chat_template.sha256) == 64
        assert model.chat_template.source == "model"
        assert not model.chat_template.takes_tools


async def test_what_is_rendered_is_what_generate_computes(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await up.register("alpha", 1)
        for adapter in ("", "alpha", "alpha@1"):
            request = model_pb2.RenderChatRequest(adapter_id=adapter, messages=chat())
            rendered = await stub(up).RenderChat(request)
            assert rendered.text == "<user>hi<assistant>"
            wanted = ask(new=1, adapter=adapter, prompt_logprobs=0)
            wanted.messages.CopyFrom(chat())
            reply = await up.generation.Generate(wanted)
            scored = [entry.chosen.token_id for entry in reply.prompt_logprobs]
            assert list(rendered.token_ids)[1:] == scored
            assert len(rendered.token_ids) == reply.usage.prompt_tokens


REFUSED = [
    ({"messages": chat(tools=["{}"])}, "messages.tools"),
    ({"messages": chat(tools=["{"])}, "messages.tools[0]"),
    (
        {"messages": chat(chat_template_kwargs={"messages": {"bool_value": True}})},
        "messages.chat_template_kwargs[messages]",
    ),
    (
        {"messages": chat({"role": "user", "tool_calls": [{"name": "f"}]})},
        "messages.messages[0].tool_calls",
    ),
    ({"messages": chat(USER, {"role": "system", "content": "x"})}, "messages"),
    ({}, "messages.messages"),
    ({"adapter_id": "A", "messages": chat()}, "adapter_id"),
    ({"messages": chat({"role": "x" * 1000, "content": ""})}, "messages.messages[0].role"),
]


async def test_a_refusal_names_the_field_as_generate_does(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        for fields, field in REFUSED:
            calls = [stub(up).RenderChat(model_pb2.RenderChatRequest(**fields))]
            if "adapter_id" not in fields and fields:
                calls.append(up.generation.Generate(generation_pb2.GenerateRequest(**fields)))
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                refused = refusal(caught.value)
                assert refused.reason == "FIELD_INVALID"
                bad = refused.detail(error_details_pb2.BadRequest)
                assert [violation.field for violation in bad.field_violations] == [field]


async def test_tools_and_variables_reach_a_template_that_reads_them(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        pass
    give_template(tmp_path, TEMPLATE)
    settings = {"engine_options": {"tokenizer_path": str(tmp_path / "model")}}
    async with running(tmp_path / "other", **settings) as up:
        template = (await stub(up).GetModel(model_pb2.GetModelRequest())).model.chat_template
        assert template.takes_tools
        assert list(template.variables) == ["loud"]
        messages = chat(
            tools=['{"b": 1, "a": "é"}'],
            chat_template_kwargs={"loud": {"bool_value": True}},
            add_generation_prompt=False,
        )
        rendered = await stub(up).RenderChat(model_pb2.RenderChatRequest(messages=messages))
        assert rendered.text == '[[{"b": 1, "a": "é"}]]!<user>hi'


async def test_without_a_template_conversations_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        pass
    give_template(tmp_path, None)
    settings = {"engine_options": {"tokenizer_path": str(tmp_path / "model")}}
    async with running(tmp_path / "other", **settings) as up:
        model = (await stub(up).GetModel(model_pb2.GetModelRequest())).model
        assert not model.HasField("chat_template")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(up).RenderChat(model_pb2.RenderChatRequest(messages=chat()))
        assert "no chat template" in refusal(caught.value).message


async def test_an_adapter_that_is_missing_and_a_prompt_that_is_too_long_are_refused(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as up:
        for request, reason in (
            ({"adapter_id": "nobody", "messages": chat()}, "ADAPTER_NOT_FOUND"),
            (
                {"messages": chat({"role": "user", "content": "x " * (1 << 20)})},
                "PROMPT_TOO_LONG",
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(up).RenderChat(model_pb2.RenderChatRequest(**request))
            assert refusal(caught.value).reason == reason


async def test_it_is_healthy_counted_and_drained_like_the_other_services(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        service = health_pb2.HealthCheckRequest(service="loraplex.v1.ModelService")
        health = health_pb2_grpc.HealthStub(up.channel)
        assert (await health.Check(service)).status == health_pb2.HealthCheckResponse.SERVING
        await stub(up).GetModel(model_pb2.GetModelRequest())
        assert up.metric("requests_total", method="GetModel", code="OK") == 1
        up.server._gate.close()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(up).GetModel(model_pb2.GetModelRequest())
        assert refusal(caught.value).reason == "DRAINING"
