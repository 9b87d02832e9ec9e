"""The server's side of a comparison: named cases, each measured a few times on fresh prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import load
import report
from loraplex import Client
from workload import Popularity, Span, Workload, plan


class BenchmarkError(Exception):
    """A measurement that means nothing, because requests failed."""


@dataclass(frozen=True, slots=True)
class Case:
    """`rows` requests sent at once, over adapters as `popularity` says."""

    name: str
    popularity: Popularity
    rows: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every prompt and of every answer."""

    prompt: int
    output: int


def register(address: str, directories: Sequence[Path]) -> tuple[str, ...]:
    """Registers and loads adapter directories, by their folders' names, which it returns."""
    with Client(address) as client:
        for directory in directories:
            client.register_adapter(directory.name, directory.name, load=True)
    return tuple(directory.name for directory in directories)


def measure(
    address: str, case: Case, names: tuple[str, ...], lengths: Lengths, repeats: int, seed: int
) -> load.Measurement:
    """The run with the median throughput, after one that is not counted.

    No two runs share a prompt, so nothing is found in a prefix cache. Raises BenchmarkError.
    """
    runs = []
    for i in range(repeats + 1):
        workload = Workload(
            popularity=case.popularity,
            adapters=names,
            requests=case.rows,
            prompt_tokens=Span(lengths.prompt, lengths.prompt),
            output_tokens=Span(lengths.output, lengths.output),
            token_ids=Span(256, 49_000),
            seed=1000 * seed + i,
        )
        answers = asyncio.run(load.run(address, plan(workload), load.Pace(case.rows)))
        runs.append(load.measure(answers))
        if runs[-1].errors:
            raise BenchmarkError(f"{case.name}: {runs[-1].reasons}")
    counted = sorted(runs[1:], key=lambda run: run.output_tok_s)
    return counted[len(counted) // 2]


def row(name: str, m: load.Measurement) -> list[object]:
    """A line of the table whose head is HEAD."""
    return [name, m.output_tok_s, m.ttft_p50_ms, m.ttft_p99_ms, m.itl_p50_ms, m.itl_p99_ms]


HEAD = ("case", "output tok/s", "ttft p50 ms", "ttft p99 ms", "itl p50 ms", "itl p99 ms")


def show(title: str, rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}")
    print(report.table(HEAD, rows), flush=True)
