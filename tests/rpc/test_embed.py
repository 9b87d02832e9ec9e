"""Embed: the vector of each text, exact, with the limits and the typed refusals of generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from engine import oracle
from google.rpc import error_details_pb2
from loraplex.v1 import adapter_pb2
from loraplex.v1 import generation_pb2 as pb
from loraplex_server.rpc.services.embedding import embedder
from rpc.harness import (
    CRASH,
    NONFINITE,
    VOCAB,
    WIDTH,
    Refused,
    Running,
    ask,
    expected,
    make_tokenizer,
    refusal,
    running,
    streamed,
    until,
    write_adapter,
    write_prompt,
)
from rpc.principals import acting, limited

TEXTS = [[20, 21, 22], [40], list(range(100, 160)), [20, 21, 22]]


@pytest_asyncio.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    options = {"num_blocks": 256, "prefix_blocks": 8}
    async with running(tmp_path, max_running=4, engine_options=options) as server:
        yield server


def request(*texts: list[int] | str, adapter: str = "", **fields: Any) -> pb.EmbedRequest:
    inputs = [
        {"text": each} if isinstance(each, str) else {"token_ids": {"ids": each}} for each in texts
    ]
    return pb.EmbedRequest(adapter_id=adapter, inputs=inputs, **fields)


def vector(ids: list[int], digest: str = "", mean: bool = False, **more: Any) -> np.ndarray:
    """What the oracle's states make, raw."""
    mix = [(digest, 1.0)] if digest else []
    found = oracle.states(ids, mix, WIDTH, VOCAB, **more).astype(np.float64)
    return (found.mean(0) if mean else found[-1]).astype(np.float32)


def same(reply: pb.EmbedResponse, wanted: list[np.ndarray], unit: bool = False) -> None:
    assert len(reply.embeddings) == len(wanted)
    for found, raw in zip(reply.embeddings, wanted, strict=True):
        exact = raw.astype(np.float64)
        exact = exact / np.linalg.norm(exact) if unit else exact
        np.testing.assert_allclose(np.array(found.values), exact, rtol=0, atol=1e-7)


