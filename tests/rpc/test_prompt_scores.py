"""Log-probabilities of a long prompt are made and moved in slices, and their number is bounded."""

from __future__ import annotations

import random
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from loraplex.v1 import generation_pb2
from loraplex_server.engine.messages import (
    FromEngine,
    Logprobs,
    Output,
    PromptScores,
    StepReport,
    StepStats,
)
from loraplex_server.engine.process import wire
from loraplex_server.rpc.messages import validate
from loraplex_server.rpc.messages.completion import SLICE_ENTRIES, add_logprobs
from loraplex_server.rpc.messages.slices import extend_in_slices
from loraplex_server.text.tokenizer import TextTokenizer
from rpc.harness import ask, refusal, running, streamed, write_model
from rpc.turns import Turns

pytestmark = pytest.mark.fault("prompt-logprobs-hold-loop")

LONG = {"num_blocks": 16_384, "max_context": 65_536}


def scores(tokens: int, top: int) -> list[Logprobs]:
    drawn = random.Random(0)
    made = [
        Logprobs(
            drawn.randrange(400),
            -drawn.random(),
            [(drawn.randrange(400), -drawn.random()) for _ in range(top)],
        )
        for _ in range(tokens)
    ]
    return [Logprobs(0, 0.0, [(0, 0.0)] * top), *made]


async def test_prompt_scores_are_put_into_a_reply_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TextTokenizer(write_model(tmp_path), 100)
    given = scores(2000, 20)

    def one(token: int, value: float) -> generation_pb2.TokenLogprob:
        return generation_pb2.TokenLogprob(
            token_id=token,
            logprob=value,
            text=tokenizer.token_text(token),
            raw=tokenizer.token_bytes(token),
            special=tokenizer.is_special(token),
        )

    wanted = generation_pb2.GenerationDelta(
        logprobs=[
            generation_pb2.TokenLogprobs(
                chosen=one(e.token_id, e.logprob), top=[one(t, v) for t, v in e.top]
            )
            for e in given
        ]
    )
    turns, text = Turns(), tokenizer.token_text
    monkeypatch.setattr(tokenizer, "token_text", lambda token: turns.note() or text(token))
    made = generation_pb2.GenerationDelta()
    await add_logprobs(made.logprobs, tokenizer, given)
    assert turns.stop() <= SLICE_ENTRIES + 21
    assert sum(turns.done.values()) == 2001 * 21
    assert made.SerializeToString() == wanted.SerializeToString()
    copied = generation_pb2.GenerationDelta()
    await extend_in_slices(copied.logprobs, made.logprobs)
    assert copied == wanted


async def test_a_long_prompt_holds_the_loop_for_a_slice_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextTokenizer.token_text
    turns: list[Turns] = []

    def noted(tokenizer: TextTokenizer, token: int) -> str:
        for each in turns:
            each.note()
        return text(tokenizer, token)

    monkeypatch.setattr(TextTokenizer, "token_text", noted)
    prompt = [20 + i % 300 for i in range(2000)]
    async with running(tmp_path, engine_options=LONG) as up:
        turns.append(Turns())
        request = ask(*prompt, new=3, prompt_logprobs=20, logprobs=1, request_id="mine")
        whole = await up.generation.Generate(request)
        assert turns[0].stop() <= 2 * SLICE_ENTRIES
        assert [each.chosen.token_id for each in whole.prompt_logprobs] == prompt[1:]
        assert all(len(each.top) == 20 for each in whole.prompt_logprobs)
        events = [event async for event in up.generation.GenerateStream(streamed(request))]
        assert list(events[0].started.prompt_logprobs) == list(whole.prompt_logprobs)
        assert len(whole.token_ids) == len(whole.logprobs) == 3
        one = [await up.generation.Generate(ask(*prompt[:9], prompt_logprobs=20)) for _ in "ab"]
        assert list(one[0].prompt_logprobs) == list(one[1].prompt_logprobs)
        assert [each.chosen.token_id for each in one[0].prompt_logprobs] == prompt[1:9]


