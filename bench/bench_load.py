"""Long Zipf traffic with ordinary sampling: at capacity, 0.8 times that, and 0.5 to 5 times.

    python bench/bench_load.py --duration 1800          (make bench-load DURATION=1800)

Starts its own server with the default model and 64 adapters of rank 16, and stops it. Phases:

- capacity: a closed loop of 64 requests; its output tokens per second are the capacity;
- steady: an open loop of 0.8 times the capacity for `--duration` seconds;
- ladder: open loops of 0.5, 1, 2, 3 and 5 times the capacity, with a deadline on each request;
- recovery: half the capacity again, from the moment at which the last of those sends no more.

Every prompt is different, and answers have different lengths. The last line of output is one JSON
object: failed requests (of the ladder, those that were neither refused nor late), the 99th
percentile of gaps between tokens over their median and the slope of the memory of the server's
processes, both in the steady phase; tokens of complete answers at each rung over the capacity,
percentiles of the time until a refusal at twice the capacity, and the seconds after the
surge until first tokens came as soon as at half the capacity before it.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import base
import measure
import open_loop
import psutil
import random_adapters
import report
from load import percentile
from loraplex import LoraplexError
from open_loop import Traffic
from served import Server, ServerError, exit_on_sigterm
from workload import Job, Popularity, Span, Workload

CONCURRENCY = 64
"""Requests in flight of the closed loop: as many as the server runs at once."""
STEADY_DEADLINE_S = 120.0
RUNGS = (0.5, 1.0, 2.0, 3.0, 5.0)
"""Rates of the ladder, in capacities. The first is the rate of the recovery, too."""


class Memory(threading.Thread):
    """Samples the resident memory of processes once a second, from their start to `stop`."""

    def __init__(self, pids: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._processes = [psutil.Process(pid) for pid in pids]
        self._stopped = threading.Event()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._stopped.wait(1.0):
            try:
                used = sum(process.memory_info().rss for process in self._processes)
            except psutil.NoSuchProcess:
                return
            self.samples.append((time.perf_counter() / 60, used / 1e6))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopped.set()
        self.join()

    @property
    def slope_mb_per_min(self) -> float:
        """Of the line through all but the first fifth of the samples, in which caches fill."""
        return slope(self.samples[len(self.samples) // 5 :])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the line of least squares; nan for fewer than two points."""
    if len(points) < 2:
        return float("nan")
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    across = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / across


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    directory = base.ensure(cache=args.cache)
    directories = random_adapters.write(directory, args.work / "load-adapters", args.adapters, 16)
    store = args.work / "load-store"
    shutil.rmtree(store, ignore_errors=True)
    settings = {
        "cache": args.cache,
        "store": store,
        "import_root": directories[0].parent,
        "device": "cpu",
        "dtype": args.dtype,
    }
    try:
        with Server(settings, args.work / "load-server.log") as server:
            names = measure.register(server.address, directories)
            result = asyncio.run(phases(args, server, names))
    except (ServerError, LoraplexError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.json_line(result))
    return 1 if result["errors"] else 0


