"""Measures what it costs a server to identify its callers.

    python bench/bench_auth.py                 (make bench-auth)

Starts two servers with the default model: an open one, and one with principals, keys and an audit
log. They take turns on the same machine, in alternating order: first sixteen streams of the base at
once, then many short calls (GetModel) with 16 in flight. The shares are those of the guarded
server's rates in the open one's, the medians of all rounds. The last line of output is one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import base
import grpc
import load
import report
from loraplex import LoraplexError
from loraplex.v1 import model_pb2
from loraplex_server.access.identity.key_file import KeyFile
from measure import BenchmarkError
from served import Server, ServerError, exit_on_sigterm
from workload import Popularity, Span, Workload, plan

STREAMS = 16
GET_MODEL = "/loraplex.v1.ModelService/GetModel"
PRINCIPALS = """
[principals.bench]
roles = ["infer", "read"]
adapters = "*"
"""


class Side:
    """A server, and the rates that it reached.

    Attributes:
        streams: output tokens per second of each round.
        calls: short calls per second of each round.
    """

    def __init__(self, name: str, address: str, metadata: load.Metadata) -> None:
        self.name = name
        self._address = address
        self._metadata = metadata
        self.streams: list[float] = []
        self.calls: list[float] = []

    def round(self, args: argparse.Namespace, seed: int) -> None:
        """Measures once and keeps the rates. Raises BenchmarkError."""
        workload = Workload(
            popularity=Popularity.BASE,
            adapters=(),
            requests=STREAMS,
            prompt_tokens=Span(args.prompt_tokens, args.prompt_tokens),
            output_tokens=Span(args.output_tokens, args.output_tokens),
            token_ids=Span(256, 49_000),
            seed=seed,
        )
        pace, jobs = load.Pace(STREAMS), plan(workload)
        answers = asyncio.run(load.run(self._address, jobs, pace, metadata=self._metadata))
        run = load.measure(answers)
        if run.errors:
            raise BenchmarkError(f"{self.name}: {run.reasons}")
        self.streams.append(run.output_tok_s)
        self.calls.append(asyncio.run(self._short_calls(args.calls)))

    async def _short_calls(self, count: int) -> float:
        request = model_pb2.GetModelRequest().SerializeToString()
        turns = iter(range(count))
        async with grpc.aio.insecure_channel(self._address) as channel:
            call = channel.unary_unary(GET_MODEL)

            async def worker() -> None:
                for _ in turns:
                    await call(request, metadata=self._metadata)

            began = time.perf_counter()
            try:
                await asyncio.gather(*(worker() for _ in range(STREAMS)))
            except grpc.aio.AioRpcError as error:
                raise BenchmarkError(f"{self.name}: {error.code().name}") from error
            return count / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    base.ensure(cache=args.cache)
    try:
        with ExitStack() as stack:
            sides = [started(stack, args, guarded) for guarded in (False, True)]
            for number in range(args.rounds + 1):
                for side in sides if number % 2 else reversed(sides):
                    side.round(args, seed=number)
    except (ServerError, LoraplexError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(*sides)
    return 0


def started(stack: ExitStack, args: argparse.Namespace, guarded: bool) -> Side:
    """A server that runs until the stack is closed."""
    name = "guarded" if guarded else "open"
    folder = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "import").mkdir(parents=True)
    settings: dict[str, object] = {
        "cache": args.cache,
        "store": folder / "store",
        "import_root": folder / "import",
    }
    metadata: load.Metadata = ()
    if guarded:
        (folder / "principals.toml").write_text(PRINCIPALS)
        _, key = KeyFile(folder / "keys.json").add("bench")
        metadata = (("authorization", f"Bearer {key}"),)
        settings |= {
            "principals": folder / "principals.toml",
            "keys": folder / "keys.json",
            "audit_log": folder / "audit.jsonl",
        }
    server = stack.enter_context(Server(settings, folder / "server.log"))
    return Side(name, server.address, metadata)


def show(plain: Side, guarded: Side) -> None:
    """Prints the table and the JSON line. The first round warms the servers up and is left out."""
    rows = [
        [side.name, statistics.median(side.streams[1:]), statistics.median(side.calls[1:])]
        for side in (plain, guarded)
    ]
    print(report.table(("server", "output tok/s", "short calls/s"), rows))
    shares = {
        "share_of_open": share(guarded.streams, plain.streams),
        "short_calls_share": share(guarded.calls, plain.calls),
    }
    print(report.json_line(shares))


def share(rates: list[float], of: list[float]) -> float:
    """Median of the ratios of the rounds, without the first."""
    ratios = [rate / other for rate, other in zip(rates[1:], of[1:], strict=True)]
    return statistics.median(ratios)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--calls", type=int, default=4000, help="short calls of a round")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--cache", type=Path, default=base.CACHE)
    parser.add_argument("--work", type=Path, default=Path("var/bench/auth"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
