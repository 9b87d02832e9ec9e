"""Who leaves first, and what may stay in host memory."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.engine.adapters.eviction import GreedyDual
from loraplex_server.engine.adapters.host_tier import HostAdapter, HostTier
from loraplex_server.engine.messages import AdapterRef


def leaving(order: GreedyDual, keys: str) -> str:
    return "".join(sorted(keys, key=order.worth))


def test_with_equal_cost_per_byte_the_least_recently_used_leaves_first() -> None:
    order = GreedyDual()
    for key in "abcab":
        order.touch(key, 100, 2.0)
    assert leaving(order, "abc") == "cab"


def test_what_is_cheap_to_bring_back_for_its_size_leaves_first() -> None:
    order = GreedyDual()
    order.touch("large", 1000, 1.0)
    order.touch("slow", 10, 1.0)
    order.touch("fast", 10, 0.1)
    assert sorted(["large", "slow", "fast"], key=order.worth) == ["large", "fast", "slow"]


def test_what_costs_much_and_is_never_used_leaves_in_the_end() -> None:
    order = GreedyDual()
    order.touch("costly", 1, 10.0)
    for turn in range(12):
        order.touch(f"cheap {turn}", 1, 1.0)
        if order.worth(f"cheap {turn}") > order.worth("costly"):
            break
        order.evict(f"cheap {turn}")
    assert turn == 9


def test_it_pays_less_to_reload_than_least_recently_used_does() -> None:
    """Against the oldest rule, on traffic in which popularity and cost are skewed."""
    rng = random.Random(7)
    cost = {f"k{i}": (5.0 if i % 5 == 0 else 0.2) for i in range(40)}
    asked = [f"k{min(39, int(rng.paretovariate(0.7)) - 1)}" for _ in range(4000)]
    assert paid(asked, cost, dict.fromkeys(cost, 1.0)) > 1.1 * paid(asked, cost, cost)


def paid(asked: list[str], cost: dict[str, float], believed: dict[str, float]) -> float:
    """Seconds of reloading with room for ten, if the order believes in certain costs."""
    order, held, seconds = GreedyDual(), set[str](), 0.0
    for key in asked:
        if key not in held:
            seconds += cost[key]
            if len(held) == 10:
                victim = min(held, key=order.worth)
                order.evict(victim)
                held.remove(victim)
            held.add(key)
        order.touch(key, 1, believed[key])
    return seconds


@dataclass(frozen=True)
class Bytes:
    """An adapter that is nothing but its size."""

    nbytes: int
    virtual_tokens: int = 0
    merge_nbytes: int = 0


def held(name: str, nbytes: int, seconds: float = 0.0) -> HostAdapter:
    return HostAdapter(AdapterRef(name, f"/{name}"), Bytes(nbytes), seconds)


def test_the_host_tier_makes_room_within_its_budget() -> None:
    host = HostTier(100, shared=True)
    assert host.put(held("a", 40), ())
    assert host.put(held("b", 40), ())
    assert host.get("a") is not None
    assert host.put(held("c", 40), ())
    assert set(host.adapters) == {"a", "c"}
    assert (host.nbytes, host.evictions) == (80, 1)
    host.check()


def test_what_does_not_fit_beside_the_protected_evicts_nobody() -> None:
    host = HostTier(100, shared=True)
    for name in "ab":
        assert host.put(held(name, 40), ())
    assert not host.put(held("c", 40), {"a", "b"})
    assert not host.put(held("d", 101), ())
    assert set(host.adapters) == {"a", "b"}
    assert host.evictions == 0


def test_an_adapter_on_a_device_that_shares_memory_is_charged_when_it_leaves_it() -> None:
    host = HostTier(100, shared=True)
    host.put(held("a", 60), ())
    host.enter_device("a")
    assert host.nbytes == 0
    host.put(held("b", 60), ())
    host.leave_device("a", 5.0, keep=())
    assert set(host.adapters) == {"a"}
    assert host.adapters["a"].last_used == 5.0
    host.enter_device("a")
    host.put(held("c", 60), ())
    host.leave_device("a", 6.0, keep={"c"})
    assert set(host.adapters) == {"c"}
    host.check()


def test_on_an_accelerator_the_copy_in_host_memory_is_always_charged() -> None:
    host = HostTier(100, shared=False)
    host.put(held("a", 60), ())
    host.enter_device("a")
    assert host.nbytes == 60
    host.put(held("b", 60), ())
    assert set(host.adapters) == {"b"}
    host.leave_device("a", 5.0, keep=())
    assert set(host.adapters) == {"b"}


@pytest.mark.parametrize("shared", [True, False])
def test_without_a_budget_nothing_is_kept_beyond_the_device(shared: bool) -> None:
    host = HostTier(0, shared)
    assert not host.put(held("a", 1), ())
    on_device = held("b", 1)
    on_device.on_device = True
    assert host.put(on_device, ()) is shared
    host.leave_device("b", 1.0, ())
    assert host.adapters == {}
    assert host.nbytes == 0


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "enter", "leave", "drop"]),
            st.sampled_from("abcde"),
            st.integers(0, 60),
            st.sets(st.sampled_from("abcde")),
        )
    ),
    st.booleans(),
)
def test_the_host_tier_never_exceeds_its_budget(
    moves: list[tuple[str, str, int, set[str]]], shared: bool
) -> None:
    host = HostTier(100, shared)
    for move, name, number, keep in moves:
        before = {digest for digest in host.adapters if digest in keep}
        match move:
            case "put":
                host.put(held(name, number, number / 10), keep)
            case "get":
                host.get(name)
            case "enter":
                host.enter_device(name)
            case "leave":
                host.leave_device(name, 1.0, keep)
            case "drop":
                host.drop(name)
        host.check()
        if move == "put":
            assert before <= set(host.adapters)
