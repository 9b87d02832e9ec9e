"""Shows where the time of a step goes, on the CPU.

    python bench/step.py

Two views of the default model, each with and without adapters of rank 16:

- passes of the decoder in this process, by phase: decode steps of 1, 16 and 64 rows, and prompts of
  128 and 1,024 tokens. Products include the LoRA shrinks that are computed in the same phase.
- steps of a server over gRPC: the median time between two tokens of a stream with as many streams,
  greedy and with temperature 0.7 and top_p 0.95. What it exceeds the pass by is sampling and the
  host's work: scheduling, layout, messages, and this program, which shares the cores.

The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import base
import phases
import report
from load import GREEDY, ORDINARY, Sampling
from merge_gain import random_lora
from peers.cases import ACTIVE_64, BASE, DISTINCT, Case
from peers.ours import Loraplex
from served import ServerError, exit_on_sigterm

BLOCK, CONTEXT = 16, 160
DECODE_ROWS, PROMPTS = (1, 16, 64), (128, 1024)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    result: dict[str, object] = {}
    if not args.passes_only:
        try:
            result["server_ms"] = server_steps(args)
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    columns, result["isa"] = passes(args)
    names = dict.fromkeys(name for column in columns.values() for name in column)
    total = {name: sum(column[name] for column in columns.values()) for name in names}
    rows = [
        [name, *(column[name] for column in columns.values())]
        for name in sorted(names, key=lambda name: -total[name])
    ]
    rows.append(["whole pass", *(sum(column.values()) for column in columns.values())])
    print(f"\nmilliseconds of one pass by phase, {result['isa']}")
    print(report.table(["phase", *columns], rows))
    result["passes_ms"] = columns
    show_host(result.get("server_ms"), columns)
    print(report.json_line(result))
    return 0


def passes(args: argparse.Namespace) -> tuple[dict[str, Counter[str]], str]:
    """Milliseconds by phase of each kind of pass, and the instruction set.

    The remainder of a pass, outside its phases, is called `set-up`.
    """
    import torch
    from loraplex_model.adapters.pack import pack
    from loraplex_model.checkpoints.load import load_base
    from loraplex_model.decoder.native import NativeDecoder
    from loraplex_model.ops import build

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, args.dtype)
    sources = args.work / "sources"
    phases.instrument(sources)
    weights = load_base("default", dtype, args.cache).weights
    library = build.load(directory=args.work / "kernels")
    each = (max(PROMPTS) + BLOCK) // BLOCK
    blocks = each + (CONTEXT // BLOCK + 1) * max(DECODE_ROWS)
    decoder = NativeDecoder(weights, blocks, BLOCK, 64, max_positions=2048, library=library)
    adapter = random_lora(weights.config, 16)
    for slot in range(max(DECODE_ROWS)):  # copies, since adapters of a server share no memory
        decoder.table.publish(slot, pack(adapter, dtype))
    columns = {}
    for name, batch in batches().items():
        times: list[float] = []
        counted: Counter[str] = Counter()
        rounds = max(3, args.rounds // (4 if name.startswith("prefill") else 1))
        for turn in range(rounds + 2):
            began = time.perf_counter()
            decoder.forward(batch)
            times.append(1e3 * (time.perf_counter() - began))
            told = phases.read(library, sources)
            if turn >= 2:
                counted += told
        column = Counter({phase: taken / rounds for phase, taken in counted.items()})
        column["set-up"] = max(0.0, sum(times[2:]) / rounds - sum(column.values()))
        columns[name] = column
    return columns, decoder.kernels


def batches() -> dict[str, Any]:
    """Passes to time: decode rows with CONTEXT tokens, and the last chunk of a prompt."""
    from loraplex_model.base.batch import ForwardBatch

    each = CONTEXT // BLOCK + 1
    found = {}
    for adapted in (False, True):
        after = "_adapters" if adapted else ""
        for rows in DECODE_ROWS:
            found[f"decode_{rows}{after}"] = ForwardBatch.build(
                [
                    (
                        [300 + r],
                        CONTEXT,
                        list(range(r * each, (r + 1) * each)),
                        ((r, 1.0),) if adapted else (),
                    )
                    for r in range(rows)
                ]
            )
        for prompt in PROMPTS:
            chunk = min(prompt, 512)
            ids = list(range(300, 300 + chunk))
            held = list(range(prompt // BLOCK))
            mix = ((0, 1.0),) if adapted else ()
            found[f"prefill_{prompt}{after}"] = ForwardBatch.build(
                [(ids, prompt - chunk, held, mix)]
            )
    return found


def server_steps(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds between two tokens over gRPC, by rows and sampling."""
    directory = base.ensure(cache=args.cache)
    paths = ACTIVE_64.write(directory, args.work.parent / "peers" / "adapters")
    cases = [
        Case(f"decode_{rows}{after}", popularity, rows, ACTIVE_64, prompt=128, output=64)
        for popularity, after in ((BASE, ""), (DISTINCT, "_adapters"))
        for rows in DECODE_ROWS
    ]
    settings = {"cache": args.cache, "device": "cpu", "dtype": args.dtype}
    server = Loraplex(args.work, settings).open(ACTIVE_64.fleet(paths, cases), args.work / "log")
    names = [path.name for path in paths]
    found: dict[str, dict[str, float]] = {}
    try:
        for case in cases:
            told = {}
            for name, sampling in (("greedy", GREEDY), ("sampled", ORDINARY)):
                told[name] = steps(server, case, names, sampling)
            found[case.name] = told
    finally:
        server.close()
    return found


def steps(server: Any, case: Case, names: Sequence[str], sampling: Sampling) -> float:
    """The median of three runs, after one that is not counted."""
    runs = [server.run(case.jobs(names, seed), sampling).step_ms for seed in range(4)]
    return median(runs[1:])


def show_host(told: object, columns: dict[str, Counter[str]]) -> None:
    """Prints what a step over gRPC takes beyond its pass."""
    if not isinstance(told, dict):
        return
    rows = []
    for name, by_sampling in told.items():
        whole = sum(columns[name].values())
        greedy, sampled = by_sampling["greedy"], by_sampling["sampled"]
        rows.append([name, whole, greedy - whole, sampled - greedy, sampled])
    head = ["step", "pass ms", "host and argmax ms", "sampling ms", "whole step, sampled ms"]
    print("\nsteps of a server; the pass is that of the table above, with its clocks")
    print(report.table(head, rows))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show where the time of a step goes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=40, help="timed passes of each kind")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--passes-only", action="store_true", help="without a server")
    add("--cache", type=Path, default=base.CACHE, help="cache of the server")
    add("--work", type=Path, default=Path("var/bench/step"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
