"""Text, tokens, log-probabilities and numbers of tokens of an answer agree, however it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from gateway.harness import BASE, Web
from gateway.scripted import MARK, saying, tokens
from rpc.harness import EOS, make_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAID = "the quick déjà vu 😀😁 brown 日本語 fox"
WORDS = tokens(SAID, ends=False)
SCRIPT = [*WORDS, EOS, *tokens(" and on", ends=False), EOS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def web(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Web]:
    engine = {"scripts": {MARK: SCRIPT}}
    async with saying(tmp_path_factory.mktemp("said"), SAID, engine=engine) as site:
        yield site


@dataclass
class Answer:
    """One answer, or a stream's joined.

    Attributes:
        entries: for each token its log-probability, and its bytes or, in completions, its text.
        offsets: where each token begins; none in chats.
    """

    text: str
    token_ids: Sequence[int]
    entries: Sequence[tuple[float, Any]]
    offsets: Sequence[int]
    generated: int
    finish: str
    stop: Any


async def ask(web: Web, path: str, stream: bool, fields: dict[str, Any]) -> Answer:
    body: dict[str, Any] = {"model": BASE, "temperature": 0, "return_token_ids": True, **fields}
    if path == CHAT:
        asked = [{"role": "user", "content": "say it"}]
        body |= {"messages": asked, "logprobs": True, "top_logprobs": 2}
    else:
        body |= {"prompt": [20, MARK], "logprobs": 2}
    if stream:
        events = await web.events(path, {**body, "stream_options": {"include_usage": True}})
        usage = events.pop()["usage"]
        choices = [choice for each in events for choice in each["choices"]]
    else:
        whole = await web.ok(path, body)
        usage, choices = whole["usage"], whole["choices"]
    (end,) = [each for each in choices if each["finish_reason"]]
    scores = [each["logprobs"] for each in choices if each["logprobs"]]
    if path == CHAT:
        said = [each.get("delta") or each.get("message") or {} for each in choices]
        text = "".join(each.get("content") or "" for each in said)
        entries = [(one["logprob"], one["bytes"]) for each in scores for one in each["content"]]
    else:
        text = "".join(each["text"] for each in choices)
        pairs = [zip(each["token_logprobs"], each["tokens"], strict=True) for each in scores]
        entries = [pair for each in pairs for pair in each]
    return Answer(
        text,
        [token for each in choices for token in each.get("token_ids", ())],
        entries,
        [offset for each in scores for offset in each.get("text_offset", ())],
        usage["completion_tokens"],
        end["finish_reason"],
        end["stop_reason"],
    )


def count_of(text: str) -> int:
    """Number of tokens after which the model has said this text."""
    return next(n for n in range(len(WORDS) + 1) if text in make_tokenizer().decode(WORDS[:n]))


HALF = count_of("vu 😀") - 1
"""Number of tokens after which a character is not complete."""

CASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "end token": ({}, "stop", None),
    "length": ({"max_tokens": 5}, "length", None),
    "length of one": ({"max_tokens": 1}, "length", None),
    "the length at the end token": ({"max_tokens": len(WORDS)}, "length", None),
    "the end token is the last that may come": ({"max_tokens": len(WORDS) + 1}, "stop", None),
    "half of a character": ({"max_tokens": HALF}, "length", None),
    "stop string": ({"stop": ["brow"]}, "stop", "brow"),
    "stop string at the beginning": ({"stop": "the"}, "stop", "the"),
    "stop string that is kept": (
        {"stop": ["row"], "include_stop_str_in_output": True}, "stop", "row",
    ),
    "stop string that never comes": ({"stop": ["foxtrot", "😀😁😂"]}, "stop", None),
    "stop token": ({"stop_token_ids": [WORDS[6]]}, "stop", WORDS[6]),
    "stop token at once": ({"stop_token_ids": [WORDS[0]]}, "stop", WORDS[0]),
    "the end token as a stop token": ({"stop_token_ids": [EOS]}, "stop", EOS),
    "past the end token": (
        {"ignore_eos": True, "max_tokens": len(SCRIPT)}, "length", None,
    ),
    "past the end token, which is shown": (
        {"ignore_eos": True, "max_tokens": len(SCRIPT), "skip_special_tokens": False},
        "length", None,
    ),
    "a stop string after a special token": (
        {"ignore_eos": True, "max_tokens": len(SCRIPT), "stop": ["</s> and"]}, "stop", "</s> and",
    ),
    "a form": (
        {"structured_outputs": {"regex": "the quick [a-z]{3}"}}, "stop", None,
    ),
    "a least number": ({"min_tokens": 4, "stop_token_ids": [WORDS[1]]}, "stop", None),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("case", CASES)
async def test_an_answer_agrees_with_itself(web: Web, case: str, path: str, stream: bool) -> None:
    fields, finish, stop = CASES[case]
    given = {"max_tokens": 60, **fields}
    found = await ask(web, path, stream, given)
    assert (found.finish, found.stop) == (finish, stop)
    assert found.generated == len(found.token_ids) == len(found.entries)
    if case not in ("a form", "a least number"):  # which make it say something else
        assert found.token_ids == SCRIPT[: found.generated]
    assert EOS not in found.token_ids or fields.get("ignore_eos")
    if stop is not None and not isinstance(stop, str):
        assert stop not in found.token_ids
    skips = fields.get("skip_special_tokens", True)
    said = make_tokenizer().decode(found.token_ids, skip_special_tokens=skips)
    if isinstance(stop, str):
        whole = make_tokenizer().decode(found.token_ids, skip_special_tokens=False)
        kept = stop if fields.get("include_stop_str_in_output") else ""
        assert whole.startswith(found.text.removesuffix(kept))
        assert stop in whole
    else:
        assert found.text == said.rstrip("\ufffd")
    if path == CHAT:
        joined = b"".join(bytes(each or ()) for _, each in found.entries)
        assert joined.decode("utf-8", "replace") == said
        return
    for (_, token), offset in zip(found.entries, found.offsets, strict=True):
        assert 0 <= offset <= len(said)
        if "\ufffd" not in token and (token != "</s>" or not skips):
            assert said[offset : offset + len(token)] == token


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_empty_answer_has_no_token(tmp_path: Path, path: str) -> None:
    async with saying(tmp_path, "") as site:
        for stream in (False, True):
            found = await ask(site, path, stream, {"max_tokens": 5})
            assert (found.text, found.token_ids, found.entries) == ("", [], [])
            assert (found.generated, found.finish, found.stop) == (0, "stop", None)
