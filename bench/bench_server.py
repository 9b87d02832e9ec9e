"""Measures this server with base and adapters, by adapter popularity and concurrency.

    python bench/bench_server.py            (make bench)

Starts its own server with the default model and 16 random rank-16 adapters of all linear layers,
and stops it. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import base
import measure
import random_adapters
import report
from loraplex import LoraplexError
from measure import BenchmarkError, Case, Lengths
from served import Server, ServerError, exit_on_sigterm
from workload import Popularity

CASES = tuple(
    Case(f"{popularity.value}_{rows}", popularity, rows)
    for popularity in (Popularity.BASE, Popularity.IDENTICAL, Popularity.DISTINCT, Popularity.ZIPF)
    for rows in (1, 4, 16)
)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    directory = base.ensure(cache=args.cache)
    directories = random_adapters.write(directory, args.work / "adapters", 16, 16)
    lengths = Lengths(args.prompt_tokens, args.output_tokens)
    store = args.work / "store"
    shutil.rmtree(store, ignore_errors=True)
    settings = {
        "cache": args.cache,
        "store": store,
        "import_root": directories[0].parent,
        "device": args.device,
        "dtype": args.dtype,
    }
    rows = []
    rates: dict[str, object] = {}
    try:
        with Server(settings, args.work / "server.log") as server:
            names = measure.register(server.address, directories)
            for case in CASES:
                m = measure.measure(server.address, case, names, lengths, args.repeats, args.seed)
                rows.append(measure.row(case.name, m))
                rates[case.name] = m.output_tok_s
                print(f"{case.name}: {m.output_tok_s:.0f} tok/s", flush=True)
    except (ServerError, LoraplexError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    measure.show(f"{args.prompt_tokens} prompt tokens, {args.output_tokens} new tokens", rows)
    settings_shown = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
    print(report.json_line({"output_tok_s": rates, "ready_s": server.ready_s, **settings_shown}))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure Loraplex on the default model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add("--work", type=Path, default=Path("var/bench"), help="folder for adapters, store and logs")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--repeats", type=int, default=3, help="runs of each case, of which the median is used")
    add("--device", default="auto")
    add("--dtype", default="bfloat16")
    add("--seed", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
