"""Sends the requests of a workload to a gateway over HTTP, as `load` sends them over gRPC.

It does as little as possible while time is measured: bytes are stored with the time of their
arrival, and read after the run.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from workload import Job

_END = b"data: [DONE]\n\n"


@dataclass(slots=True)
class HttpExchange:
    """A request and the bytes of its answer. Times are seconds of `time.perf_counter()`."""

    job: Job
    sent: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class HttpRun:
    """What a run produced.

    Attributes:
        output_tok_s: all tokens over the time from the first request to the last byte.
        ttft_s: seconds from each request to its first event.
        events: number of events of all answers.
        errors: number of answers that are not whole.
    """

    output_tok_s: float
    ttft_s: tuple[float, ...]
    events: int
    errors: int


async def run(address: str, model: str, jobs: Sequence[Job]) -> HttpRun:
    """Sends all jobs at once, each on a connection of its own, to `/v1/completions`."""
    exchanges = [HttpExchange(job) for job in jobs]
    opened = [await _open(address) for _ in jobs]
    requests = [_request(address, model, job) for job in jobs]
    await asyncio.gather(*map(_send, opened, requests, exchanges))
    answers = [b"".join(piece for _, piece in each.pieces) for each in exchanges]
    tokens = [_tokens(answer) for answer in answers]
    ends = [each.pieces[-1][0] for each in exchanges if each.pieces]
    seconds = max(ends, default=0.0) - min(each.sent for each in exchanges)
    return HttpRun(
        output_tok_s=sum(tokens) / seconds if seconds > 0 else 0.0,
        ttft_s=tuple(each.pieces[0][0] - each.sent for each in exchanges if each.pieces),
        events=sum(answer.count(b"data: {") for answer in answers),
        errors=sum(n != each.job.output_tokens for n, each in zip(tokens, exchanges, strict=True)),
    )


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _open(address: str) -> Connection:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def _request(address: str, model: str, job: Job) -> bytes:
    body = json.dumps(
        {
            "model": job.adapter or model,
            "prompt": job.token_ids,
            "max_tokens": job.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _send(connection: Connection, request: bytes, exchange: HttpExchange) -> None:
    reader, writer = connection
    exchange.sent = time.perf_counter()
    writer.write(request)
    while data := await reader.read(1 << 16):
        exchange.pieces.append((time.perf_counter(), data))
    writer.close()


def _tokens(answer: bytes) -> int:
    """The number of tokens that an answer's last event tells; 0 for one that is not whole."""
    if _END not in answer:
        return 0
    found = answer.rpartition(b'"completion_tokens":')[2].partition(b",")[0]
    return int(found) if found.isdigit() else 0
