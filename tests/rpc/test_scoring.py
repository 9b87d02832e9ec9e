"""Scores, least lengths and included stop strings, and texts as tokens and back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import grpc
import pytest
from google.rpc import error_details_pb2
from loraplex.v1 import generation_pb2, model_pb2, model_pb2_grpc
from loraplex_model.checkpoints.encoding import PromptEncoder
from loraplex_server.rpc.calls import bounds
from loraplex_server.rpc.messages import validate
from loraplex_server.rpc.services import model as model_service
from loraplex_server.text.detokenizer import TokenTexts
from rpc.harness import (
    EOS,
    SCRIPT,
    VOCAB,
    WIDTH,
    Running,
    ask,
    expected,
    make_tokenizer,
    refusal,
    running,
)
from rpc.test_stops import HALF, HI, LO, SCRIPTED, START, both

P = ParamSpec("P")
T = TypeVar("T")

TOKENIZER = make_tokenizer()
LENGTH = generation_pb2.FINISH_REASON_LENGTH


def stub(up: Running) -> Any:
    return model_pb2_grpc.ModelServiceStub(up.channel)


async def field_of(call: Any) -> str:
    """The one field that a call is refused for."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    seen = refusal(caught.value)
    assert seen.reason == "FIELD_INVALID"
    (violation,) = seen.detail(error_details_pb2.BadRequest).field_violations
    return str(violation.field)


async def test_a_prompt_is_scored_without_new_tokens(tmp_path: Path) -> None:
    prompt = [*range(20, 40)]
    async with running(tmp_path) as up:
        whole = await up.generation.Generate(ask(*prompt, new=2, prompt_logprobs=3))
        fields = {"prompt_logprobs": 3, "return_prompt_token_ids": True}
        scored = await up.generation.Generate(ask(*prompt, new=0, logprobs=1, **fields))
        assert list(scored.prompt_logprobs) == list(whole.prompt_logprobs)
        assert list(scored.prompt_token_ids) == prompt
        assert (scored.text, list(scored.token_ids), list(scored.logprobs)) == ("", [], [])
        assert (scored.finish_reason, scored.usage.completion_tokens) == (LENGTH, 0)
        assert scored.usage.prompt_tokens == len(prompt)
        assert not scored.HasField("matched_stop")
        # The room for an answer of one token is needed in any case.
        model = (await stub(up).GetModel(model_pb2.GetModelRequest())).model
        fits = [20 + i % 300 for i in range(model.max_context - 1)]
        scored = await up.generation.Generate(ask(*fits, new=0, prompt_logprobs=0))
        assert [entry.chosen.token_id for entry in scored.prompt_logprobs] == fits[1:]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask(*fits, 20, new=0, prompt_logprobs=0))
        assert refusal(caught.value).reason == "PROMPT_TOO_LONG"


async def test_the_chosen_value_and_the_one_among_the_best_are_the_same_float(
    tmp_path: Path,
) -> None:
    prompt = [20, *expected([20], 6), 21, 22]
    async with running(tmp_path) as up:
        reply = await up.generation.Generate(ask(*prompt, new=9, logprobs=5, prompt_logprobs=5))
        entries = [*reply.logprobs, *reply.prompt_logprobs]
        assert len(entries) == 9 + len(prompt) - 1
        met = 0
        for entry in entries:
            values = [each.logprob for each in entry.top]
            assert values == sorted(values, reverse=True)
            same = [each for each in entry.top if each.token_id == entry.chosen.token_id]
            met += len(same)
            assert all(each == entry.chosen for each in same)
        assert met >= 9 + 6


async def test_bytes_of_tokens_joined_are_the_text(tmp_path: Path) -> None:
    script = [*HI, START, *TOKENIZER.encode("é日本").ids, *LO, *HALF]
    async with running(tmp_path, script=script) as up:
        request = ask(20, SCRIPT, new=len(script), logprobs=2, skip_special_tokens=False)
        reply = await up.generation.Generate(request)
        raws = [entry.chosen.raw for entry in reply.logprobs]
        assert b"".join(raws).decode(errors="ignore") == reply.text == "hi<s>é日本lo"
        assert b"".join(raws[-len(HALF) :]) == "😺".encode()[: len(b"".join(raws[-len(HALF) :]))]
        for entry in reply.logprobs:
            for each in (entry.chosen, *entry.top):
                assert each.raw.decode(errors="replace") == each.text


@pytest.mark.parametrize("least", [0, 2, len(HI) + 1, len(SCRIPTED) - len(HALF)])
async def test_stop_strings_count_from_the_least_length_on(tmp_path: Path, least: int) -> None:
    """ "hi" ends with the tokens of HI, and "lo" some tokens later; each token counts."""
    ends = {"hi": len(HI), "lo": len(HI) + 1 + len(LO)}
    async with running(tmp_path, script=SCRIPTED) as up:
        for include in (False, True):
            stop = {
                "strings": ["hi", "lo"],
                "min_new_tokens": least,
                "include_stop_string": include,
            }
            reply, _ = await both(up, stop=stop)
            matched = next((text for text, end in ends.items() if end >= least), None)
            if matched is None:
                assert reply.finish_reason == LENGTH
                continue
            assert reply.matched_stop.text == matched
            assert len(reply.token_ids) == ends[matched]
            before = {"hi": "", "lo": "hi"}[matched]
            assert reply.text == before + (matched if include else "")


async def test_an_included_stop_string_is_whole_though_special_tokens_are_left_out(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, script=SCRIPTED) as up:
        for skip in (True, False):
            stop = {"strings": ["i<s>l"], "include_stop_string": True}
            reply, _ = await both(up, stop=stop, skip_special_tokens=skip)
            assert reply.text == "hi<s>l"


