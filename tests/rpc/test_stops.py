"""What ends a completion is found in the text with special tokens, and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loraplex.v1 import generation_pb2
from rpc.harness import EOS, SCRIPT, Running, ask, make_tokenizer, running, streamed

TOKENIZER = make_tokenizer()
START = 0
"""The special token <s>, which ends no completion."""
STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH
HI, LO = TOKENIZER.encode("hi").ids, TOKENIZER.encode("lo").ids
BROKEN = TOKENIZER.encode("\ufffd").ids
HALF = TOKENIZER.encode("😺").ids[:-1]
SCRIPTED = [*HI, START, *LO, *BROKEN, *HALF]


async def both(
    up: Running, **request: Any
) -> tuple[generation_pb2.GenerateResponse, list[generation_pb2.GenerateStreamResponse]]:
    """The answer to a request and the events of its stream, which say the same."""
    wanted = ask(20, SCRIPT, new=len(SCRIPTED), **request)
    reply = await up.generation.Generate(wanted)
    events = [event async for event in up.generation.GenerateStream(streamed(wanted))]
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert "".join(delta.text for delta in deltas) == reply.text
    assert [token for delta in deltas for token in delta.token_ids] == list(reply.token_ids)
    finished = events[-1].finished
    assert finished.finish_reason == reply.finish_reason
    assert finished.HasField("matched_stop") == reply.HasField("matched_stop")
    assert finished.matched_stop == reply.matched_stop
    assert reply.usage.completion_tokens == len(reply.token_ids)
    return reply, events


ENDS = [
    (["<s>"], SCRIPTED[: len(HI) + 1], "hi", "hi"),
    (["i<s>"], SCRIPTED[: len(HI) + 1], "h", "h"),
    (["i<s>l"], None, "h", "h"),
    ([">lo"], None, "hi", "hi<s"),
    (["<s>x", "<s"], SCRIPTED[: len(HI) + 1], "hi", "hi"),
    (["\ufffd"], None, "hilo", "hi<s>lo"),
    (["o\ufffd"], None, "hil", "hi<s>l"),
]


@pytest.mark.parametrize(("strings", "tokens", "skipped", "kept"), ENDS, ids=str)
async def test_a_stop_string_may_hold_special_tokens(
    tmp_path: Path, strings: list[str], tokens: list[int] | None, skipped: str, kept: str
) -> None:
    async with running(tmp_path, script=SCRIPTED) as up:
        for skip, text in ((None, skipped), (True, skipped), (False, kept)):
            fields = {} if skip is None else {"skip_special_tokens": skip}
            reply, events = await both(up, stop={"strings": strings}, **fields)
            assert (reply.finish_reason, reply.text) == (STOP, text)
            assert reply.matched_stop.text == (strings[-1] if tokens else strings[0])
            assert reply.matched_stop.WhichOneof("kind") == "text"
            if tokens is not None:
                assert list(reply.token_ids) == tokens
            sent = "".join(e.delta.text for e in events if e.HasField("delta"))
            assert not any(stop in sent for stop in strings)


async def test_special_tokens_are_in_the_text_on_request(tmp_path: Path) -> None:
    async with running(tmp_path, script=SCRIPTED) as up:
        for skip in (True, False):
            reply, _ = await both(up, skip_special_tokens=skip)
            whole = TOKENIZER.decode(SCRIPTED[: -len(HALF)], skip_special_tokens=skip)
            assert reply.text == whole
            assert list(reply.token_ids) == SCRIPTED
            assert reply.finish_reason == LENGTH
            assert not reply.HasField("matched_stop")


async def test_the_token_that_ends_a_completion_is_reported(tmp_path: Path) -> None:
    script = [*HI, EOS, *LO]
    async with running(tmp_path, script=script) as up:
        for stop, token, tokens in (
            ({}, EOS, HI),
            ({"strings": ["</s>"]}, EOS, HI),
            ({"token_ids": [LO[0], HI[-1]]}, HI[-1], HI[:-1]),
            ({"token_ids": [LO[-1]], "ignore_eos": True}, LO[-1], script[:-1]),
        ):
            reply, _ = await both(up, stop=stop)
            assert (reply.finish_reason, list(reply.token_ids)) == (STOP, tokens)
            assert reply.matched_stop.WhichOneof("kind") == "token_id"
            assert reply.matched_stop.token_id == token
        reply, _ = await both(up, stop={"strings": ["</s>"], "ignore_eos": True})
        assert list(reply.token_ids) == [*HI, EOS]
        assert (reply.text, reply.matched_stop.text) == ("hi", "</s>")


async def test_no_part_of_a_stop_string_or_character_is_streamed(tmp_path: Path) -> None:
    script = [*HI, START, *TOKENIZER.encode("日本語").ids, *LO]
    async with running(tmp_path, script=script) as up:
        request = ask(
            20, SCRIPT, new=len(script), skip_special_tokens=False, stop={"strings": ["<s>日本x"]}
        )
        events = [event async for event in up.generation.GenerateStream(streamed(request))]
        texts = [event.delta.text for event in events if event.HasField("delta")]
        assert "".join(texts) == "hi<s>日本語lo"
        begun = ""
        for text in texts:
            begun += text
            assert not begun.endswith(("<", "<s", "<s>", "<s>日", "<s>日本", "\ufffd")) or (
                begun == "hi<s>日本語lo"
            )
