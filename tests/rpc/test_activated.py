"""Activated LoRA over gRPC: what its owner and its callers are shown."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from engine import oracle
from google.rpc import error_details_pb2
from loraplex.v1 import adapter_pb2 as pb
from rpc.harness import (
    FORBIDDEN,
    VOCAB,
    Running,
    ask,
    expected,
    refusal,
    rest,
    running,
    streamed,
    until,
    write_adapter,
)

INVOCATION = [31, 32]
BEFORE = [20, 21, 22, 23, 24]
PROMPT = [*BEFORE, *INVOCATION, 25]


async def register(up: Running, name: str) -> pb.RegisterAdapterResponse:
    write_adapter(up.folder / "import" / name, alora_invocation_tokens=INVOCATION)
    reply: pb.RegisterAdapterResponse = await up.adapters.RegisterAdapter(
        pb.RegisterAdapterRequest(name=name, path=name)
    )
    return reply


def activated(prompt: list[int], count: int, digest: str) -> list[int]:
    at = oracle.invoked_at(prompt, INVOCATION)
    mix = [(digest, 1.0)]
    return oracle.continuation(prompt, mix, count, VOCAB, FORBIDDEN, active=at)


async def test_its_owner_sees_the_invocation_and_a_caller_whether_it_acted(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        write_adapter(tmp_path / "import" / "judge", alora_invocation_tokens=INVOCATION)
        report = await up.adapters.ValidateAdapter(pb.ValidateAdapterRequest(path="judge"))
        assert list(report.spec.invocation_tokens) == INVOCATION
        done = await register(up, "judge")
        for notes in (report.notes, done.notes):
            assert any("answered by the base alone" in note for note in notes)
        got = await up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="judge"))
        assert list(got.adapter.invocation_tokens) == INVOCATION
        assert not (await up.register("plain")).invocation_tokens

        reply = await up.generation.Generate(ask(*PROMPT, new=4, adapter="judge"))
        assert list(reply.token_ids) == activated(PROMPT, 4, done.adapter.digest)
        assert reply.usage.base_prompt_tokens == len(BEFORE)
        reply = await up.generation.Generate(ask(*BEFORE, new=4, adapter="judge"))
        assert list(reply.token_ids) == expected(BEFORE, 4)
        assert reply.usage.base_prompt_tokens == reply.usage.prompt_tokens == len(BEFORE)
        for name in ("", "plain"):
            reply = await up.generation.Generate(ask(*PROMPT, new=4, adapter=name))
            assert reply.usage.base_prompt_tokens == 0

        call = up.generation.GenerateStream(streamed(ask(*PROMPT, new=4, adapter="judge")))
        events = await rest(call)
        tokens = [token for event in events for token in event.delta.token_ids]
        assert tokens == activated(PROMPT, 4, done.adapter.digest)
        assert events[-1].finished.usage.base_prompt_tokens == len(BEFORE)


async def test_it_is_used_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        digest = (await register(up, "judge")).adapter.digest
        await up.register("plain", 1)
        mix = [{"adapter_id": "judge", "weight": 0.5}, {"adapter_id": "plain"}]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask(*PROMPT, mix=mix))
        seen = refusal(caught.value)
        assert (seen.code, seen.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "ADAPTER_NOT_MIXABLE",
        )
        (violation,) = seen.detail(error_details_pb2.BadRequest).field_violations
        assert violation.field == "mix"
        reply = await up.generation.Generate(ask(*PROMPT, new=3, mix=mix[:1]))
        at = len(BEFORE)
        assert list(reply.token_ids) == oracle.continuation(
            PROMPT, [(digest, 0.5)], 3, VOCAB, FORBIDDEN, active=at
        )


@pytest.mark.parametrize("shares", [False, True])
async def test_what_was_found_in_the_cache_is_counted(tmp_path: Path, shares: bool) -> None:
    """The oracle's blocks hold 4 tokens, of which the first is the base's."""
    async with running(tmp_path, prefix_cache=shares) as up:
        digest = (await register(up, "judge")).adapter.digest
        first = await up.generation.Generate(ask(*PROMPT, new=3))
        assert first.usage.cached_prompt_tokens == 0
        second = await up.generation.Generate(ask(*PROMPT, new=3, adapter="judge"))
        assert list(second.token_ids) == activated(PROMPT, 3, digest)
        assert second.usage.cached_prompt_tokens == (4 if shares else 0)
        assert second.usage.base_prompt_tokens == len(BEFORE)
        assert up.metric("prompt_tokens_total") == 2 * len(PROMPT)
        assert up.metric("cached_prompt_tokens_total") == (4 if shares else 0)


async def test_requests_with_another_salt_find_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        for salt in ("", "tenant", "other"):
            for found in (0, 8):
                request = ask(*range(20, 31), new=2)
                request.cache_salt = salt
                reply = await up.generation.Generate(request)
                assert reply.usage.cached_prompt_tokens == found
                assert list(reply.token_ids) == expected(list(range(20, 31)), 2)
        await until(lambda: up.metric("prefix_cache_hits_total") == 3)
        assert up.metric("prefix_cache_lookups_total") == 6
        assert up.metric("prefix_cache_blocks") >= 6
