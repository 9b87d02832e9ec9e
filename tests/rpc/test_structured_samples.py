"""Several completions, and those of a least or largest length, keep the form that is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import pytest_asyncio
from loraplex.v1 import generation_pb2
from rpc.harness import EOS, HARMLESS, Running, ask, rest, running, streamed
from rpc.test_structured import SCHEMA, schema

pytestmark = pytest.mark.asyncio(loop_scope="module")

STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH

OPTIONS = {**HARMLESS, "num_blocks": 512}

N = 4
LETTERS = {"regex": "[a-c]{2,40}"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("samples"), engine_options=OPTIONS) as server:
        await server.register("alpha", 1)
        yield server


def request(
    form: dict[str, Any], seed: int = 3, new: int = 300, **fields: Any
) -> generation_pb2.GenerateRequest:
    stop = {"max_new_tokens": new, **fields.pop("stop", {})}
    sampling = {"temperature": 1.5, "seed": seed % 2**64}
    made = generation_pb2.GenerateRequest(structured_output=form, sampling=sampling, stop=stop)
    made.MergeFrom(generation_pb2.GenerateRequest(token_ids={"ids": [20, 21, 22]}, **fields))
    return made


async def answers(up: Running, asked: generation_pb2.GenerateRequest) -> list[Any]:
    """The first completion and its alternatives."""
    reply = await up.generation.Generate(asked)
    return [reply, *reply.alternatives]


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "json_schema": (schema(), lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
    "json_object": ({"json_object": True}, lambda text: {}.update(json.loads(text))),
    "regex": (LETTERS, lambda text: re.fullmatch("[a-c]{2,40}", text).group()),  # type: ignore[union-attr]
    "choices": (
        {"choices": {"texts": ["yes", "no", "déjà"]}},
        lambda text: ["yes", "no", "déjà"].index(text),
    ),
    "grammar": ({"grammar": 'root ::= "(" root ")" | "x"'}, lambda text: text.index("x")),
}


@pytest.mark.parametrize("adapter", ["", "alpha"])
@pytest.mark.parametrize("kind", FORMS)
async def test_each_of_several_has_the_form_and_is_that_of_its_seed(
    up: Running, kind: str, adapter: str
) -> None:
    form, require = FORMS[kind]
    for seed in (3, 2**64 - 2):  # the seeds go on from 0 behind the largest
        found = await answers(up, request(form, seed, n=N, adapter_id=adapter))
        assert len(found) == N
        for index, each in enumerate(found):
            (alone,) = await answers(up, request(form, seed + index, adapter_id=adapter))
            assert (each.text, each.token_ids) == (alone.text, alone.token_ids)
            assert each.finish_reason == alone.finish_reason
            assert EOS not in each.token_ids
            if each.finish_reason == STOP:
                require(each.text)
        again = await answers(up, request(form, seed, n=N, adapter_id=adapter))
        assert [each.text for each in again] == [each.text for each in found]
        if kind in ("json_schema", "regex"):
            assert len({each.text for each in found}) == N


async def test_a_stream_of_several_has_the_same_answers(up: Running) -> None:
    asked = request(schema(), n=N)
    found = await answers(up, asked)
    texts, reasons = [""] * N, [0] * N
    for event in await rest(up.generation.GenerateStream(streamed(asked))):
        match event.WhichOneof("event"):
            case "delta":
                texts[event.delta.index] += event.delta.text
            case "finished":
                reasons[event.finished.index] = event.finished.finish_reason
    assert texts == [each.text for each in found]
    assert reasons == [each.finish_reason for each in found]


@pytest.mark.parametrize("least", [1, 5, 30])
async def test_a_least_length_that_the_form_allows_is_reached(up: Running, least: int) -> None:
    for each in await answers(up, request(LETTERS, n=N, stop={"min_new_tokens": least})):
        assert re.fullmatch("[a-c]{2,40}", each.text)
        assert len(each.token_ids) >= least
        assert each.finish_reason == STOP


@pytest.mark.parametrize(
    ("form", "whole"),
    [
        ({"regex": "[a-c]{3}"}, "[a-c]{3}"),
        ({"choices": {"texts": ["yes", "no"]}}, "yes|no"),
        ({"grammar": 'root ::= "x" "y"'}, "xy"),
        (schema({"const": {"a": 1}}), r'\{\s*"a"\s*:\s*1\s*\}'),
        ({"regex": "a?"}, "a?"),
    ],
)
@pytest.mark.parametrize("stop", [{}, {"ignore_eos": True}, {"token_ids": [40, 41]}])
async def test_where_the_form_is_shorter_than_the_least_length_the_form_wins(
    up: Running, form: dict[str, Any], whole: str, stop: dict[str, Any]
) -> None:
    for temperature in (0.0, 1.5):
        asked = request(form, n=N, stop={"min_new_tokens": 100, **stop})
        asked.sampling.temperature = temperature
        for each in await answers(up, asked):
            assert re.fullmatch(whole, each.text)
            assert each.finish_reason == STOP
            assert len(each.token_ids) == each.usage.completion_tokens < 100


@pytest.mark.parametrize("kind", ["json_schema", "regex"])
@pytest.mark.parametrize("new", [1, 2, 3])
async def test_what_the_largest_length_cuts_off_ends_by_length_and_begins_the_form(
    up: Running, kind: str, new: int
) -> None:
    form, _ = FORMS[kind]
    least = {} if kind == "json_schema" else {"min_new_tokens": new}
    whole = await answers(up, request(form, n=N, stop={"min_new_tokens": 3}))
    cut = await answers(up, request(form, n=N, new=new, stop=least))
    assert {each.finish_reason for each in cut} == {LENGTH}
    for short, long in zip(cut, whole, strict=True):
        assert len(short.token_ids) == new
        assert list(long.token_ids[:new]) == list(short.token_ids)
        assert long.text.startswith(short.text)


async def test_a_form_that_the_last_token_completes_ends_by_itself(up: Running) -> None:
    asked = request({"choices": {"texts": ["x", "y"]}}, n=N, new=1, stop={"min_new_tokens": 1})
    for each in await answers(up, asked):
        assert (each.text in ("x", "y"), each.finish_reason) == (True, STOP)
        assert not each.HasField("matched_stop")
    reply = await up.generation.Generate(ask(20, new=0, structured_output=LETTERS))
    assert (reply.text, reply.finish_reason) == ("", LENGTH)
