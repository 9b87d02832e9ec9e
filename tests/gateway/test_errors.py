"""A failure has OpenAI's shape, and the status and headers on which its clients act."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest
import pytest_asyncio
from client.fake_server import FakeServer, failure
from gateway.harness import Web, error_of, events_of, web
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from loraplex.v1 import model_pb2
from loraplex_server.rpc.calls.errors import TABLE

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 5}

MAPPED = {
    "FIELD_INVALID": 400, "PROMPT_TOO_LONG": 400, "REQUEST_MALFORMED": 400,
    "ADAPTER_NOT_MIXABLE": 400, "CREDENTIALS_MISSING": 401, "CREDENTIALS_INVALID": 401,
    "PERMISSION_DENIED": 403, "ADAPTER_NOT_FOUND": 404, "QUOTA_EXCEEDED": 429,
    "OVERLOADED": 503, "DRAINING": 503, "ENGINE_RESTARTED": 503, "STORE_UNAVAILABLE": 503,
    "DEADLINE_UNMEETABLE": 503, "DEADLINE_EXCEEDED": 504, "ADAPTER_UNLOADED": 409,
    "ADAPTER_CONFLICT": 409, "NON_FINITE_LOGITS": 500, "ENGINE_FAULT": 500,
    "ADAPTER_CORRUPT": 500, "ADAPTER_INVALID": 400, "ADAPTER_UNSUPPORTED": 400,
    "BASE_MODEL_MISMATCH": 400, "RANK_TOO_LARGE": 400, "ADAPTER_TOO_LARGE": 400,
    "STORE_FULL": 507, "PIN_BUDGET": 409, "MERGE_BUDGET": 409,
}  # fmt: skip
"""Statuses of the reasons that a client of HTTP is most likely to meet."""

NO_RETRY = (("grpc-retry-pushback-ms", "-1"),)
"""With this trailer the gateway's client of gRPC does not try again by itself."""

FINAL = {"NON_FINITE_LOGITS", "ENGINE_FAULT", "ADAPTER_CORRUPT", "DEADLINE_EXCEEDED",
         "ADAPTER_CONFLICT", "STORE_FULL", "PIN_BUDGET", "MERGE_BUDGET"}  # fmt: skip
