"""A deadline of any length is one that the server can wait for."""

from __future__ import annotations

import asyncio
import math
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from loraplex_server.engine.messages import Submit
from loraplex_server.engine.process.stream import OutputStream
from loraplex_server.rpc.services.admission import MAX_DEADLINE_SECONDS, admitted_deadline
from rpc.harness import Running, ask, running, until
from rpc.raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS,
    frame,
    header_block,
)

pytestmark = pytest.mark.fault("deadline-overflows")


@pytest.mark.parametrize(
    ("remaining", "seconds"),
    [
        (0.0, 0.0),
        (-1.0, 0.0),
        (30.0, 30.0),
        (MAX_DEADLINE_SECONDS, MAX_DEADLINE_SECONDS),
        (MAX_DEADLINE_SECONDS + 1, MAX_DEADLINE_SECONDS),
        (99_999_999 * 3600.0, MAX_DEADLINE_SECONDS),
        (math.inf, MAX_DEADLINE_SECONDS),
        (math.nan, MAX_DEADLINE_SECONDS),
        (-math.inf, 0.0),
    ],
)
def test_a_deadline_is_at_most_a_day_away(
    remaining: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_server.rpc.services.admission.time.monotonic", lambda: 1000.0)
    assert admitted_deadline(remaining) == 1000.0 + seconds


def test_no_deadline_stays_none() -> None:
    assert admitted_deadline(None) is None


@pytest_asyncio.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as server:
        yield server


def call(method: str, message: bytes, duration: str) -> bytes:
    """The bytes of a connection with one call, whose `grpc-timeout` no gRPC client would send."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-timeout": duration,
    }
    body = b"\0" + struct.pack(">I", len(message)) + message
    return (
        PREFACE
        + frame(SETTINGS, 0, 0)
        + frame(HEADERS, END_HEADERS, 1, header_block(fields))
        + frame(DATA, END_STREAM, 1, body)
    )


@pytest.mark.parametrize("duration", ["99999999H", "99999999M", "99999999S", "27000H"])
async def test_the_longest_timeouts_of_the_protocol_are_served(
    up: Running, duration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[float] = []
    submit = up.server.engine.submit

    def noted(message: Submit) -> OutputStream:
        assert message.deadline is not None
        sent.append(message.deadline - time.monotonic())
        return submit(message)

    monkeypatch.setattr(up.server.engine, "submit", noted)
    await up.register("cold")
    data = ask(new=5, adapter="cold").SerializeToString()
    _, writer = await asyncio.open_connection(up.server.address.host, up.server.address.port)
    writer.write(call("/loraplex.v1.GenerationService/Generate", data, duration))
    answered = {"method": "Generate", "code": "OK"}
    lost = up.server.engine
    await until(lambda: up.metric("requests_total", **answered) == 1 or lost.restarts > 0)
    writer.close()
    assert up.server.engine.restarts == 0
    assert len(sent) == 1
    assert sent[0] <= MAX_DEADLINE_SECONDS
