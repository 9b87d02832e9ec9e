"""Gateways learn which adapters are on the device, in one series, by the names that calls use."""

from __future__ import annotations

import asyncio
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from loraplex.v1 import adapter_pb2 as pb
from loraplex_server.engine.messages import AdapterRef, AdapterStatus, Hello, Submit
from loraplex_server.metrics import Metrics
from loraplex_server.runtime.admin import ROUTING_FAMILIES, ROUTING_PATH
from loraplex_server.telemetry import residency
from loraplex_server.telemetry.residency import MOST_NAMES, AdapterResidency, room_for
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from rpc.harness import CRASH, Running, ask, running, until

ONE_SLOT = {"num_slots": 1, "step_seconds": 0.02, "num_blocks": 400}


@dataclass(frozen=True)
class Shown:
    """The labels of the one series, and its value."""

    running: list[str]
    waiting: list[str]
    most: int
    value: float


def shown(collector: AdapterResidency) -> Shown:
    (family,) = collector.collect()
    (sample,) = family.samples
    assert sample.name == residency.NAME
    labels = sample.labels

    def names(label: str) -> list[str]:
        return labels[label].split(",") if labels[label] else []

    return Shown(
        names("running_lora_adapters"),
        names("waiting_lora_adapters"),
        int(labels["max_lora"]),
        sample.value,
    )


def of(up: Running) -> Shown:
    return shown(up.server.metrics.residency)


async def test_adapters_are_running_while_they_are_on_the_device_with_or_without_requests(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as up:
        assert of(up) == Shown([], [], 4, of(up).value)
        await up.register("alpha", 1)
        assert of(up).running == [], "registered, not loaded"
        await up.generation.Generate(ask(adapter="alpha"))
        assert of(up).running == ["alpha"], "no request uses it any more"
        await up.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id="alpha"))
        assert of(up).running == []


async def test_every_name_that_calls_use_is_listed_the_last_used_first(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await up.register("alpha", 1)
        await up.register("beta", 2)
        await up.adapters.SetAlias(pb.SetAliasRequest(alias="live", adapter_id="alpha"))
        for name in ("alpha", "beta", "live"):
            await up.generation.Generate(ask(adapter=name))
        assert of(up).running == ["live", "beta", "alpha"]
        await up.generation.Generate(ask(adapter="beta"))
        assert of(up).running == ["beta", "live", "alpha"]


async def test_a_name_goes_with_the_version_that_it_means(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await up.register("alpha", 1)
        await up.generation.Generate(ask(adapter="alpha"))
        await up.register("alpha", 2, replace=True)
        assert of(up).running == [], "the version that the name means now is not on the device"
        await up.generation.Generate(ask(adapter="alpha@1"))
        assert of(up).running == ["alpha@1"]
        await up.generation.Generate(ask(adapter="alpha"))
        assert sorted(of(up).running) == ["alpha", "alpha@1"]
        await up.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="alpha"))
        assert of(up).running == []


async def test_an_adapter_that_requests_wait_for_is_waiting(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=ONE_SLOT) as up:
        await up.register("alpha", 1)
        await up.register("beta", 2)
        holding = up.generation.Generate(ask(new=60, adapter="alpha"))
        await until(lambda: of(up).running == ["alpha"])
        waiting = up.generation.Generate(ask(new=2, adapter="beta"))
        await until(lambda: of(up).waiting == ["beta"])
        assert of(up).running == ["alpha"]
        assert of(up).most == 1, "there is no room for another one"
        await asyncio.gather(holding, waiting)
        assert (of(up).running, of(up).waiting) == (["beta"], [])


