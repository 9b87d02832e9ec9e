"""Compares Loraplex with PEFT in one run: same NF4 base, same workload, same machine.

    python bench/bench_peft.py       (make bench-peft)

Measures two rounds, each with the server first and PEFT second, so that a change in the machine's
speed is visible, and reports medians. Nothing runs concurrently; do not use the machine meanwhile.
The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base
import measure
import random_adapters
import report
from loraplex import LoraplexError
from measure import BenchmarkError, Case, Lengths
from served import Server, ServerError, exit_on_sigterm
from workload import Popularity

HERE = Path(__file__).parent
COUNT, RANK = 16, 16
CASES = (
    Case("base_1", Popularity.BASE, 1),
    Case("base_16", Popularity.BASE, 16),
    Case("adapter_1", Popularity.IDENTICAL, 1),
    Case("adapters_16", Popularity.DISTINCT, 16),
)
BUSY = 0.5  # load average above which a warning is printed


@dataclass(frozen=True, slots=True)
class Round:
    """One round: output tokens per second by case, and seconds until the server was ready."""

    server: dict[str, float]
    peer: dict[str, float]
    ready_s: float


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    began = time.monotonic()
    directory = base.ensure(cache=args.cache)
    directories = random_adapters.write(directory, args.work / "adapters", COUNT, RANK)
    busy = os.getloadavg()[0]
    if busy > BUSY:
        print(f"warning: the machine is not idle (load average {busy:.1f}); results are doubtful")
    rounds = []
    dtype = args.peer_dtype
    try:
        with server_of(args, directories):
            pass  # converts the model and compiles the kernels, so that the timed starts are warm
        for number in range(1, args.rounds + 1):
            print(f"\nround {number} of {args.rounds}", flush=True)
            rates, ready_s = run_server(args, directories, seed=number)
            peer = run_peer(args, directory, dtype)
            dtype = str(peer["dtype"])  # the faster type is determined once
            rounds.append(Round(rates, {c.name: float(peer[c.name]) for c in CASES}, ready_s))
    except (ServerError, LoraplexError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(rounds, args, dtype, busy, time.monotonic() - began)
    return 0


def run_server(
    args: argparse.Namespace, directories: list[Path], seed: int
) -> tuple[dict[str, float], float]:
    """Starts the server with a warm cache, measures every case, and stops it."""
    lengths = Lengths(args.prompt_tokens, args.output_tokens)
    rows, rates = [], {}
    with server_of(args, directories) as server:
        names = measure.register(server.address, directories)
        for case in CASES:
            m = measure.measure(server.address, case, names, lengths, args.repeats, seed)
            rows.append(measure.row(case.name, m))
            rates[case.name] = m.output_tok_s
    if server.exit_code != 0:
        raise ServerError(f"the server ended with exit code {server.exit_code}")
    measure.show(f"loraplex, ready in {server.ready_s:.2f} s", rows)
    return rates, server.ready_s


def server_of(args: argparse.Namespace, directories: list[Path]) -> Server:
    """A server with an empty store, so that every round registers and loads the same adapters."""
    store = args.work / "store"
    shutil.rmtree(store, ignore_errors=True)
    settings = {
        "cache": args.cache,
        "store": store,
        "import_root": directories[0].parent,
        "device": args.device,
        "dtype": args.dtype,
    }
    return Server(settings, args.work / "server.log")


def run_peer(args: argparse.Namespace, directory: Path, dtype: str) -> dict[str, Any]:
    """Runs PEFT in a process of its own. Returns its JSON line. Raises BenchmarkError."""
    command = [
        *(sys.executable, str(HERE / "peft_peer.py")),
        *("--base", str(directory), "--adapters", str(args.work / "adapters")),
        *("--dtype", dtype, "--device", "cuda" if args.device == "cuda" else "cpu"),
        *("--prompt-tokens", str(args.prompt_tokens)),
        *("--output-tokens", str(args.peer_output_tokens or args.output_tokens)),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise BenchmarkError(f"the peer ended with exit code {done.returncode}")
    print("\n" + "\n".join(lines[:-1]), flush=True)
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def show(
    rounds: list[Round], args: argparse.Namespace, dtype: str, busy: float, seconds: float
) -> None:
    """Prints the medians as a table, and the JSON line."""
    ours = {c.name: report.median([r.server[c.name] for r in rounds]) for c in CASES}
    peer = {c.name: report.median([r.peer[c.name] for r in rounds]) for c in CASES}
    rows = [[c.name, ours[c.name], peer[c.name], ours[c.name] / peer[c.name]] for c in CASES]
    print("\noutput tokens per second, end to end")
    print(report.table(("case", "loraplex", f"PEFT ({dtype})", "ratio"), rows))
    peer_tokens = args.peer_output_tokens or args.output_tokens
    if peer_tokens != args.output_tokens:
        print(f"new tokens per row: PEFT {peer_tokens}, Loraplex {args.output_tokens}")
    result = {
        "ratio_peft": ours["adapters_16"] / peer["adapters_16"],
        "ratio_base": ours["adapters_16"] / ours["base_16"],
        "one_row_ratio_peft": ours["adapter_1"] / peer["adapter_1"],
        "ready_s": report.median([r.ready_s for r in rounds]),
        "loraplex_tok_s": ours,
        "peft_tok_s": peer,
        "rounds": [{"loraplex": r.server, "peft": r.peer, "ready_s": r.ready_s} for r in rounds],
        "peft_dtype": dtype,
        "loraplex_dtype": args.dtype,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "peft_output_tokens": peer_tokens,
        "load_before": busy,
        "seconds": seconds,
    }
    print(report.json_line(result))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare Loraplex with PEFT on the default model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add("--work", type=Path, default=Path("var/bench"), help="folder for adapters, store and logs")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add(
        "--peer-output-tokens",
        type=int,
        default=0,
        help="new tokens of PEFT; 0: the same",
    )
    add("--rounds", type=int, default=2)
    add("--repeats", type=int, default=3, help="server runs of each case per round")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="the server's type",
    )
    add("--peer-dtype", default="best", choices=("best", "bfloat16", "float32"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
