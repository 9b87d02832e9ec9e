"""Follows the file of principals: quotas and metrics know those that there are now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from loraplex_server.access.limits.quotas import Quotas
from loraplex_server.access.principals import Principal
from loraplex_server.principal_series import PrincipalSeries

LOOK_SECONDS: Final = 1.0


async def follow_principals(
    principals: Callable[[], Mapping[str, Principal]], quotas: Quotas, series: PrincipalSeries
) -> None:
    """Takes in the principals by name, and each change of them, until it is cancelled."""
    seen: Mapping[str, Principal] | None = None
    while True:
        now = principals()
        if now != seen:
            quotas.retain(now.keys())
            series.follow(now)
            seen = dict(now)
        await asyncio.sleep(LOOK_SECONDS)
