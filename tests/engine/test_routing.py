"""Which of several engines gets a request, and what they report together."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from engine.oracle import OracleRunner
from loraplex_server.engine.group.joining import (
    COUNTED,
    LISTED,
    NOTHING,
    OF_THE_STEP,
    SUMMED,
    JoinedStats,
    join_tables,
)
from loraplex_server.engine.group.routing import (
    SPREAD_FACTOR,
    SPREAD_REQUESTS,
    TOKENS_AS_REQUEST,
    Routes,
    with_room,
)
from loraplex_server.engine.messages import (
    AdapterRef,
    AdapterStatus,
    Hello,
    StepStats,
    Submit,
)
from msgspec import structs

Table = Mapping[str, AdapterStatus]


def table(**states: str) -> Table:
    return {name: AdapterStatus(name, state, 1, 0) for name, state in states.items()}


def request(id: int, *digests: str, tokens: int = 0) -> Submit:
    return Submit(id, [1] * tokens, 4, adapters=[AdapterRef(digest, "") for digest in digests])


def begun(routes: Routes, engine: int, count: int, first: int = 1000) -> None:
    """Gives an engine requests whose prompts are computed."""
    for id in range(first, first + count):
        routes.add(request(id), engine)
        routes.begin(id)


def test_without_adapters_the_smallest_load_decides_and_then_the_lowest_number() -> None:
    routes = Routes(3)
    tables: list[Table] = [{}, {}, {}]
    assert routes.choose((), [0, 1, 2], tables) == 0
    assert routes.choose((), [2, 1], tables) == 1
    begun(routes, 0, 2)
    routes.add(request(1, tokens=TOKENS_AS_REQUEST), 1)
    assert routes.choose((), [0, 1, 2], tables) == 2
    assert routes.choose((), [0, 1], tables) == 0, "a waiting prompt counts as its tokens do"
    routes.begin(1)
    assert routes.choose((), [0, 1], tables) == 1
    assert [routes.end(id) for id in (1, 1000, 1001, 1001)] == [1, 0, 0, None]
    assert [load.weight for load in routes.loads] == [0, 0, 0]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["", "", "resident"], 2),
        (["host", "", "loading"], 2),
        (["", "host", ""], 1),
        (["draining", "host", ""], 1),
        (["resident", "resident", ""], 0),
    ],
)
def test_the_nearest_to_having_the_adapter_is_chosen(states: list[str], expected: int) -> None:
    tables = [table(a=state) if state else {} for state in states]
    assert Routes(3).choose(("a",), [0, 1, 2], tables) == expected


def test_all_adapters_of_a_mix_count() -> None:
    tables = [table(a="resident"), table(a="resident", b="resident"), table(b="host")]
    routes = Routes(3)
    assert routes.choose(("a", "b"), [0, 1, 2], tables) == 1
    assert routes.choose(("a", "b"), [0, 2], tables) == 0
    assert routes.choose(("a", "c"), [1, 2], tables) == 1


def test_an_adapter_on_its_way_is_not_loaded_a_second_time() -> None:
    routes = Routes(2)
    routes.add(request(1, "a", tokens=5), 1)
    assert routes.choose(("a",), [0, 1], [{}, {}]) == 1, "the request has not begun"
    routes.begin(1)
    assert routes.choose(("a",), [0, 1], [{}, {}]) == 0
    with routes.loading(1, "b"):
        assert routes.choose(("b",), [0, 1], [{}, {}]) == 1
    assert routes.choose(("b",), [0, 1], [{}, {}]) == 0


def test_a_hot_adapter_spreads_when_its_engine_has_much_more_to_do() -> None:
    routes, tables = Routes(2), [table(a="resident"), {}]
    begun(routes, 1, 3)
    bound = SPREAD_FACTOR * 3 + SPREAD_REQUESTS
    begun(routes, 0, bound, first=2000)
    assert routes.choose(("a",), [0, 1], tables) == 0
    routes.add(request(1, tokens=1), 0)
    assert routes.choose(("a",), [0, 1], tables) == 1
    both = [table(a="resident"), table(a="resident")]
    assert routes.choose(("a",), [0, 1], both) == 1, "where both have it, the load decides"


def test_a_lost_engine_counts_from_nothing() -> None:
    routes = Routes(2)
    routes.add(request(1, "a", tokens=5), 0)
    routes.lost(0)
    routes.add(request(2, "a", tokens=7), 0)
    assert routes.end(1) == 0
    assert routes.loads[0].weight == TOKENS_AS_REQUEST + 7
    routes.end(2)
    assert (routes.loads[0].weight, len(routes.loads[0].expected), len(routes)) == (0, 0, 0)


def test_a_request_goes_where_the_cache_holds_it_and_anywhere_if_none_does() -> None:
    oracle = OracleRunner().info

    def hello(blocks: int, context: int) -> Hello:
        return Hello(structs.replace(oracle, max_context=context), blocks, 16, 0)

    sizes = {0: hello(2, 1000), 2: hello(4, 1000), 3: hello(100, 40)}
    assert with_room(33, [0, 2, 3], sizes) == [0, 2, 3]
    assert with_room(34, [0, 2, 3], sizes) == [2, 3]
    assert with_room(41, [0, 2, 3], sizes) == [2]
    assert with_room(66, [0, 2, 3], sizes) == [0, 2, 3]


def test_whatever_happens_the_loads_are_those_of_the_open_requests() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    routes = Routes(3)
    known: dict[int, tuple[int, Submit, bool]] = {}
    for id in range(2000):
        submit = request(id, *dice.sample("abcd", dice.randrange(3)), tokens=dice.randrange(200))
        engine = routes.choose([r.digest for r in submit.adapters], [0, 1, 2], [{}, {}, {}])
        routes.add(submit, engine)
        known[id] = engine, submit, False
        for other in dice.sample(sorted(known), min(len(known), 2)):
            engine, submit, _ = known[other]
            if dice.random() < 0.5:
                routes.begin(other)
                known[other] = engine, submit, True
            else:
                assert routes.end(other) == engine
                del known[other]
        if dice.random() < 0.01:
            lost = dice.randrange(3)
            routes.lost(lost)
            for other in [o for o, (engine, _, _) in known.items() if engine == lost]:
                routes.end(other)
                del known[other]
    for engine, load in enumerate(routes.loads):
        mine = [(submit, has_begun) for e, submit, has_begun in known.values() if e == engine]
        waiting = [submit for submit, has_begun in mine if not has_begun]
        assert load.requests == len(mine)
        assert load.waiting_tokens == sum(len(submit.token_ids) for submit in waiting)
        names = [ref.digest for submit in waiting for ref in submit.adapters]
        assert load.expected == {name: names.count(name) for name in names}


# what the engines report together


def stats(**given: int) -> StepStats:
    return structs.replace(NOTHING, **given)


def test_every_statistic_is_summed_counted_or_of_the_step() -> None:
    assert sorted((*OF_THE_STEP, *LISTED, *SUMMED, *COUNTED)) == sorted(StepStats.__struct_fields__)


def test_states_are_summed_over_those_that_are_up_and_counts_over_all_that_were() -> None:
    joined = JoinedStats(2)
    hello = structs.replace(HELLO, num_blocks=10)
    for engine in (0, 1):
        joined.on_ready(engine, hello)
    assert joined.idle() == stats(free_blocks=20)
    joined.join(0, stats(free_blocks=7, used_blocks=3, preemptions=2, decode_rows=5))
    told = joined.join(1, stats(free_blocks=4, used_blocks=6, preemptions=1, decode_rows=2))
    assert told == stats(free_blocks=11, used_blocks=9, preemptions=3, decode_rows=2)
    joined.on_lost(0)
    assert joined.idle() == stats(free_blocks=4, used_blocks=6, preemptions=3)
    joined.on_ready(0, hello)
    told = joined.join(0, stats(free_blocks=10, preemptions=1))
    assert told == stats(free_blocks=14, used_blocks=6, preemptions=4)
    joined.on_lost(0)
    joined.on_lost(1)
    joined.restart()
    assert joined.idle() == NOTHING


def test_tables_are_joined_by_adapter() -> None:
    one = {
        "a": AdapterStatus("a", "resident", 5, 2, host_bytes=1, last_used=3.0, load_seconds=0.5),
        "b": AdapterStatus("b", "host", 0, 0, host_bytes=4),
        "c": AdapterStatus("c", "loading", 0, 1),
    }
    other = {
        "a": AdapterStatus("a", "resident", 5, 1, pinned=True, merged_bytes=9, last_used=2.0),
        "b": AdapterStatus("b", "draining", 5, 1),
    }
    joined = join_tables([one, other], ["x", "y"])
    assert joined == {
        "a": AdapterStatus(
            "a", "resident", 10, 3, host_bytes=1, pinned=True, merged_bytes=9, last_used=3.0,
            load_seconds=0.5, devices=["x", "y"],
        ),
        "b": AdapterStatus("b", "draining", 5, 1, host_bytes=4, devices=["y"]),
        "c": AdapterStatus("c", "loading", 0, 1),
    }  # fmt: skip


HELLO = Hello(None, 1, 16, 0)  # type: ignore[arg-type]