async def test_no_end_token_comes_before_the_least_length(tmp_path: Path) -> None:
    """The engine's end token is said first; its runner-up takes its place, for good or until."""
    script = [EOS] * 6
    async with running(tmp_path, script=script) as up:
        for least in range(5):
            reply, _ = await both(up, stop={"min_new_tokens": least, "max_new_tokens": 6})
            assert list(reply.token_ids) == [EOS + 1] * least
            assert reply.matched_stop.token_id == EOS
        stop = {"min_new_tokens": 4, "max_new_tokens": 6, "ignore_eos": True}
        reply, _ = await both(up, stop=stop)
        assert list(reply.token_ids) == script
        stop = {"min_new_tokens": 2, "max_new_tokens": 6, "token_ids": [EOS + 1]}
        reply, _ = await both(up, stop=stop)
        assert len(reply.token_ids) == 2
        assert {EOS, EOS + 1}.isdisjoint(reply.token_ids)


async def test_the_model_is_described_with_its_template_and_width(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        model = (await stub(up).GetModel(model_pb2.GetModelRequest())).model
        source = json.loads((tmp_path / "model" / "model.json").read_text())["chat_template"]
        assert model.chat_template.text == source
        assert model.hidden_size == WIDTH


async def test_texts_become_the_tokens_of_a_prompt_and_tokens_become_texts(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as up:
        for text in ("", " ", "the fox", "déjà vu 日本語 <s>\0", "日本語 the fox " * 3000):
            ids = TOKENIZER.encode(text).ids
            reply = await stub(up).Tokenize(model_pb2.TokenizeRequest(text=text))
            assert (list(reply.token_ids), list(reply.pieces)) == (ids, [])
            asked = model_pb2.TokenizeRequest(text=text, no_special_tokens=True, with_pieces=True)
            reply = await stub(up).Tokenize(asked)
            assert list(reply.token_ids) == ids
            assert b"".join(reply.pieces) == text.encode()
            for skip in (False, True):
                back = await stub(up).Detokenize(
                    model_pb2.DetokenizeRequest(
                        token_ids=ids, skip_special_tokens=skip, with_pieces=True
                    )
                )
                assert back.text == text.replace("<s>", "" if skip else "<s>")
                assert list(back.pieces) == list(reply.pieces)
        half = await stub(up).Detokenize(model_pb2.DetokenizeRequest(token_ids=HALF))
        assert set(half.text) == {"\ufffd"}
        if ids:
            prompt = generation_pb2.GenerateRequest(prompt="the fox", return_prompt_token_ids=True)
            prompt.stop.max_new_tokens = 0
            asked = model_pb2.TokenizeRequest(text="the fox")
            tokens = (await stub(up).Tokenize(asked)).token_ids
            assert (await up.generation.Generate(prompt)).prompt_token_ids == tokens


async def test_tokens_outside_of_the_vocabulary_and_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as up:
        model = stub(up)
        beyond = model_pb2.DetokenizeRequest(token_ids=[5, VOCAB])
        assert await field_of(model.Detokenize(beyond)) == "token_ids[1]"
        beyond = model_pb2.DetokenizeRequest(token_ids=[5] * 5000 + [VOCAB])
        assert await field_of(model.Detokenize(beyond)) == "token_ids[5000]"
        many = model_pb2.DetokenizeRequest(token_ids=[5] * (bounds.MAX_TOKEN_IDS + 1))
        assert await field_of(model.Detokenize(many)) == "token_ids"
        monkeypatch.setattr(model_service, "MAX_TOKEN_IDS", 4)
        assert len((await model.Tokenize(model_pb2.TokenizeRequest(text="qxzj"))).token_ids) == 4
        assert await field_of(model.Tokenize(model_pb2.TokenizeRequest(text="qxzjw"))) == "text"


async def test_without_a_tokenizer_there_is_nothing_to_ask(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        pass
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "has_tokenizer": False}))
    settings = {"engine_options": {"tokenizer_path": str(tmp_path / "model")}}
    async with running(tmp_path / "other", **settings) as up:
        model = stub(up)
        assert await field_of(model.Tokenize(model_pb2.TokenizeRequest(text="a"))) == "text"
        asked = model_pb2.DetokenizeRequest(token_ids=[5])
        assert await field_of(model.Detokenize(asked)) == "token_ids"
        reply = await up.generation.Generate(ask(20, new=2, logprobs=0))
        assert [entry.chosen.raw for entry in reply.logprobs] == [b"", b""]


async def test_long_texts_are_worked_on_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []

    def noted(work: Callable[P, T]) -> Callable[P, T]:
        def noting(*args: P.args, **kwargs: P.kwargs) -> T:
            places.append(threading.current_thread() is threading.main_thread())
            return work(*args, **kwargs)

        return noting

    monkeypatch.setattr(TokenTexts, "raws", noted(TokenTexts.raws))
    monkeypatch.setattr(PromptEncoder, "encode_text", noted(PromptEncoder.encode_text))
    monkeypatch.setattr(model_service.validate, "detokenize", noted(validate.detokenize))
    async with running(tmp_path) as up:
        model = stub(up)
        for text, is_inline in (("the fox", True), ("the quick brown fox " * 50_000, False)):
            asked = model_pb2.TokenizeRequest(text=text, no_special_tokens=True, with_pieces=True)
            reply = await model.Tokenize(asked)
            assert b"".join(reply.pieces).decode() == text
            back = model_pb2.DetokenizeRequest(token_ids=reply.token_ids, with_pieces=True)
            assert (await model.Detokenize(back)).text == text
            assert places == [is_inline] * 4
            places.clear()