def frames(data: bytes) -> list[FromEngine]:
    return [wire.decode(each, wire.FROM_ENGINE) for each in wire.Frames().feed(data)]


STATS = StepStats(**dict.fromkeys(list(StepStats.__struct_fields__)[:13], 0))  # type: ignore[arg-type]


def test_the_engine_sends_them_in_frames_of_a_bounded_size() -> None:
    long, longer, short = scores(1000, 20), scores(9000, 0), scores(3, 20)
    outputs = [
        Output(1, prompt_logprobs=long, started=True, token_ids=[7]),
        Output(2, prompt_logprobs=short, started=True),
        Output(3, prompt_logprobs=longer, started=True, finish="stop"),
    ]
    *parts, report = frames(wire.encode(StepReport(outputs, STATS)))
    assert isinstance(report, StepReport)
    assert report.stats == STATS
    assert report.outputs == [
        Output(1, started=True, token_ids=[7]),
        outputs[1],
        Output(3, started=True, finish="stop"),
    ]
    joined: dict[int, list[Logprobs]] = {1: [], 3: []}
    for part in parts:
        assert isinstance(part, PromptScores)
        assert sum(1 + len(each.top) for each in part.logprobs) <= wire.SCORES_IN_FRAME
        joined[part.id] += part.logprobs
    assert joined == {1: long, 3: longer}


def test_a_report_without_many_is_one_frame() -> None:
    report = StepReport([Output(2, prompt_logprobs=scores(3, 20), started=True)], STATS)
    assert frames(wire.encode(report)) == [report]


ROOM = 1 << 30


def test_the_number_of_prompt_scores_is_bounded() -> None:
    request = generation_pb2.GenerateRequest(prompt_logprobs=20)
    most = validate.MAX_PROMPT_SCORES // 21
    assert validate.scores(request, most, ROOM) == []
    assert [p.field for p in validate.scores(request, most + 1, ROOM)] == ["prompt_logprobs"]
    assert validate.scores(generation_pb2.GenerateRequest(), 1 << 29, ROOM) == []
    request = generation_pb2.GenerateRequest(prompt_logprobs=0)
    assert validate.scores(request, validate.MAX_PROMPT_SCORES, ROOM) == []
    (problem,) = validate.scores(request, validate.MAX_PROMPT_SCORES + 1, ROOM, "request.")
    assert problem.field == "request.prompt_logprobs"


def test_the_number_of_scores_of_several_completions_is_bounded() -> None:
    """What the context leaves no room for does not count, and neither does one completion."""
    request = generation_pb2.GenerateRequest(logprobs=20, n=128)
    request.stop.max_new_tokens = most = validate.MAX_SCORES // 21 // 128
    assert validate.scores(request, 5, ROOM) == []
    request.stop.max_new_tokens = (1 << 32) - 1
    assert validate.scores(request, 5, 5 + most) == []
    (problem,) = validate.scores(request, 5, 6 + most, "request.")
    assert problem.field == "request.logprobs"
    request.n = 1
    assert validate.scores(request, 5, ROOM) == []
    request = generation_pb2.GenerateRequest(logprobs=20, n=128)  # 256 tokens by default
    assert [p.field for p in validate.scores(request, 5, ROOM)] == []
    request.stop.max_new_tokens = 400
    assert [p.field for p in validate.scores(request, 5, ROOM)] == ["logprobs"]
    request.ClearField("logprobs")
    assert validate.scores(request, 5, ROOM) == []


async def test_too_many_prompt_scores_are_refused_before_the_engine_gets_the_request(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, engine_options=LONG) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask(*[20] * 50_000, prompt_logprobs=20))
        seen = refusal(caught.value)
        assert seen.reason == "FIELD_INVALID"
        (violation,) = seen.detail(error_details_pb2.BadRequest).field_violations
        assert violation.field == "prompt_logprobs"
        assert up.metric("queued_tokens") == 0
