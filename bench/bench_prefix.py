"""Compares the prefill of requests that share the beginning of their prompts with that of others.

    python bench/bench_prefix.py            (make bench-prefix)

Starts its own server with the default model and sends 16 requests at once: in turn ones whose
prompts begin with the same tokens and differ in their endings, and ones that have nothing in common
(cold). Every beginning is new to the server, so that within each round the first of the requests
computes it and the others wait for it. Throughput counts all prompt tokens, until the last request
has its first new token. Then a server without the prefix cache answers the same requests, and all
new tokens are compared. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import base
import load
import numpy as np
import report
from loraplex import LoraplexError
from measure import BenchmarkError
from served import Server, ServerError, exit_on_sigterm
from workload import Job

TOKEN_IDS = 256, 49_000
SETTING = "LORAPLEX_PREFIX_CACHE"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    shared = [jobs(args, seed, args.shared_tokens) for seed in range(args.repeats)]
    cold = [jobs(args, 1000 + seed, 0) for seed in range(args.repeats)]
    rates: dict[str, list[float]] = {"shared": [], "cold": []}
    answers: list[list[load.Answer]] = []
    try:
        with server(args, "true") as up:
            send(up.address, jobs(args, 9999, 0)[:2])  # the first pass is slower
            for pair in zip(shared, cold, strict=True):
                for name, round in zip(rates, pair, strict=True):
                    answers.append(send(up.address, round))
                    rates[name].append(prefill_rate(answers[-1]))
                    print(f"{name}: {rates[name][-1]:.0f} prompt tok/s", flush=True)
        with server(args, "false") as up:
            wrong = sum(
                one.token_ids != other.token_ids
                for found, round in zip(answers[::2], shared, strict=True)
                for one, other in zip(found, send(up.address, round), strict=True)
            )
    except (ServerError, LoraplexError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    medians = {name: report.median(found) for name, found in rates.items()}
    head = ["prompts", "prefill tok/s", "lowest", "highest"]
    rows = [[name, medians[name], min(found), max(found)] for name, found in rates.items()]
    print(report.table(head, rows))
    ratio = medians["shared"] / medians["cold"]
    print(report.json_line({"prefill_ratio": ratio, "wrong_tokens": wrong, "tok_s": medians}))
    return 0


def jobs(args: argparse.Namespace, seed: int, shared: int) -> list[Job]:
    """Requests whose prompts have `shared` tokens in common and equal lengths."""
    random = np.random.default_rng(seed)
    size = args.shared_tokens + args.own_tokens
    head = random.integers(*TOKEN_IDS, shared).tolist()
    tails = random.integers(*TOKEN_IDS, (args.requests, size - shared)).tolist()
    return [Job("", (*head, *tail), args.output_tokens) for tail in tails]


def send(address: str, jobs: Sequence[Job]) -> list[load.Answer]:
    """Sends all requests at once. Raises BenchmarkError if one fails."""
    answers = asyncio.run(load.run(address, jobs, load.Pace(len(jobs))))
    if errors := {answer.error for answer in answers if answer.error}:
        raise BenchmarkError(f"requests failed: {', '.join(sorted(errors))}")
    return answers


def prefill_rate(answers: Sequence[load.Answer]) -> float:
    """Prompt tokens per second until the last of the requests has a new token."""
    seconds = max(a.tokens[0][0] for a in answers) - min(a.sent for a in answers)
    return sum(len(a.job.token_ids) for a in answers) / seconds


def server(args: argparse.Namespace, prefix_cache: str) -> Server:
    """A server with an empty store, to be started."""
    os.environ[SETTING] = prefix_cache
    store = args.work / "prefix-store"
    shutil.rmtree(store, ignore_errors=True)
    settings = {
        "cache": args.cache,
        "store": store,
        "device": args.device,
        "dtype": args.dtype,
        "kv_memory": "1GiB",
    }
    return Server(settings, args.work / "server.log")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the prefix cache on the default model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add("--work", type=Path, default=Path("var/bench"), help="folder for store and logs")
    add("--requests", type=int, default=16, help="requests that are sent at once")
    add("--shared-tokens", type=int, default=1024, help="tokens that prompts have in common")
    add("--own-tokens", type=int, default=32, help="tokens of each prompt after them")
    add("--output-tokens", type=int, default=8)
    add("--repeats", type=int, default=2, help="rounds, of which the median is used")
    add("--device", default="auto")
    add("--dtype", default="bfloat16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
