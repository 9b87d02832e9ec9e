"""The cases of `bench_peers.py`: what is sent, over which adapters, and to which programs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import random_adapters
from load import GREEDY, ORDINARY, Sampling
from workload import Job, Popularity, Span, Workload, plan

from peers.face import Fleet

TOKEN_IDS = Span(256, 49_000)


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Registered adapters: `count` of them, whose ranks are those of `ranks` in turn.

    `modules` names the linear layers that they change; None selects all.
    """

    name: str
    count: int
    ranks: tuple[int, ...]
    modules: tuple[str, ...] | None = None

    def write(self, base: Path, work: Path) -> tuple[Path, ...]:
        """Makes the adapters `a0`, `a1`, ... below `work` unless they exist, and returns them."""
        ranks = [self.ranks[i % len(self.ranks)] for i in range(self.count)]
        return tuple(random_adapters.write_ranks(base, work / self.name, ranks, self.modules))

    def fleet(self, directories: tuple[Path, ...], cases: Sequence[Case]) -> Fleet:
        """A fleet of these adapters, or none, for the largest of `cases`."""
        return Fleet(
            directories,
            max(self.ranks),
            max(case.rows for case in cases),
            max(case.prompt + case.output for case in cases),
            any(case.prefix for case in cases),
        )


ONE = AdapterSet("one", 1, (16,))
SIXTEEN = AdapterSet("sixteen", 16, (16,))
ACTIVE_64 = AdapterSet("active64", 64, (16,))
MIXED = AdapterSet("mixed", 16, (8, 16, 32, 64))
THOUSAND = AdapterSet("thousand", 1000, (8,), ("q_proj", "v_proj"))
"""The thousand change two matrices of a layer, so that they fit on the disk."""


@dataclass(frozen=True, slots=True)
class Case:
    """`rows` requests at once.

    Attributes:
        prompt, output: tokens of every prompt and of every answer.
        prefix: number of tokens at the start of the prompts that all of them share.
        alone: only Loraplex is measured.
    """

    name: str
    popularity: Popularity
    rows: int
    adapters: AdapterSet = SIXTEEN
    prompt: int = 128
    output: int = 64
    prefix: int = 0
    sampling: Sampling = GREEDY
    alone: bool = False

    @property
    def is_base(self) -> bool:
        return self.popularity is Popularity.BASE

    def jobs(self, names: Sequence[str], seed: int) -> list[Job]:
        """The requests. Each case and seed has other prompts, which share the prefix alone."""
        workload = Workload(
            popularity=self.popularity,
            adapters=tuple(names),
            requests=self.rows,
            prompt_tokens=Span(self.prompt, self.prompt),
            output_tokens=Span(self.output, self.output),
            token_ids=TOKEN_IDS,
            seed=zlib.crc32(f"{self.name} {seed}".encode()),
            shared_prefix=self.prefix,
        )
        return plan(workload)


BASE, SAME, DISTINCT, ZIPF = (
    Popularity.BASE,
    Popularity.IDENTICAL,
    Popularity.DISTINCT,
    Popularity.ZIPF,
)

QUICK = (
    Case("base_1", BASE, 1),
    Case("adapter_1", SAME, 1),
    Case("base_16", BASE, 16),
    Case("distinct_16", DISTINCT, 16),
    Case("prefill_16", BASE, 16, output=1),
    Case("base_64", BASE, 64, ACTIVE_64, alone=True),
    Case("distinct_64", DISTINCT, 64, ACTIVE_64, alone=True),
)
"""The cases behind the fields of the JSON line."""

FULL = (
    *(case for case in QUICK if not case.alone),
    Case("base_4", BASE, 4),
    Case("distinct_4", DISTINCT, 4),
    Case("identical_16", SAME, 16),
    Case("zipf_16", ZIPF, 16),
    Case("base_16_sampled", BASE, 16, sampling=ORDINARY),
    Case("distinct_16_sampled", DISTINCT, 16, sampling=ORDINARY),
    Case("base_16_long", BASE, 16, prompt=1024),
    Case("distinct_16_long", DISTINCT, 16, prompt=1024),
    Case("base_64", BASE, 64, ACTIVE_64),
    Case("distinct_64", DISTINCT, 64, ACTIVE_64),
    Case("base_64_sampled", BASE, 64, ACTIVE_64, sampling=ORDINARY),
    Case("registered_1", SAME, 16, ONE),
    Case("registered_64", DISTINCT, 16, ACTIVE_64),
    Case("registered_1000", ZIPF, 16, THOUSAND),
    Case("mixed_ranks_16", DISTINCT, 16, MIXED),
    Case("base_16_prefix", BASE, 16, prompt=1024, prefix=960),
    Case("distinct_16_prefix", DISTINCT, 16, prompt=1024, prefix=960),
)


def chosen(names: Sequence[str], full: bool) -> list[Case]:
    """The cases with these names, or the quick or the full set. Raises ValueError."""
    known = {case.name: case for case in (*QUICK, *FULL)}
    if not names:
        return list(FULL if full else QUICK)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no case {', '.join(unknown)}; the cases are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def groups(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases that can be measured with the same engines, in the order of their first case.

    They have the same adapters, and either all or none has a shared prefix.
    """
    found: dict[tuple[str, bool], list[Case]] = {}
    for case in cases:
        found.setdefault((case.adapters.name, case.prefix > 0), []).append(case)
    return list(found.values())
