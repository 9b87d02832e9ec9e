"""Simulates a fleet of servers with many adapters, from the measured costs of one server.

    python bench/simulate_scale.py            (make simulate-scale)

The costs are in `bench/results/scale-costs.json`. `--measured FILE` writes them again: those of a
step from the last line of `bench/step.py` in the file, those of loading an adapter by a server that
it starts. The memory for adapters is what a server has by default, 1 GiB in each tier.

The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import base
import report
from scale import costs, fleet, loading
from scale.costs import Costs
from scale.fleet import Outcome
from scale.routing import ROUTES, Route, affinity, anywhere, bounded_affinity
from scale.traffic import Traffic

COSTS = Path(__file__).parent / "results" / "scale-costs.json"
USED = 0.6
"""Part of what a fleet can answer with affinity that arrives, where nothing else is said."""

HEAD = [
    "routing",
    "from disk",
    "from host",
    "first token p50 ms",
    "p95",
    "p99",
    "gap p99 ms",
    "unanswered",
    "busiest / mean",
    "copies",
]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.measured is not None:
        write_costs(args)
    measured = costs.read(args.costs)
    traffic = Traffic(
        rate=USED * args.replicas * answers(measured),
        seconds=args.seconds,
        adapters=args.adapters,
        exponent=args.exponent,
        seed=args.seed,
    )
    print(
        f"{args.replicas} replicas, {args.adapters} adapters, exponent {args.exponent:g}, "
        f"{traffic.rate:.0f} requests a second ({USED:.0%} of {answers(measured):.2f} a replica); "
        f"a replica holds {measured.on_device} adapters on the device and {measured.on_host} more "
        "in host memory"
    )
    by_route = {name: run(measured, args, traffic, route) for name, route in ROUTES.items()}
    print(report.table(HEAD, [row(name, found) for name, found in by_route.items()]))
    for title, rows in sweeps(measured, args, traffic):
        print(f"\n{title}")
        print(report.table(HEAD, rows))
    chosen, without = by_route["affinity, bounded load"], by_route["random"]
    result = {
        "replicas": args.replicas,
        "adapters": args.adapters,
        "rate": traffic.rate,
        "cold_share_affinity": chosen.cold,
        "cold_share_random": without.cold,
        "first_token_p99_ms_affinity": chosen.first[2],
        "first_token_p99_ms_random": without.first[2],
    }
    print(report.json_line(result))
    return 0


def answers(measured: Costs) -> float:
    """Requests a second that a replica can answer with 32 rows and adapters on the device.

    Of a mean prompt (log-normal, so longer than the median) and a mean answer.
    """
    rows, usual = 32, Traffic(rate=0, seconds=0, adapters=1)
    prompt = 1.38 * usual.prompt_median * measured.prompt_token
    return 1e3 / (prompt + usual.output_mean * measured.decode(rows, rows) / rows)


def run(
    measured: Costs, args: argparse.Namespace, traffic: Traffic, route: Route, lose: int = 0
) -> Outcome:
    return fleet.run(measured, args.replicas, traffic, route, lose)


def sweeps(
    measured: Costs, args: argparse.Namespace, traffic: Traffic
) -> list[tuple[str, Sequence[Sequence[object]]]]:
    """What changes with the load, with skew, with slow storage, and when replicas are lost."""
    routes = {"random": anywhere, "affinity": affinity, "affinity, bounded load": bounded_affinity}
    loads, skews, losses, slow = [], [], [], []
    for name, route in routes.items():
        for used in (0.8, 0.95):
            busier = replace(traffic, rate=traffic.rate * used / USED)
            loads.append(row(f"{name}, {used:.0%}", run(measured, args, busier, route)))
        for exponent in (0.6, 1.4):
            skewed = replace(traffic, exponent=exponent)
            skews.append(row(f"{name}, {exponent:g}", run(measured, args, skewed, route)))
        slower = replace(measured, from_disk=args.slow_load)
        slow.append(row(name, run(slower, args, traffic, route)))
        lost = args.replicas // 10
        losses.append(row(name, run(measured, args, traffic, route, lost)))
    return [
        ("by the share of capacity that arrives", loads),
        ("by Zipf's exponent", skews),
        (f"with {args.slow_load:g} ms for each adapter that is read (a network file system)", slow),
        ("a tenth of the replicas is replaced by empty ones", losses),
    ]


def row(name: str, found: Outcome) -> list[object]:
    return [
        name,
        found.cold,
        found.host,
        *found.first,
        found.gap,
        found.unfinished,
        found.unevenness,
        found.copies,
    ]


def write_costs(args: argparse.Namespace) -> None:
    """Writes the costs: of steps from what `bench/step.py` printed, of loads measured here."""
    told = json.loads(args.measured.read_text("utf-8").strip().splitlines()[-1])
    found = costs.fitted(told["passes_ms"], args.host_ms)
    loads = loading.milliseconds(args.cache, args.work, args.rank)
    fitting = int((1 << 30) / loads["bytes"])
    content = {
        "isa": told["isa"],
        "rank": args.rank,
        "costs": {
            **found,
            "from_host": loads["host"],
            "from_disk": loads["disk"],
            "on_device": fitting,
            "on_host": fitting,
        },
    }
    args.costs.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Simulate a fleet of servers with many adapters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--replicas", type=int, default=100, help="servers in the fleet")
    add("--adapters", type=int, default=10_000, help="registered adapters")
    add("--exponent", type=float, default=1.0, help="Zipf exponent of the adapters' popularity")
    add("--seconds", type=float, default=600.0, help="simulated time")
    add("--seed", type=int, default=0, help="random seed of the traffic")
    add("--slow-load", type=float, default=500.0, help="milliseconds of a slow read of an adapter")
    add("--costs", type=Path, default=COSTS, help="file with the costs of one server")
    add("--measured", type=Path, help="output of bench/step.py to take the costs of a step from")
    add("--host-ms", type=float, default=0.8, help="with --measured: the host's part of a step")
    add("--rank", type=int, default=16, help="with --measured: rank of the adapters")
    add("--cache", type=Path, default=base.CACHE, help="with --measured: cache of the server")
    add("--work", type=Path, default=Path("var/bench/scale"), help="with --measured: files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
