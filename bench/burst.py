"""Loads adapters all at once, from a separate process with the lowest priority.

    python bench/burst.py ADDRESS NAME ...

Prints "ready", waits for a line of input, loads the adapters, prints the seconds that this took,
and exits after the next line of input. In production the clients that load adapters run on other
machines. Running them in another process keeps the cost of their calls, and of starting and ending
their process, out of the measurement.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence

from loraplex import AsyncClient

LOWEST = 19


async def main(address: str, names: Sequence[str]) -> None:
    """Loads the adapters `names` at `address`."""
    async with AsyncClient(address, timeout=300) as client:
        await client.health()
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
        await asyncio.gather(*(client.load_adapter(name) for name in names))
        print(time.perf_counter() - began, flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    os.nice(LOWEST)
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
