"""Texts and tokens over HTTP are the server's, in both directions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from gateway.harness import BASE, Web, gateway
from loraplex import AsyncClient
from rpc.harness import Running

pytestmark = pytest.mark.asyncio(loop_scope="module")

TALK = [{"role": "user", "content": "hi"}]
TEXTS = ["the quick brown fox", "déjà vu 😀 日本語", " ", "\n\t", "</s>", "a" * 5000]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Running, Web]]:
    async with gateway(tmp_path_factory.mktemp("tokens")) as (up, web):
        await up.register("one", 1)
        yield up, web


@pytest.mark.parametrize("text", TEXTS)
async def test_a_text_becomes_tokens_and_comes_back(both: tuple[Running, Web], text: str) -> None:
    up, web = both
    async with AsyncClient(str(up.server.address), key="") as client:
        for special in (True, False):
            wanted = list((await client.tokenize(text, special_tokens=special)).token_ids)
            found = await web.ok(
                "/tokenize", {"prompt": text, "add_special_tokens": special, "model": BASE}
            )
            assert found == {"count": len(wanted), "max_model_len": 256, "tokens": wanted}
    assert (await web.ok("/detokenize", {"tokens": wanted}))["prompt"] == text


async def test_the_text_of_each_token_is_shown_on_request(both: tuple[Running, Web]) -> None:
    _, web = both
    found = await web.ok("/tokenize", {"prompt": "the quick fox", "return_token_strs": True})
    assert "".join(found["token_strs"]) == "the quick fox"
    assert len(found["token_strs"]) == found["count"]


async def test_a_conversation_becomes_the_tokens_of_its_prompt(both: tuple[Running, Web]) -> None:
    _, web = both
    for model in (BASE, "one"):
        wanted = await web.ok("/v1/chat/completions/render", {"model": model, "messages": TALK})
        found = await web.ok("/tokenize", {"model": model, "messages": TALK})
        assert found["tokens"] == wanted["token_ids"]


async def test_special_tokens_are_left_out_on_request(both: tuple[Running, Web]) -> None:
    _, web = both
    tokens = (await web.ok("/tokenize", {"prompt": "the fox"}))["tokens"]
    body = {"tokens": [*tokens, 1]}
    assert (await web.ok("/detokenize", body))["prompt"] == "the fox</s>"
    assert (await web.ok("/detokenize", {**body, "skip_special_tokens": True}))["prompt"] == (
        "the fox"
    )


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "no/body"}, 404, "model"),
        ("/tokenize", {"messages": TALK, "model": "nobody"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 2**32]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [399, 400]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": "1"}, 400, "tokens"),
    ],
)
async def test_what_is_wrong_is_named(
    both: tuple[Running, Web], path: str, body: Any, status: int, param: str
) -> None:
    error = await both[1].refused(path, body, status)
    assert error["param"] == param


async def test_nothing_becomes_nothing(both: tuple[Running, Web]) -> None:
    _, web = both
    assert (await web.ok("/tokenize", {"prompt": ""}))["tokens"] == []
    assert (await web.ok("/detokenize", {"tokens": []}))["prompt"] == ""


async def test_the_tokenizer_is_described(both: tuple[Running, Web]) -> None:
    _, web = both
    found = (await web.get("/tokenizer_info")).json()
    assert found["eos_token"] == "</s>"
    assert found["bos_token"] is None
    assert found["model_max_length"] == 256
    assert found["vocab_size"] == 400
    assert "{{ m.role }}" in found["chat_template"]
