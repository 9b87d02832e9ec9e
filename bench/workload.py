"""The requests of a benchmark: prompts of random tokens, their lengths and their adapters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Popularity(StrEnum):
    """Distribution of requests over adapters. The four kinds with adapters are Punica's."""

    BASE = "base"  # no adapter at all
    IDENTICAL = "identical"  # the first adapter for every request
    UNIFORM = "uniform"  # a random adapter for each request
    DISTINCT = "distinct"  # in turn: N consecutive requests use N adapters
    ZIPF = "zipf"  # the k-th adapter with probability proportional to 1 / k^alpha


@dataclass(frozen=True, slots=True)
class Span:
    """An integer between `low` and `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Parses "64" (always 64) or "16-128" (any number between). Raises ValueError."""
        first, dash, last = text.partition("-")
        span = cls(int(first), int(last) if dash else int(first))
        if span.low < 1 or span.high < span.low:
            raise ValueError(f"{text!r} is not a range of positive numbers")
        return span

    def pick(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Workload:
    """A reproducible list of requests: the same fields give the same prompts and adapters.

    Attributes:
        adapters: the registered names to choose from, most popular first; unused for BASE.
        prompt_tokens, output_tokens: lengths in tokens. Every request produces exactly the length
            drawn for it: the end-of-sequence token is ignored.
        shared_prefix: number of tokens with which every prompt begins, the same ones whatever the
            seed; they count towards `prompt_tokens`.
        token_ids: range of the random token ids of the prompts.
    """

    popularity: Popularity
    adapters: tuple[str, ...]
    requests: int
    prompt_tokens: Span
    output_tokens: Span
    token_ids: Span
    zipf_alpha: float = 1.0
    seed: int = 0
    shared_prefix: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send. `adapter` is "" for the base."""

    adapter: str
    token_ids: tuple[int, ...]
    output_tokens: int


def plan(workload: Workload) -> list[Job]:
    """Returns the requests of the workload in the order in which they are sent.

    Raises ValueError if the popularity needs adapters and there are none.
    """
    rng = random.Random(workload.seed)
    names = _adapters(workload, rng)
    shared = random.Random(0)
    prefix = tuple(workload.token_ids.pick(shared) for _ in range(workload.shared_prefix))
    jobs = []
    for name in names:
        length = workload.prompt_tokens.pick(rng)
        own = max(0, length - len(prefix))
        prompt = (*prefix[:length], *(workload.token_ids.pick(rng) for _ in range(own)))
        jobs.append(Job(name, prompt, workload.output_tokens.pick(rng)))
    return jobs


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds from the start: a Poisson process of `rate` requests per second."""
    rng = random.Random(seed)
    at = 0.0
    times = []
    for _ in range(count):
        at += rng.expovariate(rate)
        times.append(at)
    return times


def _adapters(workload: Workload, rng: random.Random) -> Sequence[str]:
    names, count = workload.adapters, workload.requests
    if workload.popularity is Popularity.BASE:
        return [""] * count
    if not names:
        raise ValueError(f"popularity {workload.popularity.value!r} needs the names of adapters")
    if workload.popularity is Popularity.IDENTICAL:
        return [names[0]] * count
    if workload.popularity is Popularity.DISTINCT:
        return [names[i % len(names)] for i in range(count)]
    if workload.popularity is Popularity.UNIFORM:
        return rng.choices(names, k=count)
    weights = [(k + 1) ** -workload.zipf_alpha for k in range(len(names))]
    return rng.choices(names, weights, k=count)
