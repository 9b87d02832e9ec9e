"""What the benchmark asks of every compared program.

A `Peer` is a program that was found on this machine; it opens engines. An `Engine` is a running
program with a fixed set of adapters, or none. It computes nothing outside `run`: between runs its
processes are paused, so that engines which are open at the same time do not take each other's time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from load import Sampling
from workload import Job


class PeerError(Exception):
    """A compared program did not start or gave a wrong answer; the message says where to look."""


class PeerMissing(Exception):
    """A compared program is not on this machine; the message says which variable names it."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The adapters of an engine and the largest batch that it will be given.

    Attributes:
        adapters: directories in PEFT's format; empty for an engine without adapters.
        max_rank: largest rank among them.
        rows: most requests at once.
        context: most tokens of a prompt and its answer together.
        prefix_cache: whether prompts share a prefix; programs then keep prefixes if they can.
    """

    adapters: tuple[Path, ...]
    max_rank: int
    rows: int
    context: int
    prefix_cache: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer: number of new tokens, seconds to the first one, and between two of them.

    The last two are None if the program does not tell them.
    """

    tokens: int
    first_s: float | None = None
    step_s: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload: its answers, and seconds from the first request to the last token."""

    seconds: float
    answers: tuple[Timing, ...]

    @property
    def output_tok_s(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def first_ms(self) -> float:
        """Median time to the first token; nan if unknown."""
        return 1e3 * _median([a.first_s for a in self.answers if a.first_s is not None])

    @property
    def step_ms(self) -> float:
        """Median time between two tokens of a stream; nan if unknown."""
        return 1e3 * _median([a.step_s for a in self.answers if a.step_s is not None])


class Engine(Protocol):
    """A running program. `about` names its version and settings."""

    about: Mapping[str, object]

    def run(self, jobs: Sequence[Job], sampling: Sampling) -> Run:
        """Answers all jobs at once. Raises PeerError if an answer has another length."""

    def close(self) -> None:
        """Ends the program's processes. Idempotent."""


class Peer(Protocol):
    """A program on this machine.

    `most_adapters` is the largest number of adapters that the program is measured with.
    """

    name: str
    most_adapters: int

    def open(self, fleet: Fleet, log: Path) -> Engine:
        """Starts an engine in its fastest setting; it writes to `log`. Raises PeerError."""


def checked(jobs: Sequence[Job], run: Run, name: str) -> Run:
    """Returns the run if every answer has the requested length. Raises PeerError."""
    wanted, given = [job.output_tokens for job in jobs], [a.tokens for a in run.answers]
    if wanted != given:
        raise PeerError(f"{name} answered with {given} tokens in place of {wanted}")
    return run


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")
