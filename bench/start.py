"""Time from the start of the server's process until it serves, with a warm cache.

    .venv/bin/python bench/start.py [--model default] [--cache var/cache] [--starts 5]

Starts and stops the server several times. The first start, which may fetch and convert the model
and compile kernels, does not count. Prints the seconds of each start, and last one line of JSON
with the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from served import Server, exit_on_sigterm


def seconds(settings: dict[str, object], folder: Path) -> float:
    """The time that one start takes."""
    with Server({**settings, "store": folder / "store"}, folder / "server.log") as server:
        return server.ready_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default", help="Base model to serve.")
    parser.add_argument("--cache", type=Path, default=Path("var/cache"), help="Model cache.")
    parser.add_argument("--starts", type=int, default=5, help="Number of starts that count.")
    options = parser.parse_args()
    exit_on_sigterm()
    settings: dict[str, object] = {"model": options.model, "cache": options.cache}
    with tempfile.TemporaryDirectory() as folder:
        seconds(settings, Path(folder))
        taken = [seconds(settings, Path(folder)) for _ in range(options.starts)]
    print("ready after", *(f"{each:.2f}" for each in taken), "s")
    print(json.dumps({"ready_s": round(statistics.median(taken), 2), "starts": len(taken)}))


if __name__ == "__main__":
    main()
