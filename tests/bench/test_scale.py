"""The simulation of a fleet keeps to the costs that it is given."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from scale.costs import Costs, fitted
from scale.fleet import run
from scale.replica import PROMPT_STEP, Replica
from scale.routing import _order, affinity, anywhere, bounded_affinity
from scale.traffic import Request, Traffic, requests

COSTS = Costs(
    step=4.0,
    row=1.0,
    distinct=0.5,
    prompt_token=0.5,
    from_host=5.0,
    from_disk=40.0,
    on_device=2,
    on_host=1,
)


def test_a_request_alone_takes_its_load_its_prompt_and_its_steps() -> None:
    replica, request = Replica(COSTS), Request(at=0.0, adapter=7, prompt=100, output=10)
    replica.arrive(request)
    replica.advance(1e6)
    assert request.tier == "disk"
    assert request.first == pytest.approx(40.0 + 100 * 0.5)
    assert request.end == pytest.approx(request.first + 10 * (4.0 + 1.0 + 0.5))
    assert replica.load == 0


def test_two_requests_share_the_steps_and_a_prompt_slows_the_other_down() -> None:
    replica = Replica(COSTS)
    one, other = Request(0.0, 1, 10, 100), Request(0.0, 1, 10, 100)
    replica.arrive(one)
    replica.advance(200.0)
    assert one.first == pytest.approx(45.0)
    replica.arrive(other)
    replica.advance(1e6)
    assert other.tier == "device"
    assert other.first == pytest.approx(200.0 + 10 * 0.5 / (1 - 1 / PROMPT_STEP))
    alone = (200.0 - 45.0) / 5.5 + (other.first - 200.0) / (PROMPT_STEP * 5.5)
    assert one.end == pytest.approx(other.first + (100 - alone) * (4.0 + 2 * 1.0 + 0.5))


def test_adapters_in_use_stay_and_the_least_recently_used_goes_to_the_host_and_away() -> None:
    replica = Replica(COSTS)
    tiers = []
    for adapter in (1, 2, 3, 1, 4, 2):
        request = Request(replica._now, adapter, 10, 1)
        replica.arrive(request)
        replica.advance(replica._now + 1e3)
        tiers.append(request.tier)
    # 3 moves 1 to the host, 1 comes back for 2, 4 moves 3, and 2 has been dropped for it.
    assert tiers == ["disk", "disk", "disk", "host", "disk", "disk"]
    busy = [Request(replica._now, adapter, 10, 1000) for adapter in (5, 6)]
    for request in busy:
        replica.arrive(request)
    replica.advance(replica._now + 500.0)
    waiting = Request(replica._now, 9, 10, 1)
    replica.arrive(waiting)
    replica.advance(replica._now + 1e6)
    assert waiting.first > min(request.end for request in busy)


def test_every_request_ends_and_tokens_take_no_less_time_than_a_step() -> None:
    traffic = Traffic(rate=20, seconds=30, adapters=50, seed=3)
    for route in (anywhere, affinity, bounded_affinity):
        found = run(COSTS, 5, traffic, route)
        assert found.cold + found.host <= 1.0
        assert found.gap >= COSTS.decode(1, 1)
    assert len(list(requests(traffic))) == len(list(requests(traffic)))


def test_a_lost_replica_moves_its_own_adapters_only() -> None:
    before = {adapter: _order(adapter, 10)[0] for adapter in range(500)}
    after = {adapter: _order(adapter, 9)[0] for adapter in range(500)}
    assert all(after[adapter] == place for adapter, place in before.items() if place < 9)
    shares = Counter(before.values())
    assert max(shares.values()) < 2 * min(shares.values())


def test_bounded_affinity_loads_nobody_beyond_the_bound() -> None:
    fleet = [Replica(COSTS) for _ in range(4)]
    source = random.Random(1)
    for _ in range(400):
        request = Request(0.0, 1, 10, 10)
        fleet[bounded_affinity(request, fleet, source)].arrive(request)
    loads = [each.load for each in fleet]
    assert max(loads) <= 1.25 * 400 / 4 + 1


def test_costs_are_fitted_exactly_where_they_are_linear() -> None:
    passes = {
        f"decode_{rows}{after}": {"a": 3.0 + 0.4 * rows, "b": 0.2 * rows * bool(after)}
        for rows in (1, 16, 64)
        for after in ("", "_adapters")
    }
    passes["prefill_128_adapters"] = {"all": 64.0}
    found = fitted(passes, host_ms=0.5)
    assert found == {
        "step": pytest.approx(3.5),
        "row": pytest.approx(0.4),
        "distinct": pytest.approx(0.2),
        "prompt_token": pytest.approx(0.5),
    }
