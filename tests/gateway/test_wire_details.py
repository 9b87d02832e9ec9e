"""What is wrong with a request is said in the words of that request, whatever it is made of."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from gateway.harness import BASE, Web, error_of, gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")

TALK = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": BASE, "messages": TALK, "max_tokens": 3},
    "/v1/completions": {"model": BASE, "prompt": "the", "max_tokens": 3},
    "/v1/responses": {"model": BASE, "input": "hi", "max_output_tokens": 3},
    "/v1/embeddings": {"model": BASE, "input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
    "/v1/load_lora_adapter": {"lora_name": "new", "lora_path": "somewhere"},
    "/v1/unload_lora_adapter": {"lora_name": "one"},
}
MANY = "9" * 5000
"""More digits than Python reads as a number."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Web]:
    async with gateway(tmp_path_factory.mktemp("site"), training=True) as (up, web):
        await up.register("one", 1)
        yield web


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT, {"logit_bias": {MANY: 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"05": 1, "5": 2}}, "logit_bias"),
        (CHAT, {"guided_choice": []}, "guided_choice"),
        (CHAT, {"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]"),
        (CHAT, {"json_schema": "{"}, "json_schema"),
        (CHAT, {"guided_json": "{"}, "guided_json"),
        (CHAT, {"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        (
            CHAT,
            {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
            "response_format.json_schema.x",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
        (
            CHAT,
            {"messages": [*TALK, {"role": "tool", "content": "x", "tool_call_id": 5}]},
            "messages[1].tool_call_id",
        ),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"function_call": {"name": "f"}}, "function_call"),
        ("/v1/completions", {"prompt": ["the", ""]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [[5], [70000]]}, "prompt[1][0]"),
        ("/v1/completions", {"prompt": [5, 70000]}, "prompt[1]"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/responses", {"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ("/v1/responses", {"reasoning": {"x": 1}}, "reasoning.x"),
        ("/v1/responses", {"text": {"verbosity": "low"}}, "text.verbosity"),
        ("/v1/responses", {"text": {"format": {"type": "text", "x": 1}}}, "text.format.x"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input[1]"),
        ("/v1/embeddings", {"input": [5, 70000]}, "input[1]"),
        ("/v1/embeddings", {"input": [[5], [6, 70000]]}, "input[1][1]"),
        ("/tokenize", {"messages": TALK, "prompt": None, "tools": [5]}, "tools[0]"),
        (
            "/tokenize",
            {"messages": TALK, "prompt": None, "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/detokenize", {"tokens": [5, 70000]}, "tokens[1]"),
        ("/v1/load_lora_adapter", {"lora_name": ""}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": BASE}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "one@1"}, "lora_name"),
        ("/v1/unload_lora_adapter", {"lora_name": BASE}, "lora_name"),
    ],
)
async def test_the_field_at_fault_is_one_that_was_sent(
    site: Web, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = await site.post(path, {**BODIES[path], **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert param in answer.json()["error"]["message"] or param == "lora_name"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", *list(BODIES)[:4]])
async def test_a_model_that_does_not_exist_is_404_everywhere(site: Web, path: str) -> None:
    for model in ("none", "one@9", f"{BASE}:none", "org/none", ""):
        if path.endswith("tokenize") and not model:
            continue  # there the model may be left out
        error = await site.refused(path, {**BODIES[path], "model": model}, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    missing = {"loraplex": {"mix": [{"adapter": "one"}, {"adapter": "none"}]}}
    error = await site.refused(CHAT, {**BODIES[CHAT], **missing}, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "loraplex.mix")


async def test_an_unknown_adapter_of_other_servers_is_named_as_they_name_it(site: Web) -> None:
    answer = await site.post("/v1/unload_lora_adapter", {"lora_name": "none"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "lora_name")


async def test_old_fields_that_ask_for_nothing_are_taken(site: Web) -> None:
    for fields in (
        {"functions": []},
        {"reasoning_effort": "none"},
    ):
        assert await site.ok(CHAT, {**BODIES[CHAT], **fields})
    assert await site.ok("/v1/responses", {**BODIES["/v1/responses"],
                                           "text": {"verbosity": "medium"}})  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
async def test_a_compressed_body_is_refused_as_one(site: Web, path: str) -> None:
    data = gzip.compress(json.dumps(BODIES[path]).encode())
    for coding in ("gzip", "GZIP", "br", "identity, gzip"):
        headers = {"content-type": "application/json", "content-encoding": coding}
        answer = await site.http.post(path, content=data, headers=headers)
        assert answer.status_code == 415
        assert "content-encoding" in answer.json()["error"]["message"]
    headers = {"content-type": "application/json", "content-encoding": "identity"}
    answer = await site.http.post("/tokenize", content=b'{"prompt": "the"}', headers=headers)
    assert answer.status_code == 200


async def test_a_compressed_file_is_not_stored_as_if_it_were_plain(site: Web) -> None:
    form = b"--b\r\n\r\n--b--\r\n"
    for path in ("/v1/files", "/v1/adapters"):
        headers = {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}
        answer = await site.http.post(path, content=gzip.compress(form), headers=headers)
        assert answer.status_code == 415, answer.text


@pytest.mark.parametrize("boundary", ["b" * 500, '""', "\xff" * 80])
async def test_a_boundary_that_cannot_be_one_is_refused(site: Web, boundary: str) -> None:
    headers = {b"content-type": f"multipart/form-data; boundary={boundary}".encode("latin-1")}
    for path in ("/v1/files", "/v1/adapters"):
        answer = await site.http.post(path, content=b"--x\r\n", headers=headers)
        assert answer.status_code == 400, answer.text
        error_of(answer)


@pytest.mark.parametrize("limit", ["0", "", "x", "-1", "00000001" + "0" * 5000, "000000001999999"])
@pytest.mark.parametrize("path", ["/v1/files", "/v1/fine_tuning/jobs"])
async def test_a_limit_out_of_bounds_is_refused(site: Web, path: str, limit: str) -> None:
    answer = await site.get(f"{path}?limit={limit}")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "limit")


async def test_options_of_jobs_of_a_wrong_type_are_refused(site: Web) -> None:
    form = {"purpose": (None, "fine-tune"), "file": ("a.jsonl", b'{"prompt":"a","completion":"b"}')}
    file = (await site.http.post("/v1/files", files=form)).json()["id"]
    for options in ({"options": [1]}, {"options": 5}, {"epochs": "x"}, {"epochs": {}}, {"r": 1}):
        body = {"model": BASE, "training_file": file, "loraplex": options}
        error = await site.refused("/v1/fine_tuning/jobs", body, 400)
        assert (error["param"] or "").startswith("loraplex"), error
    body = {"model": BASE, "training_file": file, "hyperparameters": {"batch_size": 10**30}}
    error = await site.refused("/v1/fine_tuning/jobs", body, 400)
    assert error["param"] == "hyperparameters.batch_size"


async def test_an_idempotency_key_that_is_too_long_is_named(site: Web) -> None:
    form = {"purpose": (None, "fine-tune"), "file": ("a.jsonl", b"{}")}
    answer = await site.http.post("/v1/files", files=form, headers={"idempotency-key": "x" * 200})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "idempotency-key")


@pytest.mark.parametrize("stream", [True, False])
async def test_an_older_client_gets_no_chunks(site: Web, stream: bool) -> None:
    """HTTP/1.0 has none: the answer ends with its connection."""
    body = json.dumps({**BODIES[CHAT], "stream": stream}).encode()
    reader, writer = await asyncio.open_connection(*site.url.removeprefix("http://").split(":"))
    head = "POST /v1/chat/completions HTTP/1.0\r\nconnection: keep-alive\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    headers, _, content = answer.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in headers.lower()
    if stream:
        assert content.startswith(b"data: {")
        assert content.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(content)["object"] == "chat.completion"


async def test_a_browser_may_send_what_openais_client_sends(tmp_path: Any) -> None:
    async with gateway(tmp_path, web_cors_origins=("https://page.example",)) as (_, web):
        asked = "authorization,content-type,x-stainless-os,x-stainless-retry-count,idempotency-key"
        web.http.event_hooks = {}
        for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
            headers = {
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": asked,
            }
            answer = await web.http.options(CHAT, headers=headers)
            assert (answer.status_code == 200) is allowed
            assert ("access-control-allow-origin" in answer.headers) is allowed
            if allowed:
                given = answer.headers["access-control-allow-headers"].replace(" ", "").split(",")
                assert set(asked.split(",")) <= set(given)
