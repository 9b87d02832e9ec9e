"""Measures how late the event loop of the front process wakes its tasks."""

from __future__ import annotations

import asyncio
from typing import Final

from loraplex_server.series import Series

INTERVAL_SECONDS: Final = 1.0
"""Pause between two measurements. Only a hold longer than this is certain to be seen.

A shorter pause slows the engine on a small machine: its threads wait for each other in every step,
so whatever wakes on one of their cores delays all of them.
"""


async def watch_event_loop(series: Series) -> None:
    """Observes the lag of the running loop in `event_loop_lag_seconds`, until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL_SECONDS
        await asyncio.sleep(INTERVAL_SECONDS)
        series.event_loop_lag_seconds.observe(max(0.0, loop.time() - due))
