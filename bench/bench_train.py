"""Compares training with PEFT on the same NF4 base, and four jobs in one pass with four in turn.

    python bench/bench_train.py       (make bench-train)

PEFT is measured twice: prepared as in QLoRA's recipe (`prepare_model_for_kbit_training`, which
recomputes layers to save memory; `ratio_tok_s` and `ratio_peak_memory` refer to this), and without
that preparation (`fast_*`), which needs more memory. `best_*` refers to the faster of the two, and
`checkpointing` has what ours takes and needs with it. Both use the type and the
attention implementation that a short run finds to be fastest on this machine. Our products have the
type that a run chooses on this processor (`--products` gives another). The same products alone,
of dense matrices by torch, are measured too (`products_*`).

Every measurement runs in a process of its own, so that its peak memory is its own. Rounds of all
measurements follow one another, and the fastest step of each side counts, because other processes
on a shared machine can only slow a step down. Do not use the machine meanwhile. The last line of
output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import base
import report

HERE = Path(__file__).parent
BUSY = 0.5  # load average above which a warning is printed
ROWS, TOKENS = 4, 256
PROBE = ("--rows", "1", "--tokens", "64", "--steps", "2")
ALIKE = 1e-4
"""Largest relative difference between the first losses of both sides. It allows for float32 sums in
another order; a side in bfloat16 differs by 100 times that.
"""


class BenchmarkError(Exception):
    """A side failed, or did different work."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    directory = base.ensure(cache=args.cache)
    busy = os.getloadavg()[0]
    if busy > BUSY:
        print(f"warning: the machine is not idle (load average {busy:.1f}); results are doubtful")
    try:
        run("train_ours.py", "single", "--base", directory, *PROBE)  # converts, compiles: once
        settings, probes = fastest(args, directory)
        steps = ("--steps", args.steps, "--products", args.products)
        peer_steps = ("--steps", args.steps)
        size = ("--base", directory, "--rows", ROWS, "--tokens", TOKENS)
        work, peer_work = (*size, *steps), (*size, *peer_steps)
        ours, sparing, peer, fast, joint = [], [], [], [], {64: [], 256: []}
        for number in range(1, args.rounds + 1):
            ours.append(run("train_ours.py", "single", *work))
            peer.append(run("train_peer.py", *peer_work, *settings, "--recipe"))
            fast.append(run("train_peer.py", *peer_work, *settings))
            sparing.append(run("train_ours.py", "single", *work, "--checkpointing"))
            for tokens, found in joint.items():
                case = ("joint", "--base", directory, "--tokens", tokens, *steps)
                found.append(run("train_ours.py", *case))
            latest = {tokens: runs[-1] for tokens, runs in joint.items()}
            show_round(number, ours[-1], peer[-1], fast[-1], latest)
        narrow = "bfloat16" in (*settings, ours[0]["products"])
        tolerance = ALIKE * (100 if narrow else 1)
        same_work([*ours, *sparing], [*peer, *fast], tolerance)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    products = min(one["products_s"] for one in ours)
    show(ours, peer, fast, sparing, settings)
    best = min(peer, fast, key=seconds)
    result = {
        "best_ratio_tok_s": speed(ours) / speed(best),
        "best_ratio_peak_memory": middle(ours, "peak_bytes") / middle(best, "peak_bytes"),
        "best_peft": "without checkpointing" if best is fast else "QLoRA's recipe",
        "ratio_tok_s": speed(ours) / speed(peer),
        "ratio_peak_memory": middle(ours, "peak_bytes") / middle(peer, "peak_bytes"),
        "joint4_ratio": together(joint[64]),
        "joint4_ratio_256": together(joint[256]),
        "joint4_grad_rel_difference": max(
            one["grad_rel_difference"] for one in (*joint[64], *joint[256])
        ),
        "fast_ratio_tok_s": speed(ours) / speed(fast),
        "fast_ratio_peak_memory": middle(ours, "peak_bytes") / middle(fast, "peak_bytes"),
        # The products of the base and nothing else, by torch.
        "products_ratio_tok_s": seconds(peer) / products,
        "products_fast_ratio_tok_s": seconds(fast) / products,
        "products_joint4_ratio": middle(joint[64], "products_ratio"),
        "products_joint4_ratio_256": middle(joint[256], "products_ratio"),
        "tok_s": speed(ours),
        "peft_tok_s": speed(peer),
        "peft_fast_tok_s": speed(fast),
        "peak_bytes": middle(ours, "peak_bytes"),
        "estimated_bytes": middle(ours, "estimated_bytes"),
        "peft_peak_bytes": middle(peer, "peak_bytes"),
        "peft_fast_peak_bytes": middle(fast, "peak_bytes"),
        "checkpointing": {
            "tok_s": speed(sparing),
            "peak_bytes": middle(sparing, "peak_bytes"),
            "estimated_bytes": middle(sparing, "estimated_bytes"),
            "best_ratio_tok_s": speed(sparing) / speed(best),
            "best_ratio_peak_memory": middle(sparing, "peak_bytes") / middle(best, "peak_bytes"),
        },
        "rounds": [
            {
                "tok_s": a["tok_s"],
                "peft_tok_s": b["tok_s"],
                "peft_fast_tok_s": c["tok_s"],
                "joint4": d["ratio"],
                "joint4_256": e["ratio"],
            }
            for a, b, c, d, e in zip(ours, peer, fast, joint[64], joint[256], strict=True)
        ],
        "peft_settings": " ".join(settings),
        "peft_probes_tok_s": probes,
        "products": ours[0]["products"],
        "isa": ours[0]["isa"],
        "threads": ours[0]["threads"],
        "load_before": busy,
        "seconds": time.monotonic() - began,
    }
    print(report.json_line(result))
    return 0