async def refused(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


@pytest.mark.parametrize("pooling", [pb.POOLING_UNSPECIFIED, pb.POOLING_LAST, pb.POOLING_MEAN])
@pytest.mark.parametrize("raw", [True, False])
async def test_each_text_has_its_vector_in_the_order_of_the_texts(
    up: Running, pooling: pb.Pooling, raw: bool
) -> None:
    digest = (await up.register("pirate")).digest
    for name, held in (("", ""), ("pirate", digest)):
        sent = request(*TEXTS, adapter=name, pooling=pooling, raw_length=raw)
        reply = await up.generation.Embed(sent)
        is_mean = pooling == pb.POOLING_MEAN
        same(reply, [vector(ids, held, is_mean) for ids in TEXTS], unit=not raw)
        assert [each.tokens for each in reply.embeddings] == [len(ids) for ids in TEXTS]
        assert [each.name for each in reply.adapters] == [name] * bool(name)
        assert reply.request_id


async def test_a_text_is_tokenised_as_a_prompt_is(up: Running) -> None:
    text = "the quick brown fox, déjà vu 日本語"
    reply = await up.generation.Embed(request(text, raw_length=True))
    completion = pb.GenerateRequest(prompt=text, prompt_logprobs=0, stop={"max_new_tokens": 1})
    scores = (await up.generation.Generate(completion)).prompt_logprobs
    assert reply.embeddings[0].tokens == len(scores) + 1
    ids = [score.chosen.token_id for score in scores]
    encoded = make_tokenizer().encode(text).ids
    assert encoded[1:] == ids
    same(reply, [vector(encoded)])


async def test_vectors_are_exact_among_streams_and_streams_among_vectors(up: Running) -> None:
    digest = (await up.register("pirate")).digest
    prompts = [[20 + i] * (3 + i) for i in range(6)]
    texts = [[60 + i, *range(100, 100 + 7 * i)] for i in range(40)]
    with_mean = {"adapter": "pirate", "raw_length": True, "pooling": pb.POOLING_MEAN}
    embedding = asyncio.gather(
        up.generation.Embed(request(*texts, **with_mean)),
        up.generation.Embed(request(*texts, raw_length=True)),
    )
    answers = await asyncio.gather(
        *(up.generation.Generate(ask(*ids, new=20, adapter="pirate")) for ids in prompts)
    )
    for ids, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == expected(ids, 20, digest)
    with_adapter, base = await embedding
    same(with_adapter, [vector(ids, digest, mean=True) for ids in texts])
    same(base, [vector(ids) for ids in texts])


async def test_virtual_and_invocation_tokens_act_as_in_generation(up: Running) -> None:
    write_prompt(up.folder / "import" / "soft", 5)
    soft = await _register(up, "soft")
    ids = [30, 31, 32]
    for pooling in (pb.POOLING_LAST, pb.POOLING_MEAN):
        sent = request(ids, adapter="soft", raw_length=True, pooling=pooling)
        is_mean = pooling == pb.POOLING_MEAN
        same(await up.generation.Embed(sent), [vector(ids, soft, is_mean, virtual=5)])
    write_adapter(up.folder / "import" / "alora", alora_invocation_tokens=[50, 51])
    alora = await _register(up, "alora")
    invoked, silent = [30, 50, 51, 32], [30, 31]
    reply = await up.generation.Embed(request(invoked, silent, adapter="alora", raw_length=True))
    same(reply, [vector(invoked, alora, active=1), vector(silent, alora, active=None)])
    assert [each.base_tokens for each in reply.embeddings] == [1, 2]


async def _register(up: Running, name: str) -> str:
    sent = adapter_pb2.RegisterAdapterRequest(name=name, path=name)
    return str((await up.adapters.RegisterAdapter(sent)).adapter.digest)


LONG = [20] * 5000


@pytest.mark.parametrize(
    ("sent", "reason", "field"),
    [
        (request(), "FIELD_INVALID", "inputs"),
        (request(*[[20]] * 2049), "FIELD_INVALID", "inputs"),
        (pb.EmbedRequest(inputs=[{}]), "FIELD_INVALID", "inputs[0]"),
        (request([20], ""), "FIELD_INVALID", "inputs[1].text"),
        (request([20], []), "FIELD_INVALID", "inputs[1].token_ids.ids"),
        (request([20, VOCAB]), "FIELD_INVALID", "inputs[0].token_ids.ids[1]"),
        (request([20], pooling=7), "FIELD_INVALID", "pooling"),
        (request([20], adapter="No Name"), "FIELD_INVALID", "adapter_id"),
        (request([20], request_id="ä"), "FIELD_INVALID", "request_id"),
        (request([20], LONG), "PROMPT_TOO_LONG", "inputs[1].token_ids"),
        (request([20], "fox " * 9000), "PROMPT_TOO_LONG", "inputs[1].text"),
        (request([20], adapter="nobody"), "ADAPTER_NOT_FOUND", ""),
        (request([20, NONFINITE], [20]), "NON_FINITE_LOGITS", ""),
    ],
)
async def test_what_cannot_be_embedded_is_refused_by_name(
    up: Running, sent: pb.EmbedRequest, reason: str, field: str
) -> None:
    seen = await refused(up.generation.Embed(sent))
    assert seen.reason == reason
    if field:
        (violation,) = seen.detail(error_details_pb2.BadRequest).field_violations
        assert violation.field == field
    await up.generation.Embed(request([20]))
    await until(lambda: up.metric("running_requests") == 0 and up.metric("queue_depth") == 0)


async def test_a_call_takes_one_place_and_the_tokens_of_all_texts(
    up: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = acting(monkeypatch)
    who.principal = limited("few", concurrent_requests=1, requests_per_minute=2)
    for _ in range(2):
        await up.generation.Embed(request(*[[20, 21]] * 30))
    seen = await refused(up.generation.Embed(request([20])))
    assert seen.reason == "QUOTA_EXCEEDED"
    assert "requests_per_minute" in seen.message
    who.principal = limited("short", tokens_per_minute=50)
    seen = await refused(up.generation.Embed(request(*[[20, 21]] * 30)))
    assert seen.reason == "QUOTA_EXCEEDED"
    assert "60" in seen.message
    await up.generation.Embed(request(*[[20, 21]] * 25))


async def test_principals_get_what_they_see_and_the_base_if_it_is_theirs(
    up: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = acting(monkeypatch)
    await up.register("pirate", labels={"team": "a"})
    everybody = who.principal
    who.principal = replace(limited(), base=False, adapters=None)
    assert (await refused(up.generation.Embed(request([20])))).reason == "PERMISSION_DENIED"
    seen = await refused(up.generation.Embed(request([20], adapter="pirate")))
    assert seen.reason == "ADAPTER_NOT_FOUND"
    who.principal = everybody


async def test_a_call_with_many_texts_gives_the_engine_some_at_a_time(
    up: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder, "AT_ONCE", 3)
    submit, abort = up.server.engine.submit, up.server.engine.abort
    there: set[int] = set()
    most = 0

    def counting(message: Any) -> Any:
        nonlocal most
        there.add(message.id)
        most = max(most, len(there))
        return submit(message)

    def forgetting(number: int) -> None:
        there.discard(number)
        abort(number)

    monkeypatch.setattr(up.server.engine, "submit", counting)
    monkeypatch.setattr(up.server.engine, "abort", forgetting)
    reply = await up.generation.Embed(request(*[[20 + i] for i in range(50)], raw_length=True))
    same(reply, [vector([20 + i]) for i in range(50)])
    assert most == 3
    assert not there


async def test_a_cancelled_call_leaves_nothing_in_the_engine(tmp_path: Path) -> None:
    async with running(tmp_path, max_running=2, engine_options={"step_seconds": 0.02}) as up:
        call = up.generation.Embed(request(*[[20 + i] * 9 for i in range(100)]))
        await until(lambda: up.metric("running_requests") > 0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: up.metric("running_requests") == 0)
        assert len(up.server.engine.requests) == 0  # type: ignore[attr-defined]
        answer = await up.generation.Generate(ask(20, 21, new=3))
        assert list(answer.token_ids) == expected([20, 21], 3)


async def test_a_lost_engine_fails_the_call_with_a_pause(up: Running) -> None:
    seen = await refused(up.generation.Embed(request([20], [CRASH], [21])))
    assert seen.reason == "ENGINE_RESTARTED"
    assert seen.code is grpc.StatusCode.UNAVAILABLE
    await until(lambda: up.server.engine.ready)
    await up.generation.Embed(request([20]))


async def test_tokens_and_calls_are_counted(up: Running) -> None:
    await up.register("pirate")
    before = up.metric("prompt_tokens_total")
    await up.generation.Embed(request(*TEXTS, adapter="pirate"))
    assert up.metric("prompt_tokens_total") - before == sum(map(len, TEXTS))
    assert up.metric("adapter_requests_total", adapter="pirate", code="OK") == 1
    assert up.metric("adapter_active_requests", adapter="pirate") == 0
    assert up.metric("requests_total", method="Embed", code="OK") == 1
    call = up.generation.GenerateStream(streamed(ask(20, new=2)))
    assert [each async for each in call]
