"""Requests of a fleet: adapters by Zipf's law, arrivals by a Poisson process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests arrive: `rate` a second, for `seconds`.

    The adapter of rank k is requested in proportion to 1 / k ** exponent. Prompts have a log-normal
    length, answers a geometric one, both in tokens.
    """

    rate: float
    seconds: float
    adapters: int
    exponent: float = 1.0
    prompt_median: float = 128.0
    prompt_most: int = 1024
    output_mean: float = 96.0
    output_most: int = 512
    seed: int = 0


@dataclass(slots=True)
class Request:
    """A request and what became of it; times are in milliseconds since the start.

    `tier` is where its adapter was: "device", "host" or "disk". `first` and `end` are the times of
    the first token and of the last one.
    """

    at: float
    adapter: int
    prompt: int
    output: int
    tier: str = ""
    first: float = 0.0
    end: float = 0.0


def requests(traffic: Traffic) -> Iterator[Request]:
    """The requests in the order of their arrival; the same for the same `traffic`."""
    random = np.random.default_rng(traffic.seed)
    count = random.poisson(traffic.rate * traffic.seconds)
    at = np.sort(random.uniform(0.0, 1e3 * traffic.seconds, count))
    weights = 1.0 / np.arange(1, traffic.adapters + 1) ** traffic.exponent
    adapters = random.choice(traffic.adapters, count, p=weights / weights.sum())
    prompts = traffic.prompt_median * np.exp(0.8 * random.standard_normal(count))
    outputs = random.geometric(1.0 / traffic.output_mean, count)
    for row in zip(
        at.tolist(),
        adapters.tolist(),
        np.clip(prompts, 16, traffic.prompt_most).astype(int).tolist(),
        np.clip(outputs, 1, traffic.output_most).tolist(),
        strict=True,
    ):
        yield Request(*row)
