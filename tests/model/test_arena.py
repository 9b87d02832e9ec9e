"""The arena of adapters: nothing overlaps or is lost, and whatever fits by bytes finds room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.decoder.cuda.memory import arena as arenas
from loraplex_model.decoder.cuda.memory.arena import GRANULE, ArenaFull, DeviceArena
from loraplex_model.decoder.cuda.memory.ranges import Ranges

CPU = torch.device("cpu")


def adapter(nbytes: int) -> PackedAdapter:
    return PackedAdapter(torch.empty(nbytes, dtype=torch.uint8), {}, {}, {})


class _Tenant:
    """An adapter in the arena with a value that all its bytes have."""

    def __init__(self, arena: DeviceArena, nbytes: int, value: int) -> None:
        self.value = value
        self.placed = arena.place(adapter(nbytes), self.move)
        self.placed.data.fill_(value)

    def move(self, moved: PackedAdapter) -> None:
        assert moved.nbytes == self.placed.nbytes
        self.placed = moved

    def check(self) -> None:
        assert bool((self.placed.data == self.value).all())


@given(
    steps=st.lists(
        st.one_of(st.integers(0, 60_000), st.integers(-64, -1)), min_size=1, max_size=80
    ),
    scratch=st.sampled_from([GRANULE, 3 * GRANULE, 1 << 20]),
)
@settings(max_examples=200, deadline=None)
def test_adapters_that_fit_by_bytes_find_room_and_keep_their_bytes(
    steps: list[int], scratch: int
) -> None:
    budget, most = 200_000, 12
    before, arenas._SCRATCH = arenas._SCRATCH, scratch
    try:
        arena = DeviceArena(DeviceArena.size_for(budget, most), CPU)
    finally:
        arenas._SCRATCH = before
    there: list[_Tenant] = []
    for number, step in enumerate(steps):
        if step < 0:
            if there:
                arena.free(there.pop(step % len(there)).placed)
        elif len(there) < most and sum(t.placed.nbytes for t in there) + step <= budget:
            there.append(_Tenant(arena, step, number % 250 + 1))
        for tenant in there:
            tenant.check()
        assert arena.used == sum(max(1, -(-t.placed.nbytes // GRANULE)) * GRANULE for t in there)


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    arena = DeviceArena(4 * GRANULE, CPU)
    tenant = _Tenant(arena, 3 * GRANULE, 7)
    with pytest.raises(ArenaFull, match=str(3 * GRANULE)):
        arena.place(adapter(GRANULE + 1), lambda _: None)
    tenant.check()
    assert (arena.used, arena.moves) == (3 * GRANULE, 0)


def test_gaps_that_are_too_small_are_joined_by_moving_adapters() -> None:
    arena = DeviceArena(6 * GRANULE, CPU)
    tenants = [_Tenant(arena, GRANULE, value) for value in range(1, 7)]
    for gone in (tenants[0], tenants[2], tenants[4]):
        arena.free(gone.placed)
    large = _Tenant(arena, 3 * GRANULE, 9)
    for tenant in (tenants[1], tenants[3], tenants[5], large):
        tenant.check()
    assert arena.moves == 3


def test_the_smallest_gap_that_is_large_enough_is_taken() -> None:
    ranges = Ranges(10, 1)
    starts = [ranges.place(n) for n in (3, 1, 2, 1, 3)]
    assert starts == [0, 3, 4, 6, 7]
    ranges.free(0)
    ranges.free(4)
    assert ranges.place(2) == 4
    assert ranges.place(4) is None
    assert ranges.place(3) == 0
