"""The series of each engine, by its device. The joined ones are in `metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from loraplex_server.engine.group.face import EngineMember
from loraplex_server.engine.process.client import EngineClient
from loraplex_server.series import Series

REQUEST_STATES: Final = ("running", "waiting")


class DeviceSeries:
    """Shows the state of each engine. A gauge is computed at each scrape, not at each step."""

    def __init__(self, series: Series) -> None:
        self._series = series
        self._members: Sequence[EngineMember] = ()
        self._restarts: dict[str, int] = {}

    def watch(self, members: Sequence[EngineMember]) -> None:
        """Shows these engines from now on."""
        self._members = members
        series = self._series
        for member in members:
            device, client = member.device, member.client
            self._restarts[device] = 0
            series.engine_device_restarts.labels(device)
            series.engine_up.labels(device).set_function(partial(_is_up, client))
            series.engine_device_adapters.labels(device).set_function(partial(_resident, client))
            memory = series.engine_device_memory_bytes.labels(device)
            memory.set_function(partial(_statistic, client, "memory_bytes"))
            for state in REQUEST_STATES:
                requests = series.engine_device_requests.labels(device, state)
                requests.set_function(partial(_statistic, client, state))
        self.count_restarts()

    def count_restarts(self) -> None:
        """Counts the engines that have been lost since the last call."""
        for member in self._members:
            lost = member.client.restarts - self._restarts[member.device]
            self._restarts[member.device] += lost
            self._series.engine_device_restarts.labels(member.device).inc(lost)


# Called in the threads of the metrics endpoint. Each reads an attribute once, whose value is
# replaced and never changed.


def _is_up(client: EngineClient) -> float:
    return float(client.ready)


def _resident(client: EngineClient) -> float:
    return float(sum(status.state == "resident" for status in client.adapters.values()))


def _statistic(client: EngineClient, name: str) -> float:
    stats = client.stats
    return 0.0 if stats is None else float(getattr(stats, name))