async def phases(
    args: argparse.Namespace, server: Server, names: tuple[str, ...]
) -> dict[str, object]:
    """Runs the three phases. Returns the figures."""
    workload = Workload(
        popularity=Popularity.ZIPF,
        adapters=names,
        requests=1,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        token_ids=Span(256, 49_000),
        seed=args.seed,
    )
    jobs = open_loop.endless(workload)
    short = min(60, max(12, args.duration // 10))
    closed = await open_loop.closed(server.address, jobs, CONCURRENCY, short)
    capacity = closed.rate(short // 4, short)
    show("capacity", closed, capacity)
    rate = capacity / ((args.output_tokens.low + args.output_tokens.high) / 2)
    with Memory(server_pids(server)) as memory:
        steady = await open_loop.opened(
            server.address, jobs, 0.8 * rate, args.duration, STEADY_DEADLINE_S, args.seed
        )
    ramp = min(30, args.duration // 4)
    show("steady", steady, steady.rate(ramp, args.duration))
    ladder = Ladder(server.address, jobs, rate, min(60, max(16, args.duration // 5)))
    await ladder.climb(args.deadline, args.seed + 1)
    median = percentile(steady.gaps_s, 50)
    return {
        "errors": failed(closed) + failed(steady) + ladder.errors,
        "itl_p99_over_median": percentile(steady.gaps_s, 99) / median,
        "rss_slope_mb_per_min": memory.slope_mb_per_min,
        "goodput_at_2x": ladder.goodput(2.0) / capacity,
        "refusal_p50_ms": 1e3 * percentile(ladder.rungs[2.0].refusals_s, 50),
        "refusal_p90_ms": 1e3 * percentile(ladder.rungs[2.0].refusals_s, 90),
        "refusal_p99_ms": 1e3 * percentile(ladder.rungs[2.0].refusals_s, 99),
        "goodput": {f"{rung:g}x": ladder.goodput(rung) / capacity for rung in RUNGS},
        "recovery_s": ladder.recovery_s,
        "capacity_tok_s": capacity,
        "itl_median_ms": 1e3 * median,
        "steady_requests": steady.finished,
        "refused": sum(len(rung.refusals_s) for rung in ladder.rungs.values()),
        "late": sum(rung.late for rung in ladder.rungs.values()),
        "duration_s": args.duration,
    }


class Ladder:
    """Open loops at more and more times the capacity, and half of it at once after the last.

    Attributes:
        rungs: what was received at each of `RUNGS`.
        after: what was received after the last rung.
    """

    def __init__(self, target: str, jobs: Iterator[Job], rate: float, seconds: int) -> None:
        """`rate` is the capacity in requests per second; each rung lasts `seconds`."""
        self._target, self._jobs, self._rate, self._seconds = target, jobs, rate, seconds
        self.rungs: dict[float, Traffic] = {}
        self.after = Traffic(0.0)

    async def climb(self, deadline_s: float, seed: int) -> None:
        for number, rung in enumerate(RUNGS[:-1]):
            self.rungs[rung] = await self._send(rung, deadline_s, seed + number)
            show(f"{rung:g} x", self.rungs[rung], self.goodput(rung))
        last = RUNGS[-1]
        surge = asyncio.create_task(self._send(last, deadline_s, seed + len(RUNGS)))
        await asyncio.sleep(self._seconds)
        self.after = await self._send(RUNGS[0], deadline_s, seed + len(RUNGS) + 1)
        self.rungs[last] = await surge
        show(f"{last:g} x", self.rungs[last], self.goodput(last))
        show("recovery", self.after, self.after.rate(self._seconds // 2, self._seconds))

    async def _send(self, rung: float, deadline_s: float, seed: int) -> Traffic:
        rate = rung * self._rate
        return await open_loop.opened(
            self._target, self._jobs, rate, self._seconds, deadline_s, seed
        )

    def goodput(self, rung: float) -> float:
        """Output tokens per second of complete answers, without the rung's first quarter."""
        return self.rungs[rung].rate(self._seconds // 4, self._seconds)

    @property
    def errors(self) -> int:
        """Requests that failed otherwise than by a refusal or a deadline."""
        return sum(sum(each.errors.values()) for each in (*self.rungs.values(), self.after))

    @property
    def recovery_s(self) -> float:
        """Seconds after the surge until first tokens came as soon as at half the capacity before.

        As soon: no later than the slowest of that rung.
        """
        return self.after.recovered(max(first for _, first in self.rungs[RUNGS[0]].waits))


def failed(traffic: Traffic) -> int:
    """Requests without a complete answer, for whatever reason."""
    return sum(traffic.errors.values()) + len(traffic.refusals_s) + traffic.late


def show(name: str, traffic: Traffic, tok_s: float) -> None:
    """Prints the figures of a phase."""
    gaps, first = traffic.gaps_s, traffic.first_s
    print(
        f"{name}: {traffic.finished} answers, {tok_s:.0f} tok/s; between tokens "
        f"{1e3 * percentile(gaps, 50):.1f} ms, p99 {1e3 * percentile(gaps, 99):.1f}; first token "
        f"{1e3 * percentile(first, 50):.0f} ms, p99 {1e3 * percentile(first, 99):.0f}; "
        f"{len(traffic.refusals_s)} refused, {traffic.late} late, errors {dict(traffic.errors)}",
        flush=True,
    )


def server_pids(server: Server) -> list[int]:
    """Process ids of the front process and its children."""
    process = psutil.Process(server.pid)
    return [process.pid, *(child.pid for child in process.children(recursive=True))]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Put long Zipf traffic on a server of the default model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--duration", type=_seconds, default=1800, help="seconds of the steady phase")
    add("--deadline", type=float, default=30.0, help="seconds for a request of the ladder")
    add("--adapters", type=int, default=64, help="registered adapters")
    add("--prompt-tokens", type=Span.parse, default=Span(32, 256), help="N or LOW-HIGH")
    add("--output-tokens", type=Span.parse, default=Span(16, 128), help="N or LOW-HIGH")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add("--work", type=Path, default=Path("var/bench"))
    add("--seed", type=int, default=1)
    return parser.parse_args(argv)


def _seconds(text: str) -> int:
    value = int(text)
    if value < 4:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())
