"""OpenAI's own client uses the gateway unchanged."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import openai
import pytest
import pytest_asyncio
from gateway.harness import BASE, gateway
from rpc.harness import Running

pytestmark = pytest.mark.asyncio(loop_scope="module")

TALK: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "the fox"}]


@dataclass
class Api:
    """A server and OpenAI's client of its gateway."""

    up: Running
    client: openai.AsyncOpenAI


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with gateway(tmp_path_factory.mktemp("openai")) as (up, web):
        await up.register("one", 1)
        async with openai.AsyncOpenAI(base_url=f"{web.url}/v1", api_key="none") as client:
            yield Api(up, client)


async def test_models_are_listed(api: Api) -> None:
    found = [model.id async for model in await api.client.models.list()]
    assert found == [BASE, "one"]
    assert (await api.client.models.retrieve("one")).id == "one"


async def test_a_chat_is_answered_whole_and_in_parts(api: Api) -> None:
    whole = await api.client.chat.completions.create(
        model="one", messages=TALK, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == 8
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    text, usage = "", None
    async for chunk in await api.client.chat.completions.create(
        model="one",
        messages=TALK,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


async def test_the_clients_own_stream_helper_reads_the_events(api: Api) -> None:
    asked = {"model": BASE, "messages": TALK, "temperature": 0}
    whole = await api.client.chat.completions.create(**asked, max_tokens=5)  # type: ignore[call-overload]
    text = whole.choices[0].message.content
    stop = text[3]
    async with api.client.chat.completions.stream(**asked, max_tokens=50, stop=[stop]) as stream:  # type: ignore[arg-type]
        seen = [each.delta async for each in stream if each.type == "content.delta"]
        final = await stream.get_final_completion()
    assert "".join(seen) == final.choices[0].message.content == text[: text.index(stop)]
    assert final.choices[0].finish_reason == "stop"


async def test_a_text_is_continued(api: Api) -> None:
    found = await api.client.completions.create(
        model=BASE, prompt=["the quick", "brown"], max_tokens=3, echo=True, logprobs=1, n=2, seed=1
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text.startswith("the quick")
    assert found.choices[2].logprobs is not None
    assert (found.choices[2].logprobs.token_logprobs or [0])[0] is None


async def test_extra_fields_and_headers_are_reached(api: Api) -> None:
    reply = await api.client.chat.completions.with_raw_response.create(
        model=BASE,
        messages=TALK,
        max_tokens=2,
        extra_body={"top_k": 1, "loraplex": {"mix": [{"adapter": "one", "weight": 0.5}]}},
        extra_headers={"x-request-id": "mine"},
    )
    assert reply.headers["x-loraplex-adapter"].endswith(";weight=0.5")
    assert reply.parse()._request_id == "mine"  # type: ignore[attr-defined]


async def test_errors_have_the_clients_types(api: Api) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await api.client.chat.completions.create(model="nobody", messages=TALK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await api.client.chat.completions.create(model=BASE, messages=TALK, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        await api.client.completions.create(model=BASE, prompt="the fox " * 500)
    assert long.value.code == "context_length_exceeded"
