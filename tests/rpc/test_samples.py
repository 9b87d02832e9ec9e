"""Several completions of one prompt are single requests of one call, and end as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from loraplex.v1 import generation_pb2
from rpc.harness import (
    CRASH,
    FORBIDDEN,
    NONFINITE,
    Refused,
    Running,
    ask,
    expected,
    refusal,
    rest,
    running,
    streamed,
    until,
)
from rpc.principals import Acting, acting, limited

PROMPT = [*range(20, 31)]
SAFE = dict.fromkeys(FORBIDDEN, -100.0)
"""Biases with which no token is drawn that makes the oracle misbehave."""

DRAWN: dict[str, Any] = {"temperature": 5.0, "seed": 2**64 - 2, "logit_bias": SAFE}
STOP = generation_pb2.FINISH_REASON_STOP


@pytest_asyncio.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    options = {"num_blocks": 512, "step_seconds": 0.002}
    async with running(tmp_path, max_running=6, max_waiting=6, engine_options=options) as server:
        yield server


@pytest.fixture
def who(monkeypatch: pytest.MonkeyPatch) -> Acting:
    return acting(monkeypatch)


def single(index: int, **fields: Any) -> generation_pb2.GenerateRequest:
    """The request of one completion alone."""
    seed = (DRAWN["seed"] + index) % 2**64
    return ask(*PROMPT, sampling={**DRAWN, "seed": seed}, **fields)


def several(n: int, **fields: Any) -> generation_pb2.GenerateRequest:
    return ask(*PROMPT, sampling=dict(DRAWN), n=n, **fields)


def plain(part: Any) -> dict[str, Any]:
    """What a completion holds, without what depends on the cache."""
    kept = ("text", "token_ids", "finish_reason", "logprobs", "matched_stop")
    found = {name: getattr(part, name) for name in kept}
    return {**found, "logprobs": list(part.logprobs), "tokens": part.usage.completion_tokens}


async def refused(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


async def test_with_a_seed_they_equal_single_requests_bit_for_bit(up: Running) -> None:
    """Tokens, log-probabilities and ends, of the base and of an adapter, beside others."""
    await up.register("alpha", 1)
    noise = up.generation.Generate(ask(99, 98, new=60))
    for fields in (
        {"new": 30, "logprobs": 3},
        {"new": 30, "adapter": "alpha", "prompt_logprobs": 2},
        {"new": 30, "stop": {"strings": ["e", "o"], "min_new_tokens": 4}},
        {"new": 0, "prompt_logprobs": 1},
    ):
        reply = await up.generation.Generate(several(5, **fields))
        alone = [await up.generation.Generate(single(i, **fields)) for i in range(5)]
        assert [plain(part) for part in (reply, *reply.alternatives)] == [*map(plain, alone)]
        assert list(reply.prompt_logprobs) == list(alone[0].prompt_logprobs)
        if fields["new"]:
            assert len({part.text for part in (reply, *reply.alternatives)}) > 1
        for part in reply.alternatives:
            assert part.usage.prompt_tokens == len(PROMPT)
    await noise


async def test_without_a_seed_they_differ_and_greedy_ones_are_equal(up: Running) -> None:
    hot = ask(*PROMPT, new=20, sampling={"temperature": 5.0, "logit_bias": SAFE}, n=4)
    reply = await up.generation.Generate(hot)
    assert len({tuple(part.token_ids) for part in (reply, *reply.alternatives)}) == 4
    reply = await up.generation.Generate(ask(*PROMPT, new=5, n=3))
    assert [list(part.token_ids) for part in (reply, *reply.alternatives)] == [
        expected(PROMPT, 5)
    ] * 3
    for n in (0, 1):
        assert not (await up.generation.Generate(ask(*PROMPT, n=n))).alternatives


async def test_a_stream_interleaves_them_and_says_the_same(up: Running) -> None:
    fields = {"new": 25, "logprobs": 1, "prompt_logprobs": 0, "return_prompt_token_ids": True}
    reply = await up.generation.Generate(several(6, **fields))
    events = await rest(up.generation.GenerateStream(streamed(several(6, **fields))))
    first, *others = events
    assert first.WhichOneof("event") == "started"
    assert list(first.started.prompt_logprobs) == list(reply.prompt_logprobs)
    assert list(first.started.prompt_token_ids) == list(reply.prompt_token_ids) == PROMPT
    assert not any(event.HasField("started") for event in others)
    order = [event.delta.index for event in others if event.HasField("delta")]
    assert len({*order[:12]}) > 1
    for index, part in enumerate((reply, *reply.alternatives)):
        own = [
            event
            for event in others
            if (event.delta if event.HasField("delta") else event.finished).index == index
        ]
        *deltas, last = own
        assert all(event.HasField("delta") for event in deltas)
        assert "".join(event.delta.text for event in deltas) == part.text
        assert [t for event in deltas for t in event.delta.token_ids] == list(part.token_ids)
        assert [e for event in deltas for e in event.delta.logprobs] == list(part.logprobs)
        assert last.finished.finish_reason == part.finish_reason
        assert last.finished.usage.completion_tokens == part.usage.completion_tokens
    assert events[-1].HasField("finished")


async def test_one_that_ends_early_goes_and_the_others_continue(up: Running) -> None:
    texts = [await up.generation.Generate(single(i, new=40)) for i in range(3)]
    end = texts[1].token_ids[5]
    lengths = [[*reply.token_ids, end].index(end) for reply in texts]
    call = up.generation.GenerateStream(streamed(several(3, new=40, stop={"token_ids": [end]})))
    events = await rest(call)
    ends = {e.finished.index: e.finished for e in events if e.HasField("finished")}
    assert sorted(ends) == [0, 1, 2]
    assert [ends[i].usage.completion_tokens for i in range(3)] == lengths
    assert ends[1].finish_reason == STOP
    assert ends[1].matched_stop.token_id == end
    await until(lambda: up.metric("running_requests") == 0)
    assert up.metric("queue_depth") == up.metric("queued_tokens") == 0


async def test_they_share_the_blocks_of_the_prompt(tmp_path: Path) -> None:
    """The prompt is computed once: full blocks are found, and only what follows is not."""
    options = {"num_blocks": 512, "block_size": 4}
    async with running(tmp_path, engine_options=options) as up:
        for adapter in ("", "alpha"):
            if adapter:
                await up.register("alpha", 1)
            reply = await up.generation.Generate(several(8, new=3, adapter=adapter))
            cached = [part.usage.cached_prompt_tokens for part in (reply, *reply.alternatives)]
            assert cached == [0] + [8] * 7  # of 11 tokens, in blocks of 4
        assert up.metric("prompt_tokens_total") == 2 * 8 * len(PROMPT)
        assert up.metric("cached_prompt_tokens_total") == 2 * 7 * 8
        await until(lambda: up.metric("kv_blocks", state="used") == 0)


async def test_a_failure_of_one_ends_the_call_with_one_status(up: Running) -> None:
    """One completion draws a token after which its logits are not finite."""
    sampling = {**DRAWN, "logit_bias": {**SAFE, NONFINITE: 8.0}}
    wanted = ask(*PROMPT, new=200, sampling=sampling, n=4)
    assert (await refused(up.generation.Generate(wanted))).reason == "NON_FINITE_LOGITS"
    call = up.generation.GenerateStream(streamed(wanted))
    tokens: list[list[int]] = [[], [], [], []]

    async def read() -> None:
        while (event := await call.read()) is not grpc.aio.EOF:
            assert not event.HasField("finished")
            tokens[event.delta.index] += event.delta.token_ids

    assert (await refused(read())).reason == "NON_FINITE_LOGITS"
    assert any(NONFINITE not in each for each in tokens)
    await until(lambda: up.metric("running_requests") == 0)
    await until(lambda: up.metric("kv_blocks", state="used") == 0)


async def test_the_end_of_the_engine_ends_the_call(up: Running) -> None:
    call = up.generation.GenerateStream(streamed(several(4, new=400)))
    assert (await call.read()).HasField("started")
    killer = up.generation.Generate(ask(CRASH, new=1))
    seen = await refused(rest(call))
    assert (seen.code, seen.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTED")
    await refused(killer)
    await until(lambda: up.metric("running_requests") == 0)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_cancelling_and_a_deadline_end_all_of_them(up: Running, how: str) -> None:
    fields = {"timeout": 0.5} if how == "deadline" else {}
    call = up.generation.GenerateStream(streamed(several(6, new=400)), **fields)
    assert (await call.read()).HasField("started")
    await until(lambda: up.metric("running_requests") == 6)
    if how == "cancel":
        call.cancel()
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: up.metric("running_requests") == 0)
    await until(lambda: up.metric("adapter_active_requests", adapter="_base") == 0)
    await until(lambda: up.metric("kv_blocks", state="used") == 0)
    code = "CANCELLED" if how == "cancel" else "DEADLINE_EXCEEDED"
    await until(lambda: up.metric("adapter_requests_total", adapter="_base", code=code) == 6)
    reply = await up.generation.Generate(ask(*PROMPT, new=4))
    assert list(reply.token_ids) == expected(PROMPT, 4)


async def test_each_counts_as_a_request_in_every_limit(up: Running, who: Acting) -> None:
    with who.as_(limited(concurrent_requests=4)):
        seen = await refused(up.generation.Generate(several(5, new=1)))
        assert seen.reason == "QUOTA_EXCEEDED"
        assert "never" in seen.message
        assert "grpc-retry-pushback-ms" not in seen.trailers
        call = up.generation.GenerateStream(streamed(several(3, new=400)))
        assert (await call.read()).HasField("started")
        seen = await refused(up.generation.Generate(several(2, new=1)))
        assert "concurrent_requests" in seen.message
        assert "never" not in seen.message
        assert seen.trailers["grpc-retry-pushback-ms"] == "500"
        await up.generation.Generate(several(1, new=1))
        call.cancel()
        await until(lambda: up.metric("principal_active_requests", principal="_other") == 0)
        await up.generation.Generate(several(4, new=1))
    with who.as_(limited("rated", requests_per_minute=6, tokens_per_minute=1000)):
        assert "never" in (await refused(up.generation.Generate(several(7, new=1)))).message
        await up.generation.Generate(several(4, new=1))
        seen = await refused(up.generation.Generate(several(3, new=1)))
        assert "requests_per_minute" in seen.message
        await up.generation.Generate(several(2, new=1))
    with who.as_(limited("counted", tokens_per_minute=4 * len(PROMPT))):
        seen = await refused(up.generation.Generate(several(5, new=1)))
        assert "tokens_per_minute" in seen.message
        assert "never" in seen.message
        await up.generation.Generate(several(4, new=1))
        seen = await refused(up.generation.Generate(several(1, new=1)))
        assert "tokens_per_minute" in seen.message


async def test_the_places_of_the_server_hold_and_what_never_fits_is_invalid(up: Running) -> None:
    call = up.generation.GenerateStream(streamed(several(8, new=400)))
    assert (await call.read()).HasField("started")
    seen = await refused(up.generation.Generate(several(12, new=1)))
    assert seen.reason == "OVERLOADED"
    seen = await refused(up.generation.Generate(several(13, new=1)))
    assert seen.reason == "FIELD_INVALID"
    (violation,) = seen.detail(error_details_pb2.BadRequest).field_violations
    assert violation.field == "n"
    assert "12" in violation.description
    call.cancel()
    await until(lambda: up.metric("running_requests") == 0)
    await asyncio.gather(*(up.generation.Generate(several(6, new=3)) for _ in range(2)))


async def test_prompts_that_together_exceed_what_may_wait_are_refused(tmp_path: Path) -> None:
    options = {"num_blocks": 512}
    async with running(tmp_path, max_waiting_tokens=50, engine_options=options) as up:
        await up.generation.Generate(several(4, new=1))
        seen = await refused(up.generation.Generate(several(5, new=1)))
        assert seen.reason == "FIELD_INVALID"
        (violation,) = seen.detail(error_details_pb2.BadRequest).field_violations
        assert violation.field == "n"
        await up.generation.Generate(ask(*range(20, 80), new=1))  # one of any size may wait


BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"n": 129}, "n"),
    ({"n": (1 << 32) - 1}, "n"),
    ({"stop": {"max_new_tokens": 3, "min_new_tokens": 4}}, "stop.min_new_tokens"),
    ({"stop": {"max_new_tokens": 0, "min_new_tokens": 1}}, "stop.min_new_tokens"),
    ({"stop": {"min_new_tokens": 257}}, "stop.min_new_tokens"),
]


async def test_what_is_out_of_range_is_named(up: Running) -> None:
    for fields, field in BEYOND:
        request = generation_pb2.GenerateRequest(token_ids={"ids": PROMPT}, **fields)
        for call, path in (
            (up.generation.Generate(request), field),
            (rest(up.generation.GenerateStream(streamed(request))), f"request.{field}"),
        ):
            seen = await refused(call)
            assert seen.reason == "FIELD_INVALID"
            bad = seen.detail(error_details_pb2.BadRequest)
            assert [violation.field for violation in bad.field_violations] == [path]


async def test_several_engines_compute_the_same(tmp_path: Path) -> None:
    options = {"num_blocks": 512}
    async with running(tmp_path, devices="cpu,cpu", engine_options=options) as up:
        alone = [await up.generation.Generate(single(i, new=12)) for i in range(6)]
        reply = await up.generation.Generate(several(6, new=12))
        assert [plain(part) for part in (reply, *reply.alternatives)] == [*map(plain, alone)]
