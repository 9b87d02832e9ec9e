"""Traffic without an end: requests are made while it runs, and answers are reduced as they come.

A long run has more messages than fit into memory, and parsing them later would take minutes. So
each answer is reduced to a few numbers when it ends.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import grpc
import load
from load import ORDINARY, Exchange, Sampling
from workload import Job, Span, Workload, plan

REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
"""Statuses by which a server refuses a request that it has no room for."""


@dataclass(slots=True)
class Traffic:
    """What was received.

    Attributes:
        finished: number of complete answers.
        errors: failed requests by status; refusals and missed deadlines are not among them.
        refusals_s: seconds until each refusal.
        late: number of requests whose deadline passed.
        gaps_s, first_s: seconds between tokens, and to the first token, of complete answers.
        tokens: output tokens of complete answers by the second in which they arrived, counted from
            `began`.
        waits: of every request, the seconds from `began` until it was sent, and from there to its
            first token; infinite for a request that was refused, late or failed.
    """

    began: float
    finished: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    late: int = 0
    refusals_s: array[float] = field(default_factory=lambda: array("d"))
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    first_s: array[float] = field(default_factory=lambda: array("d"))
    tokens: Counter[int] = field(default_factory=Counter)
    waits: list[tuple[float, float]] = field(default_factory=list)

    def rate(self, start: int, end: int) -> float:
        """Output tokens per second between two whole seconds since `began`."""
        return sum(self.tokens[second] for second in range(start, end)) / (end - start)

    def add(self, exchange: Exchange, deadline_s: float) -> None:
        """Counts an exchange that has ended."""
        first = self._count(exchange, deadline_s)
        self.waits.append((exchange.sent - self.began, first))

    def _count(self, exchange: Exchange, deadline_s: float) -> float:
        """Returns the seconds to the first token, infinite without a complete answer."""
        if exchange.error:
            taken = exchange.ended - exchange.sent
            early = exchange.error == "DEADLINE_EXCEEDED" and taken < 0.9 * deadline_s
            if exchange.error in REFUSALS or (early and not exchange.messages):
                self.refusals_s.append(taken)
            elif exchange.error == "DEADLINE_EXCEEDED":
                self.late += 1
            else:
                self.errors[exchange.error] += 1
            return math.inf
        answer = load.read(exchange)
        if answer.error:
            self.errors[answer.error] += 1
            return math.inf
        self.finished += 1
        first = answer.tokens[0][0] - answer.sent
        self.first_s.append(first)
        self.gaps_s.extend(answer.gaps)
        for at, count in answer.tokens:
            self.tokens[int(at - self.began)] += count
        return first

    def recovered(self, limit_s: float) -> float:
        """Seconds from `began` until every later request had its first token within `limit_s`.

        0 if all had; nan if the last request had not.
        """
        slow = [sent for sent, first in self.waits if first > limit_s]
        if not slow:
            return 0.0
        later = [sent for sent, _ in self.waits if sent > max(slow)]
        return min(later) if later else math.nan


def endless(workload: Workload) -> Iterator[Job]:
    """Requests of the workload without an end; each has a prompt of its own.

    One request is made at a time, which takes less than a millisecond.
    """
    names = plan(replace(workload, requests=10_000, prompt_tokens=Span(1, 1)))
    adapters = [job.adapter for job in names]
    rng = random.Random(workload.seed + 1)
    while True:
        for name in adapters:
            length = workload.prompt_tokens.pick(rng)
            prompt = tuple(workload.token_ids.pick(rng) for _ in range(length))
            yield Job(name, prompt, workload.output_tokens.pick(rng))


async def closed(target: str, jobs: Iterator[Job], concurrency: int, seconds: float) -> Traffic:
    """Keeps `concurrency` requests in flight for `seconds`, then waits for the last answers."""
    traffic = Traffic(time.perf_counter())
    end = traffic.began + seconds

    async def worker(call: load.Call) -> None:
        while time.perf_counter() < end:
            await _one(call, next(jobs), traffic, 120.0, ORDINARY)

    async with _channel(target) as channel:
        call: load.Call = channel.unary_stream(load.METHOD)
        await asyncio.gather(*(worker(call) for _ in range(concurrency)))
    return traffic


async def opened(
    target: str, jobs: Iterator[Job], rate: float, seconds: float, deadline_s: float, seed: int
) -> Traffic:
    """Sends `rate` requests per second, as a Poisson process, for `seconds`, however many are in
    flight. Each ends by its deadline, so the last ones end `deadline_s` later at most."""
    traffic = Traffic(time.perf_counter())
    rng = random.Random(seed)
    running: set[asyncio.Task[None]] = set()
    async with _channel(target) as channel:
        call: load.Call = channel.unary_stream(load.METHOD)
        at = 0.0
        while (at := at + rng.expovariate(rate)) < seconds:
            job = next(jobs)
            await asyncio.sleep(max(0.0, traffic.began + at - time.perf_counter()))
            task = asyncio.create_task(_one(call, job, traffic, deadline_s, ORDINARY))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    return traffic


async def _one(
    call: load.Call, job: Job, traffic: Traffic, deadline_s: float, sampling: Sampling
) -> None:
    exchange = Exchange(job)
    end = time.perf_counter() + deadline_s
    await load.send(call, load.request(job, sampling), exchange, end)
    traffic.add(exchange, deadline_s)


def _channel(target: str) -> grpc.aio.Channel:
    options = [("grpc.max_receive_message_length", 64 << 20)]
    return grpc.aio.insecure_channel(target, options=options)
