"""Embeddings are the server's vectors, as OpenAI's own client sees them."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

from gateway.harness import BASE, gateway
from gateway.scripted import openai_client
from loraplex import AsyncClient
from rpc.harness import make_tokenizer

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["the quick fox", "déjà vu 😀", "the quick fox"]


async def test_vectors_are_those_of_the_server(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (up, web), openai_client(web) as client:
        async with AsyncClient(str(up.server.address)) as direct:
            expected = await direct.embed(TEXTS)
            mean = await direct.embed(TEXTS, pooling="mean")
        found = await client.embeddings.create(model=BASE, input=TEXTS)
        assert [each.index for each in found.data] == [0, 1, 2]
        for one, other in zip(found.data, expected.vectors, strict=True):
            assert tuple(one.embedding) == other.values
        assert found.data[0].embedding == found.data[2].embedding != found.data[1].embedding
        assert found.usage.prompt_tokens == sum(each.tokens for each in expected.vectors)
        assert found.usage.total_tokens == found.usage.prompt_tokens
        asked = await client.embeddings.create(
            model=BASE, input=TEXTS, extra_body={"pooling": "mean"}
        )
        for one, other in zip(asked.data, mean.vectors, strict=True):
            assert tuple(one.embedding) == other.values


async def test_both_encodings_have_the_same_numbers(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (_, web):
        ask = {"model": BASE, "input": TEXTS[0]}
        (one,) = (await web.ok(EMBEDDINGS, ask))["data"]
        (other,) = (await web.ok(EMBEDDINGS, {**ask, "encoding_format": "base64"}))["data"]
        data = base64.b64decode(other["embedding"])
        assert one["embedding"] == list(struct.unpack(f"<{len(data) // 4}f", data))


async def test_texts_and_their_tokens_have_the_same_vectors(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (_, web):
        ids = make_tokenizer().encode(TEXTS[0]).ids
        alone: dict[str, Any] = await web.ok(EMBEDDINGS, {"model": BASE, "input": TEXTS[0]})
        for given in (ids, [ids], [TEXTS[0]]):
            assert await web.ok(EMBEDDINGS, {"model": BASE, "input": given}) == alone


async def test_an_adapter_computes_its_own_vectors(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (up, web):
        adapter = await up.register("a")
        base = await web.ok(EMBEDDINGS, {"model": BASE, "input": TEXTS[0]})
        answer = await web.post(EMBEDDINGS, {"model": "a", "input": TEXTS[0]})
        assert answer.json()["data"] != base["data"]
        assert answer.json()["model"] == "a"
        assert answer.headers["x-loraplex-adapter"] == f"a@1 {adapter.digest}"
        error = await web.refused(EMBEDDINGS, {"model": "b", "input": TEXTS[0]}, 404)
        assert error["code"] == "model_not_found"


async def test_dimensions_are_those_of_the_model(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (_, web):
        ask = {"model": BASE, "input": "a"}
        (one,) = (await web.ok(EMBEDDINGS, ask))["data"]
        size = len(one["embedding"])
        await web.ok(EMBEDDINGS, {**ask, "dimensions": size})
        error = await web.refused(EMBEDDINGS, {**ask, "dimensions": size - 1}, 400)
        assert error["param"] == "dimensions"


async def test_inputs_that_are_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (_, web):
        for given, param in (
            ([], "input"),
            (3, "input"),
            ({"text": "a"}, "input"),
            (["a", 1], "input[0]"),
            ([1, "a"], "input[0]"),
            ([[1], []], "input[1]"),
            ([[1], "a"], "input[1]"),
            ([True], "input[0]"),
            ([-1], "input[0]"),
            ([1.5], "input[0]"),
        ):
            error = await web.refused(EMBEDDINGS, {"model": BASE, "input": given}, 400)
            assert error["param"] == param, given
        for more in ({"encoding_format": "hex"}, {"pooling": "max"}, {"task": "query"}):
            ask = {"model": BASE, "input": "a", **more}
            error = await web.refused(EMBEDDINGS, ask, 400)
            assert error["param"] == next(iter(more))
        error = await web.refused(EMBEDDINGS, {"model": BASE, "input": [99999]}, 400)
        assert error["param"].startswith("input")
        error = await web.refused(EMBEDDINGS, {"model": BASE, "input": ["a"] * 3000}, 400)
        assert error["param"] == "input"
