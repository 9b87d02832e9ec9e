"""Time that comparing the cached base model with its digests takes at a start.

    python bench/cache_check.py [--model default] [--cache var/cache] [--repeats 5]

Prints the seconds of a look at names and sizes alone, of the comparison of every file with its
digest, and of the whole load of the base model, which contains the comparison. The files are in
the page cache, as at the restart of an engine; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loraplex_model.checkpoints import cache
from loraplex_model.checkpoints.load import load_base


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of the times of `repeats` calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--cache", type=Path, default=Path("var/cache"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    def load() -> Path:
        return load_base(args.model, torch.bfloat16, args.cache).directory

    entry = load()
    figures = {
        "megabytes": round(sum(path.stat().st_size for path in entry.iterdir()) / 1e6, 1),
        "sizes_s": median_seconds(lambda: cache.is_whole(entry), args.repeats),
        "digests_s": median_seconds(lambda: cache.is_whole(entry, digests=True), args.repeats),
        "load_s": median_seconds(load, args.repeats),
    }
    for name, figure in figures.items():
        print(f"{name:<10} {figure:.4g}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
