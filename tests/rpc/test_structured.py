"""Structured output end to end: over gRPC, with the check's process and the engine's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from engine.oracle import continuation
from loraplex.v1 import generation_pb2, model_pb2, model_pb2_grpc
from rpc.harness import (
    EOS,
    FORBIDDEN,
    VOCAB,
    Running,
    ask,
    expected,
    refusal,
    running,
    streamed,
    until,
)

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH


def schema(value: Any = SCHEMA) -> dict[str, str]:
    return {"json_schema": json.dumps(value, ensure_ascii=False)}


def sampled(seed: int = 1) -> dict[str, Any]:
    return {"temperature": 1.0, "seed": seed}


async def texts_of(up: Running, count: int, least: int = 0, **fields: Any) -> list[str]:
    """The texts of that many requests at once; all, or at least so many, must end by themselves."""
    replies = await asyncio.gather(
        *(
            up.generation.Generate(ask(20 + i, new=300, sampling=sampled(i), **fields))
            for i in range(count)
        )
    )
    stopped = [reply.text for reply in replies if reply.finish_reason == STOP]
    assert len(stopped) >= (least or count)
    return stopped


async def test_every_form_is_served(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        for text in await texts_of(up, 8, structured_output=schema()):
            jsonschema.validate(json.loads(text), SCHEMA)
        for text in await texts_of(up, 8, 1, structured_output={"json_object": True}):
            assert isinstance(json.loads(text), dict)
        for text in await texts_of(up, 4, structured_output={"regex": "[a-c]{3,5}x"}):
            assert set(text[:-1]) <= {"a", "b", "c"}
            assert text[-1] == "x"
        choices = ["yes", "no", "perhaps 日本"]
        found = await texts_of(up, 8, structured_output={"choices": {"texts": choices}})
        assert set(found) <= {*choices}
        assert len(set(found)) > 1
        for grammar in ('start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'):
            for text in await texts_of(up, 2, structured_output={"grammar": grammar}):
                assert text == "(" * text.count("(") + "x" + ")" * text.count("(")


async def test_a_stream_has_the_same_answer_and_neighbours_keep_theirs(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        alpha = await up.register("alpha", 1)
        request = ask(
            7,
            8,
            new=80,
            adapter="alpha",
            sampling=sampled(3),
            structured_output=schema(),
            logprobs=1,
        )

        async def stream() -> tuple[str, list[int], Any]:
            text, tokens, last = "", [], None
            async for message in up.generation.GenerateStream(streamed(request)):
                text += message.delta.text
                tokens += message.delta.token_ids
                last = message.finished
            return text, tokens, last

        whole, (text, tokens, last), *others = await asyncio.gather(
            up.generation.Generate(request),
            stream(),
            *(up.generation.Generate(ask(30 + i, new=40)) for i in range(4)),
        )
        assert (text, tokens) == (whole.text, list(whole.token_ids))
        assert last.finish_reason == whole.finish_reason
        assert [r.digest for r in whole.adapters] == [alpha.digest]
        assert [entry.chosen.token_id for entry in whole.logprobs] == tokens
        for i, reply in enumerate(others):
            assert list(reply.token_ids) == expected([30 + i], 40)


async def test_a_text_that_is_complete_stops_without_a_token(tmp_path: Path) -> None:
    """Whatever end tokens there are; what is cut off says so."""
    async with running(tmp_path) as up:
        form = {"regex": "[0-9]{6}"}
        for stop in ({}, {"ignore_eos": True}, {"token_ids": [EOS]}):
            reply = await up.generation.Generate(ask(new=50, structured_output=form, stop=stop))
            assert (reply.finish_reason, len(reply.text)) == (STOP, 6)
            assert not reply.HasField("matched_stop")
        cut = await up.generation.Generate(ask(new=3, structured_output=form))
        assert (cut.finish_reason, len(cut.token_ids)) == (LENGTH, 3)


async def test_stop_strings_end_a_structured_answer_as_any_other(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        form = {"regex": "[0-9]{4}-[0-9]{4}"}
        reply = await up.generation.Generate(
            ask(new=50, structured_output=form, stop={"strings": ["-"]})
        )
        assert (reply.finish_reason, len(reply.text)) == (STOP, 4)
        assert reply.matched_stop.text == "-"


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({}, "structured_output"),
        ({"json_object": False}, "structured_output.json_object"),
        ({"json_schema": ""}, "structured_output.json_schema"),
        ({"regex": "x" * 2001}, "structured_output.regex"),
        ({"choices": {"texts": []}}, "structured_output.choices.texts"),
        ({"choices": {"texts": ["a", ""]}}, "structured_output.choices.texts[1]"),
        ({"choices": {"texts": ["a"] * 1025}}, "structured_output.choices.texts"),
        ({"choices": {"texts": ["a" * 1500, "b" * 600]}}, "structured_output.choices.texts"),
        ({"json_schema": "{"}, "structured_output.json_schema"),
        ({"json_schema": '{"not": {}}'}, "structured_output.json_schema"),
        ({"regex": "(secret"}, "structured_output.regex"),
        ({"grammar": "start: secret"}, "structured_output.grammar"),
    ],
)
async def test_a_form_at_fault_is_refused_with_its_field(
    tmp_path_factory: pytest.TempPathFactory, form: dict[str, Any], field: str, caplog: Any
) -> None:
    async with running(tmp_path_factory.mktemp("server"), max_structure=2000) as up:
        request = ask(structured_output=form)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(request)
        found = refusal(caught.value)
        assert found.code is grpc.StatusCode.INVALID_ARGUMENT
        assert found.reason in ("FIELD_INVALID", "STRUCTURE_INVALID")
        violations = [v for d in found.details for v in getattr(d, "field_violations", ())]
        assert [v.field for v in violations] == [field]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.GenerateStream(streamed(request)).read()
        violations = [
            v for d in refusal(caught.value).details for v in getattr(d, "field_violations", ())
        ]
        assert [v.field for v in violations] == [f"request.{field}"]
        assert "secret" not in caplog.text
        assert up.metric("running_requests") == 0


async def test_the_model_says_whether_it_is_served(tmp_path: Path) -> None:
    for at, (settings, is_served) in enumerate((({}, True), ({"structured_output": False}, False))):
        async with running(tmp_path / str(at), **settings) as up:
            stub: Any = model_pb2_grpc.ModelServiceStub(up.channel)
            reply = await stub.GetModel(model_pb2.GetModelRequest())
            assert reply.model.has_structured_output is is_served
            if not is_served:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await up.generation.Generate(ask(structured_output={"regex": "a"}))
                assert refusal(caught.value).reason == "FIELD_INVALID"
                assert "not available" in refusal(caught.value).message


async def test_a_lost_engine_and_a_lost_check_are_replaced(tmp_path: Path) -> None:
    """After either, the same request has the same answer."""
    async with running(tmp_path) as up:
        request = ask(5, new=200, sampling=sampled(9), structured_output=schema())
        before = await up.generation.Generate(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.gather(
                up.generation.Generate(ask(6, new=300, structured_output=schema())),
                up.generation.Generate(ask(10)),  # ends the engine
            )
        assert refusal(caught.value).reason == "ENGINE_RESTARTED"
        await until(lambda: up.server.engine.ready)
        assert (await up.generation.Generate(request)).token_ids == before.token_ids
        assert before.finish_reason == STOP


async def test_a_stream_that_is_cancelled_frees_its_row(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options={"step_seconds": 0.01}) as up:
        form = {"regex": "[a-z]{500}"}
        call = up.generation.GenerateStream(streamed(ask(new=400, structured_output=form)))
        await call.read()
        await call.read()
        call.cancel()
        await until(lambda: up.metric("running_requests") == 0)
        reply = await up.generation.Generate(ask(40, new=5))
        assert list(reply.token_ids) == continuation([40], [], 5, VOCAB, FORBIDDEN)


async def test_masks_and_checks_are_counted(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await texts_of(up, 3, structured_output={"regex": "[a-z]{9}"})
        assert up.metric("structure_checks_total", result="accepted") == 3
        assert up.metric("structure_check_seconds_count") == 1
        assert up.metric("structure_mask_seconds_count") >= 3
