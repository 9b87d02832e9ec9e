"""Sends a workload to a running server and measures the answers.

The generator shares the cores of the machine with the server, so it does as little as possible
while time is measured: it stores each message as bytes with its arrival time, and parses the
messages after the run.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from loraplex.v1 import generation_pb2 as pb
from workload import Job

METHOD = "/loraplex.v1.GenerationService/GenerateStream"
Call = grpc.aio.UnaryStreamMultiCallable[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Pace:
    """Times at which requests are sent.

    Closed loop: `concurrency` requests are always in flight. Open loop: request i is sent at
    `arrivals[i]` seconds, however many are in flight; `concurrency` is then unused. `limit_s`
    bounds the whole run: requests that have not ended by then are cancelled and count as errors.
    """

    concurrency: int
    arrivals: tuple[float, ...] | None = None
    limit_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: greedily by default, or as most clients ask (`ORDINARY`)."""

    temperature: float = 0.0
    top_p: float = 1.0


GREEDY, ORDINARY = Sampling(), Sampling(0.7, 0.95)


@dataclass(slots=True)
class Exchange:
    """A request and the raw messages of its answer. Times are seconds of `time.perf_counter()`."""

    job: Job
    sent: float = 0.0
    ended: float = 0.0
    messages: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed answer. `tokens` holds (arrival time, number of tokens) of each message with tokens.

    `error` is "" if the answer came from the requested adapter and has the requested length.
    `digest` is that of the adapter's bytes as reported by the server, "" for the base.
    """

    job: Job
    sent: float
    tokens: tuple[tuple[float, int], ...]
    token_ids: tuple[int, ...]
    error: str
    digest: str = ""

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens. A gap before k tokens counts as k gaps of a k-th."""
        found = []
        for (before, _), (at, count) in zip(self.tokens, self.tokens[1:], strict=False):
            found += [(at - before) / count] * count
        return found


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of a run. Latencies are in milliseconds, nan where nothing was measured.

    Attributes:
        output_tok_s: all tokens received over the time from the first request to the last token.
        errors: number of failed requests; `reasons` counts them by cause.
    """

    requests: int
    output_tokens: int
    seconds: float
    output_tok_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    errors: int
    reasons: dict[str, int]


Metadata = tuple[tuple[str, str], ...]


async def run(
    target: str,
    jobs: Sequence[Job],
    pace: Pace,
    sampling: Sampling = GREEDY,
    metadata: Metadata = (),
) -> list[Answer]:
    """Sends the jobs over one connection and returns their answers in the same order.

    `metadata` goes with each of them, for servers that identify their callers.
    """
    options = [("grpc.max_receive_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        call: Call = channel.unary_stream(METHOD)  # no deserialiser: messages stay bytes
        requests = [request(job, sampling) for job in jobs]
        exchanges = [Exchange(job) for job in jobs]
        end = time.perf_counter() + pace.limit_s
        if pace.arrivals is None:
            turns = iter(range(len(jobs)))

            async def worker() -> None:
                for i in turns:
                    await send(call, requests[i], exchanges[i], end, metadata)

            await asyncio.gather(*(worker() for _ in range(pace.concurrency)))
        else:
            start = time.perf_counter()

            async def arrive(i: int, at: float) -> None:
                await asyncio.sleep(start + at - time.perf_counter())
                await send(call, requests[i], exchanges[i], end, metadata)

            await asyncio.gather(*(arrive(i, at) for i, at in enumerate(pace.arrivals)))
    return [read(exchange) for exchange in exchanges]


def read(exchange: Exchange) -> Answer:
    """Parses the messages of an answer and checks that it is the one that was requested."""
    job = exchange.job
    error = exchange.error
    ids: list[int] = []
    tokens = []
    served = None
    digest = ""
    for at, message in exchange.messages:
        event = pb.GenerateStreamResponse.FromString(message)
        if event.HasField("started"):
            served = [adapter.name for adapter in event.started.adapters]
            digest = "+".join(adapter.digest for adapter in event.started.adapters)
        elif event.HasField("delta") and event.delta.token_ids:
            ids.extend(event.delta.token_ids)
            tokens.append((at, len(event.delta.token_ids)))
    if not error and served != ([job.adapter] if job.adapter else []):
        error = "WRONG_ADAPTER"
    if not error and len(ids) != job.output_tokens:
        error = "WRONG_LENGTH"
    return Answer(job, exchange.sent, tuple(tokens), tuple(ids), error, digest)


def measure(answers: Sequence[Answer]) -> Measurement:
    """Computes totals and percentiles of the answers."""
    ttft = [a.tokens[0][0] - a.sent for a in answers if a.tokens]
    gaps = [gap for answer in answers for gap in answer.gaps]
    total = sum(count for a in answers for _, count in a.tokens)
    ends = [a.tokens[-1][0] for a in answers if a.tokens]
    seconds = max(ends) - min(a.sent for a in answers if a.sent) if ends else 0.0
    reasons = Counter(a.error for a in answers if a.error)
    return Measurement(
        requests=len(answers),
        output_tokens=total,
        seconds=seconds,
        output_tok_s=total / seconds if seconds else 0.0,
        ttft_p50_ms=1e3 * percentile(ttft, 50),
        ttft_p99_ms=1e3 * percentile(ttft, 99),
        itl_p50_ms=1e3 * percentile(gaps, 50),
        itl_p99_ms=1e3 * percentile(gaps, 99),
        errors=sum(reasons.values()),
        reasons=dict(reasons),
    )


def percentile(values: Sequence[float], p: float) -> float:
    """The smallest value that at least p percent of the values do not exceed; nan for no values."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * p / 100) - 1)]


def request(job: Job, sampling: Sampling = GREEDY) -> bytes:
    """The serialised request of a job. It asks for exactly the job's number of tokens."""
    message = pb.GenerateStreamRequest(
        request=pb.GenerateRequest(
            adapter_id=job.adapter,
            token_ids=pb.TokenIds(ids=job.token_ids),
            sampling=pb.SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p),
            stop=pb.StopConditions(max_new_tokens=job.output_tokens, ignore_eos=True),
        )
    )
    return bytes(message.SerializeToString())


async def send(
    call: Call, request: bytes, exchange: Exchange, end: float, metadata: Metadata = ()
) -> None:
    """Sends one request and stores the messages of its answer until `end`, of the same clock."""
    exchange.sent = now = time.perf_counter()
    if now >= end:
        exchange.error = "OUT_OF_TIME"
        return
    try:
        async for message in call(request, timeout=end - now, metadata=metadata):
            exchange.messages.append((time.perf_counter(), message))
    except grpc.aio.AioRpcError as e:
        exchange.error = e.code().name
    exchange.ended = time.perf_counter()
