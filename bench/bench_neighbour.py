"""Measures what this server keeps of its throughput beside busy processes of others.

    python bench/bench_neighbour.py            (make bench-neighbour)

Starts its own server with the default model and 16 random rank-16 adapters of all linear layers.
In every round each case runs on the idle machine, beside one and beside two processes that compute
without end. Shares are relative to the idle run of the same round. Linux may divide processors
among sessions first (autogroup): the server has a session of its own, and so have the busy
processes together, or each of them with `--apart`.

With `--before DIR`, or the variable BEFORE, a server of the checkout DIR takes turns with this one
on the idle machine. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import base
import load
import measure
import random_adapters
import report
from loraplex import LoraplexError
from measure import BenchmarkError, Case, Lengths
from served import Server, ServerError, exit_on_sigterm
from workload import Popularity, Span, Workload, plan

CASES = tuple(
    Case(f"{popularity.value}_{rows}", popularity, rows)
    for popularity in (Popularity.BASE, Popularity.DISTINCT)
    for rows in (1, 16)
)
BUSY = """
import os
for _ in range({others}):
    if not os.fork():
        break
while True:
    pass
"""
PACKAGES = ("client", "model", "adapters", "training", "server")
SETTLE_SECONDS = 0.3
"""Seconds between the start of busy processes and the first request beside them."""

Rates = dict[tuple[str, int], list[float]]
"""Output tokens per second of every round, by case and number of busy processes."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    directories = random_adapters.write(
        base.ensure(cache=args.cache), args.work / "adapters", 16, 16
    )
    try:
        with ExitStack() as stack:
            now = Bench(stack, args, directories, "now", {})
            before = None
            if args.before is not None:
                paths = os.pathsep.join(str(args.before.resolve() / name) for name in PACKAGES)
                before = Bench(stack, args, directories, "before", {"PYTHONPATH": paths})
            for _ in range(args.rounds):
                if before is not None:
                    before.round(0)
                for count in (0, *args.busy):
                    with busy_processes([1] * count if args.apart else [count] if count else []):
                        now.round(count)
    except (ServerError, LoraplexError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(now, before, args.busy)
    return 0


class Bench:
    """A server, and what was measured of it.

    Attributes:
        rates: the throughput of every round.
    """

    def __init__(
        self,
        stack: ExitStack,
        args: argparse.Namespace,
        directories: list[Path],
        name: str,
        environment: Mapping[str, str],
    ) -> None:
        """Starts the server, which `stack` ends, and runs every case once without counting it."""
        store = args.work / f"store-{name}"
        shutil.rmtree(store, ignore_errors=True)
        settings = {
            "cache": args.cache,
            "store": store,
            "import_root": directories[0].parent,
            "dtype": args.dtype,
        }
        log = args.work / f"{name}.log"
        server = stack.enter_context(Server(settings, log, environment=environment))
        self._name = name
        self._address = server.address
        self._names = measure.register(server.address, directories)
        self._lengths = Lengths(args.prompt_tokens, args.output_tokens)
        self._seed = args.seed
        self.rates: Rates = {}
        for case in CASES:
            self._run(case)

    def round(self, neighbours: int) -> None:
        """Runs every case beside as many busy processes as the caller has started."""
        for case in CASES:
            rate = self._run(case)
            self.rates.setdefault((case.name, neighbours), []).append(rate)
            print(f"{self._name}, {neighbours} busy, {case.name}: {rate:.1f} tok/s", flush=True)

    def _run(self, case: Case) -> float:
        self._seed += 1  # no two runs share a prompt
        workload = Workload(
            popularity=case.popularity,
            adapters=self._names,
            requests=case.rows,
            prompt_tokens=Span(self._lengths.prompt, self._lengths.prompt),
            output_tokens=Span(self._lengths.output, self._lengths.output),
            token_ids=Span(256, 49_000),
            seed=self._seed,
        )
        jobs = plan(workload)
        run = load.measure(asyncio.run(load.run(self._address, jobs, load.Pace(case.rows))))
        if run.errors:
            raise BenchmarkError(f"{case.name}: {run.reasons}")
        return run.output_tok_s


@contextmanager
def busy_processes(sessions: Sequence[int]) -> Iterator[None]:
    """Runs processes that compute without end: so many in each of some new sessions."""
    leaders = []
    try:
        for count in sessions:
            command = [sys.executable, "-S", "-c", BUSY.format(others=count - 1)]
            leaders.append(subprocess.Popen(command, start_new_session=True))
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        for leader in leaders:
            os.killpg(leader.pid, signal.SIGKILL)  # the session that it leads
            leader.wait()


def shares(rates: Rates, case: str, neighbours: int) -> list[float]:
    """The throughput beside busy processes relative to the idle machine's, of every round."""
    pairs = zip(rates[case, neighbours], rates[case, 0], strict=True)
    return [beside / idle for beside, idle in pairs]


def show(now: Bench, before: Bench | None, busy: Sequence[int]) -> None:
    """Prints the table and the line for programs."""
    rows: list[list[object]] = []
    smallest: dict[int, float] = {}
    ratios = []
    for case in CASES:
        row: list[object] = [case.name, report.median(now.rates[case.name, 0])]
        for count in busy:
            found = shares(now.rates, case.name, count)
            smallest[count] = min(smallest.get(count, 1.0), report.median(found))
            row += [report.median(found), f"{min(found):.2f}-{max(found):.2f}"]
        if before is not None:
            pairs = zip(now.rates[case.name, 0], before.rates[case.name, 0], strict=True)
            ratios.append(report.median([new / old for new, old in pairs]))
        row.append(ratios[-1] if ratios else float("nan"))
        rows.append(row)
    columns = [name for count in busy for name in (f"share beside {count}", "spread")]
    head = ["case", "idle tok/s", *columns, "idle / before"]
    print(report.table(head, rows))
    result = {
        "share_one": smallest.get(1),
        "share_two": smallest.get(2),
        "idle_ratio_before": min(ratios) if ratios else None,
        "rounds": len(now.rates[CASES[0].name, 0]),
    }
    print(report.json_line(result))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure Loraplex beside busy processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    before = os.environ.get("BEFORE")
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add(
        "--work",
        type=Path,
        default=Path("var/bench/neighbour"),
        help="folder for adapters, stores and logs",
    )
    add("--rounds", type=int, default=3)
    add("--busy", type=int, nargs="*", default=[1, 2], help="numbers of busy processes")
    add("--apart", action="store_true", help="give each busy process a session of its own")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--dtype", default="bfloat16")
    add("--seed", type=int, default=1)
    add(
        "--before",
        type=Path,
        default=Path(before) if before else None,
        help="checkout whose server is compared on the idle machine (default: BEFORE)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