"""Reasons after which another attempt cannot help, although clients repeat such statuses."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fake() -> AsyncIterator[tuple[FakeServer, Web]]:
    server = FakeServer(model=model_pb2.Model(name="fake", max_context=64))
    server.start()
    try:
        async with web(server.target, compared=False) as found:
            await found.ok(PATH, BODY)  # so that the base is known
            yield server, found
    finally:
        server.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", [reason.name for reason in TABLE])
async def test_every_reason_of_the_server_is_a_typed_error(
    fake: tuple[FakeServer, Web], reason: str, stream: bool
) -> None:
    server, found = fake
    row = next(row for known, row in TABLE.items() if known.name == reason)
    details = []
    if row.retry_seconds:
        delay = duration_pb2.Duration(seconds=2, nanos=500_000_000)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    await found.ok(PATH, BODY)  # so that the base need not be asked for
    refusal = replace(failure(row.code, reason, *details), trailers=NO_RETRY)
    server.failures = [refusal]
    answer = await found.post(PATH, {**BODY, "stream": stream})
    server.failures = []
    error = error_of(answer)
    assert 400 <= answer.status_code < 600
    assert answer.status_code == MAPPED.get(reason, answer.status_code)
    assert "secret" not in answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("x-should-retry") == ("false" if reason in FINAL else None) or (
        reason not in MAPPED
    )
    if row.retry_seconds:
        assert answer.headers["retry-after"] == "3"
        assert answer.headers["retry-after-ms"] == "2500"
    if answer.status_code == 503:
        assert float(answer.headers["retry-after"]) > 0
    codes = {
        "ADAPTER_NOT_FOUND": "model_not_found",
        "PROMPT_TOO_LONG": "context_length_exceeded",
        "QUOTA_EXCEEDED": "rate_limit_exceeded",
        "CREDENTIALS_INVALID": "invalid_api_key",
        "CREDENTIALS_MISSING": "invalid_api_key",
    }
    assert error["code"] == codes.get(reason, reason.lower())
    if reason == "ADAPTER_NOT_FOUND":
        assert error["message"] == "The model `fake` does not exist."
        assert error["param"] == "model"


async def test_the_field_at_fault_is_named_as_in_the_request(
    fake: tuple[FakeServer, Web],
) -> None:
    server, found = fake
    violation = error_details_pb2.BadRequest.FieldViolation(
        field="stop.strings[1]", description="must be 1 to 64 bytes"
    )
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    await found.ok(PATH, BODY)
    server.failures = [failure(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", bad)]
    error = await found.refused(PATH, BODY, 400)
    assert error["param"] == "stop[1]"
    assert error["message"] == "stop[1]: must be 1 to 64 bytes"


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    fake: tuple[FakeServer, Web],
) -> None:
    server, found = fake
    server.break_after = 2
    try:
        answer = await found.post(PATH, {**BODY, "stream": True})
    finally:
        server.break_after = None
    assert answer.status_code == 200
    *parts, last = events_of(answer.text)
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert last["error"]["type"] == "service_unavailable_error"


async def test_a_stream_that_is_cut_short_is_an_error(fake: tuple[FakeServer, Web]) -> None:
    server, found = fake
    server.omit_finished = True
    try:
        answer = await found.post(PATH, {**BODY, "stream": True})
    finally:
        server.omit_finished = False
    assert events_of(answer.text)[-1]["error"]["code"] == "stream_incomplete"


async def test_a_message_larger_than_the_server_takes_is_413(
    fake: tuple[FakeServer, Web],
) -> None:
    _, found = fake
    talk = [{"role": "user", "content": "x" * (5 << 20)}]
    error = await found.refused(PATH, {**BODY, "messages": talk}, 413)
    assert error["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "Application/JSON; charset=utf-8"}, 200),
        ({"content-type": "application/vnd.api+json"}, 200),
    ],
)
async def test_a_body_must_say_that_it_is_json(
    fake: tuple[FakeServer, Web], headers: dict[str, str], status: int
) -> None:
    answer = await fake[1].http.post(PATH, content=json.dumps(BODY), headers=headers)
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Basic dXNlcjpwYXNz", 401),
        ("Bearer two words", 401),
        ("Bearer clé", 401),
        ("Bearer " + "x" * 9000, 401),
        ("lpx_key", 401),
        ("Bearer", 200),
        ("Bearer EMPTY", 200),
        ("bearer sk-anything", 200),
    ],
)
async def test_a_credential_is_a_bearers_key(
    fake: tuple[FakeServer, Web], given: str, status: int
) -> None:
    headers = {"authorization": given.encode()}
    answer = await fake[1].http.post(PATH, json=BODY, headers=headers)
    assert answer.status_code == status, answer.text
    if status == 401:
        assert error_of(answer)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert given.removeprefix("Bearer ") not in answer.text


async def test_the_key_and_the_trace_are_passed_on_as_they_are(
    fake: tuple[FakeServer, Web],
) -> None:
    server, found = fake
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await found.ok(PATH, BODY, key="lpx_caller", traceparent=trace, cookie="no=thing")
    sent = server.calls[-1].metadata
    assert sent["authorization"] == "Bearer lpx_caller"
    assert sent["traceparent"] == trace
    assert "cookie" not in sent
    await found.ok(PATH, BODY)
    assert "authorization" not in server.calls[-1].metadata


async def test_keys_do_not_leave_the_machine_unencrypted() -> None:
    async with web("192.0.2.1:50051") as found:
        error = await found.refused(PATH, BODY, 500, key="lpx_caller")
    assert error["code"] == "keys_not_sent"


async def test_the_request_id_is_the_callers_or_a_new_one(fake: tuple[FakeServer, Web]) -> None:
    server, found = fake
    answer = await found.post(PATH, BODY, **{"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "chatcmpl-mine-1"
    assert server.calls[-1].request.request_id == "mine-1"
    answer = await found.post(PATH, {**BODY, "request_id": "two"}, **{"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "two"
    for bad in ("x" * 129, "é"):
        answer = await found.http.post(PATH, json=BODY, headers={"x-request-id": bad.encode()})
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == server.calls[-1].request.request_id
        assert len(answer.headers["x-request-id"]) == 32


async def test_paths_and_methods_that_are_not_there_are_errors_of_the_same_shape(
    fake: tuple[FakeServer, Web],
) -> None:
    _, found = fake
    answer = await found.get("/v1/nothing")
    assert answer.status_code == 404
    assert error_of(answer)["type"] == "not_found_error"
    answer = await found.http.get(PATH)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    error_of(answer)


async def test_health_follows_the_server() -> None:
    server = FakeServer(model=model_pb2.Model(name="fake"))
    server.start()
    async with web(server.target) as found:
        for path in ("/health", "/ping"):
            answer = await found.get(path)
            assert (answer.status_code, answer.content) == (200, b"")
        assert (await found.http.post("/ping")).status_code == 200
        server.serving = 2  # NOT_SERVING
        assert (await found.get("/health")).status_code == 503
        server.stop()
        answer = await found.get("/health")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        answer = await found.post(PATH, BODY)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
