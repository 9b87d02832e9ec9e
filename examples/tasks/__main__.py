"""Writes a task's rows: `python -m examples.tasks contacts --out file.jsonl`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import TASKS, write


def main(argv: list[str] | None = None) -> int:
    """Writes the file and prints its name. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Write generated examples of a task as JSONL.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--count", type=int, default=240, help="number of rows")
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="write held-out rows, which training data never contains",
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("--count must be at least 1")
    try:
        print(write(args.task, args.out, args.count, args.seed, args.held_out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
