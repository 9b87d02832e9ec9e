"""Measures what HTTP through the gateway costs, compared with gRPC to the same server.

    python bench/bench_gateway.py                 (make bench-gateway)

Starts one server with the default model and its gateway, so the server's processes, the gateway and
the generator of the load share the machine. Sixteen streams of the base at once are sent over gRPC
and over HTTP (`/v1/completions`) in alternating order. No prompt is sent twice, since the server
would find it in its prefix cache. The share is that of the rate over HTTP in that over gRPC, the
median of all rounds. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
from pathlib import Path

import base
import http_load
import load
import report
from loraplex import Client, LoraplexError
from measure import BenchmarkError
from served import Server, ServerError, exit_on_sigterm
from workload import Job, Popularity, Span, Workload, plan


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    base.ensure(cache=args.cache)
    shutil.rmtree(args.work, ignore_errors=True)
    (args.work / "import").mkdir(parents=True)
    settings = {
        "cache": args.cache,
        "store": args.work / "store",
        "import_root": args.work / "import",
        "gateway": "127.0.0.1:0",
    }
    rates: dict[str, list[float]] = {"gRPC": [], "HTTP": []}
    firsts: dict[str, list[float]] = {"gRPC": [], "HTTP": []}
    try:
        with Server(settings, args.work / "server.log") as server:
            with Client(server.address) as client:
                model = client.get_model().name
            for number in range(args.rounds + 1):
                ways = ("gRPC", "HTTP") if number % 2 else ("HTTP", "gRPC")
                for at, way in enumerate(ways):
                    jobs = jobs_of(args, 2 * number + at)
                    rate, first = measured(way, server, model, jobs)
                    rates[way].append(rate)
                    firsts[way].append(first)
    except (ServerError, LoraplexError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(rates, firsts)
    return 0


def jobs_of(args: argparse.Namespace, seed: int) -> list[Job]:
    """The requests of one run; runs of different seeds share no prompt."""
    return plan(
        Workload(
            popularity=Popularity.BASE,
            adapters=(),
            requests=args.streams,
            prompt_tokens=Span(args.prompt_tokens, args.prompt_tokens),
            output_tokens=Span(args.output_tokens, args.output_tokens),
            token_ids=Span(256, 49_000),
            seed=seed,
        )
    )


def measured(way: str, server: Server, model: str, jobs: list[Job]) -> tuple[float, float]:
    """Output tokens per second, and the median time to the first token in milliseconds.

    Raises BenchmarkError for answers that are not whole.
    """
    if way == "gRPC":
        run = load.measure(asyncio.run(load.run(server.address, jobs, load.Pace(len(jobs)))))
        if run.errors:
            raise BenchmarkError(f"gRPC: {run.reasons}")
        return run.output_tok_s, run.ttft_p50_ms
    over_http = asyncio.run(http_load.run(server.http, model, jobs))
    if over_http.errors:
        raise BenchmarkError(f"HTTP: {over_http.errors} answers are not whole")
    return over_http.output_tok_s, 1e3 * statistics.median(over_http.ttft_s)


def show(rates: dict[str, list[float]], firsts: dict[str, list[float]]) -> None:
    """Prints the table and the JSON line. The first round warms the server up and is left out."""
    rows = [
        [way, statistics.median(rates[way][1:]), statistics.median(firsts[way][1:])]
        for way in rates
    ]
    print(report.table(("way", "output tok/s", "ttft p50 ms"), rows))
    ratios = [h / g for h, g in zip(rates["HTTP"][1:], rates["gRPC"][1:], strict=True)]
    print(report.json_line({"share_of_grpc": statistics.median(ratios), "rounds": ratios}))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--streams", type=int, default=16, help="streams at once (default: 16)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--cache", type=Path, default=base.CACHE)
    parser.add_argument("--work", type=Path, default=Path("var/bench/gateway"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