async def test_an_engine_that_is_lost_has_no_adapters(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await up.register("alpha", 1)
        await up.generation.Generate(ask(adapter="alpha"))
        lost = up.generation.Generate(ask(CRASH))
        await until(lambda: of(up).running == [])
        await asyncio.gather(lost, return_exceptions=True)
        # A resident adapter is restored.
        await until(lambda: of(up).running == ["alpha"])


async def test_the_short_page_has_these_families_and_nothing_else(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await up.register("alpha", 1)
        await up.generation.Generate(ask(adapter="alpha"))

        def get(path: str) -> str:
            url = f"http://{up.server.admin_address}{path}"
            with urllib.request.urlopen(url, timeout=10) as reply:
                return reply.read().decode()

        for query in ("", "?name[]=loraplex_requests_total", "?%00&&=["):
            page = await asyncio.to_thread(get, ROUTING_PATH + query)
            names = {family.name for family in text_string_to_metric_families(page)}
            assert names == set(ROUTING_FAMILIES)
            assert 'running_lora_adapters="alpha"' in page
        whole = await asyncio.to_thread(get, "/metrics")
        assert "loraplex_requests_total" in whole


@dataclass
class FakeEngine:
    """What the collector reads of an engine."""

    adapters: dict[str, AdapterStatus] = field(default_factory=dict)
    requests: dict[int, Submit] = field(default_factory=dict)
    ready: bool = True
    hello: Hello = field(
        default_factory=lambda: Hello(None, 1, 16, 1000, num_slots=4)  # type: ignore[arg-type]
    )


@dataclass
class FakeMember:
    client: FakeEngine
    device: str = "cpu"


def resident(digest: str, nbytes: int, state: str = "resident") -> AdapterStatus:
    return AdapterStatus(digest, state, nbytes, 0)


def of_engines(*engines: FakeEngine, names: list[tuple[str, str]]) -> AdapterResidency:
    times = iter(range(1000))
    collector = AdapterResidency(clock=lambda: float(next(times)))
    collector.watch([FakeMember(engine) for engine in engines])  # type: ignore[misc]
    collector.name(lambda: names)
    return collector


def test_the_value_changes_with_the_labels_only() -> None:
    engine = FakeEngine()
    collector = of_engines(engine, names=[("a", "A"), ("b", "B")])
    first = shown(collector)
    assert shown(collector) == first
    engine.adapters = {"A": resident("A", 10)}
    changed = shown(collector)
    assert changed.value > first.value
    assert shown(collector) == changed


def test_an_adapter_on_two_devices_is_listed_once_and_takes_a_place_on_each() -> None:
    both = {"A": resident("A", 100)}
    collector = of_engines(FakeEngine(both), FakeEngine(both), names=[("a", "A")])
    assert shown(collector).running == ["a"]
    assert shown(collector).most == 1 + 3 + 3


def test_room_on_an_engine_that_is_away_does_not_count() -> None:
    engines = FakeEngine(), FakeEngine(ready=False)
    assert shown(of_engines(*engines, names=[])).most == 4


def test_adapters_that_drain_or_are_in_host_memory_take_no_requests() -> None:
    table = {state: resident(state, 10, state) for state in ("draining", "host", "resident")}
    names = [(state, state) for state in table]
    assert shown(of_engines(FakeEngine(table), names=names)).running == ["resident"]


def test_waiting_are_those_being_loaded_and_those_that_open_requests_name() -> None:
    table = {
        "A": resident("A", 0, "loading"),
        "B": resident("B", 10),
        "C": resident("C", 0, "host"),
    }
    refs = [AdapterRef(digest, "") for digest in "BC"]
    engine = FakeEngine(table, {1: Submit(1, [1], 1, adapters=refs)})
    names = [(name.lower(), name) for name in "ABCD"]
    seen = shown(of_engines(engine, names=names))
    assert (seen.running, seen.waiting) == (["b"], ["a", "c"])


def test_a_label_is_bounded_and_keeps_the_last_used_names() -> None:
    digests = [f"d{i}" for i in range(3 * MOST_NAMES)]
    table = {digest: resident(digest, 1) for digest in digests}
    names = [(f"name-{digest}", digest) for digest in reversed(digests)]
    hello = Hello(None, 1, 16, 10_000, num_slots=1024)  # type: ignore[arg-type]
    seen = shown(of_engines(FakeEngine(table, hello=hello), names=names))
    assert seen.running == [name for name, _ in names[:MOST_NAMES]]
    assert seen.most == MOST_NAMES + 1024 - len(digests)


@pytest.mark.parametrize(
    ("sizes", "slots", "budget", "room"),
    [
        ([], 4, 1000, 4),
        ([], 0, 0, 0),
        ([100], 1024, 1000, 9),
        ([100, 300], 1024, 1000, 3),
        ([100, 300], 3, 1000, 1),
        ([100] * 10, 1024, 1000, 0),
        ([0, 0], 4, 1000, 2),
        ([700], 1024, 1000, 0),
    ],
)
def test_room_is_for_adapters_of_mean_size_within_the_slots(
    sizes: list[int], slots: int, budget: int, room: int
) -> None:
    table = {str(i): resident(str(i), size) for i, size in enumerate(sizes)}
    table["other"] = resident("other", 0, "host")
    assert room_for(table, slots, budget) == room


def test_a_server_without_an_engine_shows_one_empty_series() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    labels = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert registry.get_sample_value(residency.NAME, labels) is not None
