"""Measures the server's side of a comparison: named cases, run several times on new prompts."""

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
    """A measurement is meaningless because requests failed."""


@dataclass(frozen=True, slots=True)
class Case:
    """`rows` requests that are sent at once, over adapters chosen by `popularity`."""

    name: str
    popularity: Popularity
    rows: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens of every prompt and of every answer."""

    prompt: int
    output: int


def register(address: str, directories: Sequence[Path]) -> tuple[str, ...]:
    """Registers and loads adapter directories under their folders' names. Returns the names."""
    with Client(address) as client:
        for directory in directories:
            client.register_adapter(directory.name, directory.name, load=True)
    return tuple(directory.name for directory in directories)


def measure(
    address: str, case: Case, names: tuple[str, ...], lengths: Lengths, repeats: int, seed: int
) -> load.Measurement:
    """Returns the run with the median throughput, after one run that is not counted.

    No two runs share a prompt, so that none can profit from another. Raises BenchmarkError.
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
    """A row of the table with the head HEAD."""
    return [name, m.output_tok_s, m.ttft_p50_ms, m.ttft_p99_ms, m.itl_p50_ms, m.itl_p99_ms]


HEAD = ("case", "output tok/s", "ttft p50 ms", "ttft p99 ms", "itl p50 ms", "itl p99 ms")


def show(title: str, rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}")
    print(report.table(HEAD, rows), flush=True)
