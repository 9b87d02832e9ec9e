"""Loads adapters all at once, from a process of its own that gives way to everybody else.

    python bench/burst.py ADDRESS NAME ...

Says "ready", waits for a line, loads, says how many seconds that took, and ends at the next line.
In life those who load are on other machines: neither their calls' making nor their processes'
beginning and end takes time from the server or from whoever measures it.
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
