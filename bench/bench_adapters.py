"""Measures adapter management: loading, replacing, merging, 1,000 adapters, and kill -9.

    python bench/bench_adapters.py            (make bench-adapters)

Starts its own servers with the default model and stops them. The last line of output is one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import base
import lifecycle
import merge_cycles
import psutil
import random_adapters
import report
from loraplex import LoraplexError
from measure import BenchmarkError
from served import Server, ServerError, exit_on_sigterm

KILLS = Path(__file__).parents[1] / "tests" / "adapters" / "store_kills.py"
FEW, FITTING = 16, 20
"""Number of adapters in the small registry, and of those that fit into the small budget."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    try:
        result = {
            **kills(args),
            **merge_cycles.run(args.cache, args.cycles),
            **scenes(args),
        }
    except (ServerError, LoraplexError, BenchmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    head = ["what", "measured"]
    print(report.table(head, [[name, value] for name, value in result.items()]))
    print(report.json_line(result))
    return 0


def scenes(args: argparse.Namespace) -> dict[str, object]:
    """Runs the scenes of `lifecycle` on servers with few and with many registered adapters."""
    (template,) = random_adapters.write(
        base.ensure(cache=args.cache), args.work / "small", 1, 4, modules=("q_proj", "v_proj")
    )
    directories = lifecycle.copies(template, args.work / "many", args.registered)
    size = (directories[0] / "adapter_model.safetensors").stat().st_size
    room = {"adapter_memory": FITTING * size, "host_adapter_memory": FITTING * size}
    result: dict[str, object] = {}
    with serving(args, "many", directories) as server:
        names = lifecycle.register(server.address, directories[:FEW])
        few = throughputs(server.address, names)
        names += lifecycle.register(server.address, directories[FEW:])
        many = throughputs(server.address, names[:FEW])
        result["registered_1000_ratio"] = report.median(many) / report.median(few)
        result |= asyncio.run(
            lifecycle.replacing(server.address, directories[-2:], args.rounds, 24)
        )
    with serving(args, "cold", directories, keep_store="many") as server:
        cold = names[FEW : FEW + 2 * args.burst]
        few_rows = burst(server.address, names[:4], cold[: args.burst])
        result |= burst(server.address, names[:FEW], cold[args.burst :])
        result["cold_load_extra_gap_steps_4_rows"] = few_rows["cold_load_extra_gap_steps"]
    with serving(args, "tight", directories, keep_store="many", **room) as server:
        result |= lifecycle.zipf(server.address, names, args.requests, 8, server_pids(server))
    return result


def burst(address: str, running: Sequence[str], cold: Sequence[str]) -> dict[str, float]:
    """Measures the burst of cold loads while `running` streams are active."""
    return asyncio.run(lifecycle.cold_burst(address, running, cold, 128))


def throughputs(address: str, names: Sequence[str]) -> list[float]:
    """Measures four runs with the same adapters; the first, which loads them, is not counted."""
    return [lifecycle.throughput(address, names, 32, 32, seed) for seed in range(4)][1:]


def serving(
    args: argparse.Namespace,
    name: str,
    directories: list[Path],
    keep_store: str = "",
    **settings: object,
) -> Server:
    """A server with a store of its own, or with one that another server has filled."""
    store = args.work / f"store-{keep_store or name}"
    if not keep_store:
        shutil.rmtree(store, ignore_errors=True)
    return Server(
        {
            "cache": args.cache,
            "store": store,
            "import_root": directories[0].parent,
            "dtype": "bfloat16",
            **settings,
        },
        args.work / f"{name}.log",
    )


def server_pids(server: Server) -> list[int]:
    """Process ids of the front process and its children."""
    process = psutil.Process(server.pid)
    return [process.pid, *(child.pid for child in process.children(recursive=True))]


def kills(args: argparse.Namespace) -> dict[str, object]:
    """Kills processes that change a store with SIGKILL, and counts lost acknowledged changes."""
    folder = args.work / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(KILLS), str(folder), str(args.kills)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchmarkError("a store lost acknowledged changes; see above")
    told = json.loads(done.stdout.splitlines()[-1])
    return {"kill9": told["kills"], "kill9_lost": told["lost"]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure adapter management.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add(
        "--work",
        type=Path,
        default=Path("var/bench/lifecycle"),
        help="adapters, stores and logs",
    )
    add("--registered", type=int, default=1000)
    add("--burst", type=int, default=100, help="cold adapters loaded at once")
    add("--rounds", type=int, default=10, help="number of times that a name is moved")
    add("--requests", type=int, default=400, help="requests of the Zipf traffic")
    add("--cycles", type=int, default=1000, help="cycles of merging and unmerging")
    add("--kills", type=int, default=200)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