def fastest(args: argparse.Namespace, directory: Path) -> tuple[list[str], dict[str, float]]:
    """Returns PEFT's fastest settings, and the result of a short run of each setting."""
    if args.peer_settings:
        return args.peer_settings.split(), {}
    found = {}
    for dtype, attention in (("float32", "sdpa"), ("float32", "eager"), ("bfloat16", "sdpa")):
        settings = ("--dtype", dtype, "--attention", attention)
        one = run("train_peer.py", "--base", directory, *PROBE, *settings)
        found[" ".join(settings)] = float(one["tok_s"])
        print(f"PEFT, 1 x 64 tokens, {' '.join(settings)}: {one['tok_s']:.3g} tok/s", flush=True)
    return max(found, key=lambda name: found[name]).split(), found


def run(script: str, *arguments: object) -> dict[str, Any]:
    """Runs a side. Returns its JSON line. Raises BenchmarkError."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise BenchmarkError(f"{script} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def same_work(
    ours: Sequence[dict[str, Any]], peer: Sequence[dict[str, Any]], tolerance: float
) -> None:
    """Raises BenchmarkError unless both sides start with the same loss and number of threads."""
    for one, other in itertools.product(ours, peer):
        if abs(one["first_loss"] / other["first_loss"] - 1) > tolerance:
            raise BenchmarkError(f"losses differ: {one['first_loss']}, {other['first_loss']}")
        if one["threads"] != other["threads"]:
            raise BenchmarkError("the sides have different numbers of threads")


def speed(runs: Sequence[dict[str, Any]]) -> float:
    """Tokens per second of the fastest step of all rounds."""
    return ROWS * TOKENS / seconds(runs)


def seconds(runs: Sequence[dict[str, Any]], name: str = "seconds") -> float:
    """Seconds of the fastest step of all rounds."""
    return min(min(one[name]) for one in runs)


def together(runs: Sequence[dict[str, Any]]) -> float:
    """Ratio of the speed of four jobs in one pass to that of the same jobs in turn."""
    return seconds(runs, "apart_seconds") / seconds(runs, "together_seconds")


def middle(runs: Sequence[dict[str, Any]], name: str) -> float:
    return report.median([float(one[name]) for one in runs])


def show_round(
    number: int,
    ours: dict[str, Any],
    peer: dict[str, Any],
    fast: dict[str, Any],
    joint: dict[int, dict[str, Any]],
) -> None:
    rows: list[tuple[str, float, float]] = [
        ("4 x 256 tokens: loraplex, PEFT's recipe", ours["tok_s"], peer["tok_s"]),
        ("4 x 256 tokens: loraplex, PEFT without checkpointing", ours["tok_s"], fast["tok_s"]),
    ]
    for tokens, one in joint.items():
        name = f"4 jobs of 1 x {tokens}: one pass, in turn"
        rows.append((name, one["together_tok_s"], one["apart_tok_s"]))
    print(f"\nround {number}, tokens per second")
    table = [[*row, row[1] / row[2]] for row in rows]
    print(report.table(("work", "first", "second", "ratio"), table), flush=True)


def show(
    ours: Sequence[dict[str, Any]],
    peer: Sequence[dict[str, Any]],
    fast: Sequence[dict[str, Any]],
    sparing: Sequence[dict[str, Any]],
    settings: Sequence[str],
) -> None:
    peft = f"PEFT {' '.join(settings)}"
    rows: list[list[object]] = [
        [
            f"loraplex, products in {ours[0]['products']}",
            speed(ours),
            middle(ours, "peak_bytes") / 1e9,
        ],
        ["loraplex, checkpointing", speed(sparing), middle(sparing, "peak_bytes") / 1e9],
        [f"{peft}, QLoRA's recipe", speed(peer), middle(peer, "peak_bytes") / 1e9],
        [f"{peft}, no checkpointing", speed(fast), middle(fast, "peak_bytes") / 1e9],
        [
            "the base's products alone, by torch",
            ROWS * TOKENS / min(one["products_s"] for one in ours),
            math.nan,
        ],
    ]
    print(f"\n{ROWS} x {TOKENS} tokens, all-linear, rank 16, AdamW")
    print(report.table(("side", "tok/s", "peak GB"), rows))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare training with PEFT on the default model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cache", type=Path, default=base.CACHE)
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=2, help="timed steps per measurement")
    add("--products", choices=("auto", "float32", "bfloat16"), default="auto", help="of our side")
    add("--peer-settings", default="", help='for example "--dtype float32"; empty: the fastest')
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
