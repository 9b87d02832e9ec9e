"""Generation end to end: the RPC layer over a real engine process that runs the oracle."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

from loraplex.v1 import generation_pb2
from rpc.harness import HARMLESS, VOCAB, ask, expected, running, streamed


async def test_a_reply_holds_exactly_the_tokens_of_the_named_adapter(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        a = await up.register("alpha", 1)
        b = await up.register("beta", 2)
        for name, digest in (("", ""), ("alpha", a.digest), ("beta", b.digest)):
            reply = await up.generation.Generate(ask(20, 21, 22, new=6, adapter=name))
            assert list(reply.token_ids) == expected([20, 21, 22], 6, digest)
            assert [r.digest for r in reply.adapters] == ([digest] if digest else [])
            assert reply.finish_reason == generation_pb2.FINISH_REASON_LENGTH
            assert reply.usage.prompt_tokens == 3
            assert reply.usage.completion_tokens == 6
            assert reply.request_id


async def test_every_form_of_an_adapter_id_finds_its_version(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        old = await up.register("alpha", 1)
        new = await up.register("alpha", 2, replace=True)
        assert (old.version, new.version) == (1, 2)
        forms = {
            "alpha": new,
            "alpha@1": old,
            "alpha@2": new,
            f"alpha@{old.digest}": old,
            f"alpha@{new.digest}": new,
        }
        for form, adapter in forms.items():
            reply = await up.generation.Generate(ask(30, 31, new=4, adapter=form))
            assert list(reply.token_ids) == expected([30, 31], 4, adapter.digest), form
            (resolved,) = reply.adapters
            assert (resolved.name, resolved.version) == ("alpha", adapter.version)


async def test_a_mix_applies_the_sum_of_its_terms(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        a = await up.register("alpha", 1)
        b = await up.register("beta", 2)
        mix = [
            generation_pb2.AdapterWeight(adapter_id="alpha", weight=0.5),
            generation_pb2.AdapterWeight(adapter_id="beta"),
            generation_pb2.AdapterWeight(adapter_id="alpha", weight=-0.25),
        ]
        reply = await up.generation.Generate(ask(40, 41, new=5, mix=mix))
        state = [(a.digest, 0.25), (b.digest, 1.0)]
        assert list(reply.token_ids) == expected([40, 41], 5, mix=state)
        assert [(r.name, r.weight) for r in reply.adapters] == [
            ("alpha", 0.5),
            ("beta", 1.0),
            ("alpha", -0.25),
        ]


async def test_a_stream_is_started_deltas_finished_and_equals_the_unary_call(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as up:
        request = ask(50, 51, 52, new=12, request_id="mine", logprobs=2, prompt_logprobs=1)
        call = up.generation.GenerateStream(streamed(request))
        events = [event async for event in call]
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[0] == "started"
        assert kinds[-1] == "finished"
        assert set(kinds[1:-1]) == {"delta"}
        whole = await up.generation.Generate(request)
        deltas = [event.delta for event in events[1:-1]]
        assert "".join(d.text for d in deltas) == whole.text
        assert [t for d in deltas for t in d.token_ids] == list(whole.token_ids)
        assert [p for d in deltas for p in d.logprobs] == list(whole.logprobs)
        assert list(events[0].started.prompt_logprobs) == list(whole.prompt_logprobs)
        assert events[0].started.request_id == whole.request_id == "mine"
        assert events[-1].finished.usage == whole.usage
        assert dict(await call.trailing_metadata())["x-request-id"] == "mine"


async def test_logprobs_are_one_per_token_with_its_text(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        reply = await up.generation.Generate(ask(60, 61, 62, new=5, logprobs=3, prompt_logprobs=0))
        assert [p.chosen.token_id for p in reply.logprobs] == list(reply.token_ids)
        assert [len(p.top) for p in reply.logprobs] == [3] * 5
        for entry in reply.logprobs:
            assert entry.top[0] == entry.chosen  # greedy
            assert entry.chosen.logprob <= 0
            assert math.isfinite(entry.chosen.logprob)
        assert [p.chosen.token_id for p in reply.prompt_logprobs] == [61, 62]
        assert all(not p.top for p in reply.prompt_logprobs)


async def test_the_same_seed_gives_the_same_tokens(tmp_path: Path) -> None:
    tame = {**HARMLESS, "eos_token_ids": []}
    async with running(tmp_path, engine_options=tame) as up:
        hot = {"temperature": 50.0, "seed": 2**64 - 1}
        first = await up.generation.Generate(ask(new=16, sampling=hot))
        again = await up.generation.Generate(ask(new=16, sampling=hot))
        other = await up.generation.Generate(ask(new=16, sampling={**hot, "seed": 7}))
        assert first.token_ids == again.token_ids
        assert first.token_ids != other.token_ids


async def test_the_answer_is_capped_by_the_context(tmp_path: Path) -> None:
    async with running(tmp_path, max_context=32) as up:
        reply = await up.generation.Generate(ask(*range(20, 50), new=1000))
        assert reply.finish_reason == generation_pb2.FINISH_REASON_LENGTH
        assert reply.usage.completion_tokens == 2


async def test_a_text_prompt_and_a_conversation_are_tokenised(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        request = ask(new=3)
        request.prompt = "the quick brown fox"
        reply = await up.generation.Generate(request)
        assert 0 < reply.usage.prompt_tokens < len("the quick brown fox")
        request.messages.messages.add(role="user", content="the quick")
        reply = await up.generation.Generate(request)
        assert reply.usage.completion_tokens == 3
        assert all(token < VOCAB for token in reply.token_ids)


async def test_many_streams_send_several_tokens_at_a_time_and_lose_none(tmp_path: Path) -> None:
    slow = {"step_seconds": 0.002, "num_blocks": 1024}
    async with running(tmp_path, stream_writes=20, engine_options=slow) as up:

        async def one(i: int) -> int:
            call = up.generation.GenerateStream(streamed(ask(20, i, new=60, logprobs=0)))
            deltas = [e.delta for e in [e async for e in call] if e.HasField("delta")]
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert tokens == expected([20, i], 60)
            chosen = [p.chosen.token_id for delta in deltas for p in delta.logprobs]
            assert chosen == tokens
            return len(deltas)

        counts = await asyncio.gather(*(one(i) for i in range(30, 46)))
        assert sum(counts) < 16 * 60 / 2


async def test_a_lone_stream_is_not_held_back(tmp_path: Path) -> None:
    slow = {"step_seconds": 0.02}
    async with running(tmp_path, engine_options=slow) as up:
        call = up.generation.GenerateStream(streamed(ask(new=20)))
        deltas = [e.delta for e in [e async for e in call] if e.HasField("delta")]
        assert len(deltas) > 10
