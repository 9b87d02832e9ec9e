"""Which adapters are on the devices, as one gauge that inference gateways read.

The gauge follows the model server protocol of the Gateway API Inference Extension, whose endpoint
pickers send a request to a server that has its adapter. It has one series, so a change replaces the
old labels instead of adding a series.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from loraplex_server.engine.group.face import EngineMember
from loraplex_server.engine.messages import AdapterStatus, files_digest
from loraplex_server.engine.process.client import EngineClient

NAME: Final = "loraplex_adapter_residency_info"
MOST_NAMES: Final = 200
"""Most names in one label; the least recently used ones are left out."""

_LABELS: Final = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
_ON_DEVICE: Final = ("resident", "draining")


class AdapterResidency(Collector):
    """The gauge `loraplex_adapter_residency_info`, computed at each scrape.

    `running_lora_adapters` are the adapters that are on a device and take requests,
    `waiting_lora_adapters` those that are being loaded or that requests wait for: by every id with
    which calls have named them, separated by commas. `max_lora` is the number of the former ids,
    and of the adapters of mean size for which there is room without an eviction. So a gateway that
    compares the number of ids with `max_lora` learns whether another adapter can be loaded at once.
    The value is the Unix time at which a scrape first showed these labels.

    Called in the threads of the metrics endpoint. Reads attributes whose values are replaced and
    never changed.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._members: Sequence[EngineMember] = ()
        self._ids: Callable[[], Iterable[tuple[str, str]]] = tuple
        self._lock = threading.Lock()
        self._shown = ("0", "", "")
        self._since = clock()

    def watch(self, members: Sequence[EngineMember]) -> None:
        """Shows the adapters of these engines from now on."""
        self._members = members

    def name(self, ids: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Takes names from `ids`: pairs of an adapter's id and its digest, last used first."""
        self._ids = ids

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """See prometheus_client: the family without samples."""
        yield _family()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See prometheus_client."""
        labels = self._labels()
        with self._lock:
            if labels != self._shown:
                self._shown, self._since = labels, self._clock()
            since = self._since
        family = _family()
        family.add_metric(labels, since)
        yield family

    def _labels(self) -> tuple[str, str, str]:
        running: set[str] = set()
        waiting: set[str] = set()
        room = 0
        for member in self._members:
            table = member.client.adapters
            running.update(_in_state("resident", table))
            waiting.update(_in_state("loading", table), _wanted(member.client))
            if member.client.ready:
                hello = member.client.hello
                room += room_for(table, hello.num_slots, hello.adapter_budget_bytes)
        waiting -= running
        ids = list(self._ids())
        there = _names(running, ids)
        return str(len(there) + room), ",".join(there), ",".join(_names(waiting, ids))


def _in_state(state: str, table: Mapping[str, AdapterStatus]) -> Iterator[str]:
    """The digests of the files of the adapters in a state."""
    return (files_digest(digest) for digest, each in table.items() if each.state == state)


def _wanted(client: EngineClient) -> Iterator[str]:
    """The adapters that the open requests of an engine name."""
    for request in list(client.requests.values()):
        yield from (files_digest(ref.digest) for ref in request.adapters)


def room_for(table: Mapping[str, AdapterStatus], slots: int, budget: int) -> int:
    """How many further adapters of the mean size of those on the device fit there with them."""
    sizes = [status.bytes for status in table.values() if status.state in _ON_DEVICE]
    free = slots - len(sizes)
    used = sum(sizes)
    if not used:
        return free
    return max(0, min(free, (budget - used) * len(sizes) // used))


def _names(digests: set[str], ids: Iterable[tuple[str, str]]) -> list[str]:
    """The ids that name these adapters, at most `MOST_NAMES`, in the given order."""
    found = [adapter_id for adapter_id, digest in ids if digest in digests]
    return found[:MOST_NAMES]


def _family() -> GaugeMetricFamily:
    text = "Unix time of the last change; the labels name the adapters on the devices."
    return GaugeMetricFamily(NAME, text, labels=_LABELS)
