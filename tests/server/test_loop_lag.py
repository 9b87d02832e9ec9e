"""Work that holds the event loop shows in a metric."""

from __future__ import annotations

import asyncio

import pytest
from loraplex_server.runtime.loop_lag import INTERVAL_SECONDS, watch_event_loop
from loraplex_server.series import Series
from prometheus_client import CollectorRegistry

pytestmark = pytest.mark.fault("event-loop-held")


async def test_the_lag_of_the_event_loop_is_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    now, held = 0.0, iter([0.0, 3.0, 0.0])

    async def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds == INTERVAL_SECONDS
        now += seconds + next(held)

    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    monkeypatch.setattr("loraplex_server.runtime.loop_lag.asyncio.sleep", sleep)
    with pytest.raises(RuntimeError):  # no more measurements
        await watch_event_loop(Series(registry))
    lag = "loraplex_event_loop_lag_seconds"
    assert registry.get_sample_value(f"{lag}_count") == 3
    assert registry.get_sample_value(f"{lag}_bucket", {"le": "0.005"}) == 2
    assert registry.get_sample_value(f"{lag}_sum") == pytest.approx(3.0)
