"""Copies of adapters to the device: begun, awaited, given up, and never into memory in use."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.decoder.cuda.memory.arena import GRANULE, ArenaFull, DeviceArena
from loraplex_model.decoder.cuda.memory.copies import DeviceAdapters
from model.immediate_copies import ImmediateCopies

CPU = torch.device("cpu")


def adapter(granules: int, value: int) -> PackedAdapter:
    data = torch.full((granules * GRANULE,), value, dtype=torch.uint8)
    return PackedAdapter(data, {}, {}, {})


@dataclass
class SlowCopy:
    """A copy that writes its bytes when the test says so, or when the next pass has to wait."""

    target: torch.Tensor
    source: torch.Tensor
    done: bool = False

    def finish(self) -> None:
        self.target.copy_(self.source)
        self.done = True

    def has_ended(self) -> bool:
        return self.done

    def join(self) -> None:
        if not self.done:
            self.finish()


@dataclass
class SlowCopies:
    begun: list[SlowCopy] = field(default_factory=list)

    def begin(self, target: torch.Tensor, source: torch.Tensor) -> SlowCopy:
        self.begun.append(SlowCopy(target, source))
        return self.begun[-1]


@pytest.fixture
def stream() -> SlowCopies:
    return SlowCopies()


@pytest.fixture
def adapters(stream: SlowCopies) -> DeviceAdapters:
    return DeviceAdapters(DeviceArena(4 * GRANULE, CPU), stream)


def test_an_adapter_is_there_when_its_copy_has_ended(
    adapters: DeviceAdapters, stream: SlowCopies
) -> None:
    one = adapter(2, 5)
    assert not adapters.prepare(one)
    assert not adapters.prepare(one)
    assert len(stream.begun) == 1
    stream.begun[0].finish()
    assert adapters.prepare(one)
    placed = adapters.take(one, lambda _: None)
    assert bool((placed.data == 5).all())
    assert len(stream.begun) == 1


def test_an_adapter_can_be_taken_at_once(adapters: DeviceAdapters) -> None:
    placed = adapters.take(adapter(2, 6), lambda _: None)
    assert bool((placed.data == 6).all())


def test_a_copy_that_is_given_up_frees_its_range_and_ends_before_the_range_is_used_again(
    adapters: DeviceAdapters, stream: SlowCopies
) -> None:
    adapters.prepare(adapter(4, 1))
    assert not adapters.prepare(adapter(3, 2))
    assert stream.begun[0].done
    stream.begun[1].finish()
    assert adapters.arena.used == 3 * GRANULE


def test_a_copy_follows_its_adapter_when_others_make_room(stream: SlowCopies) -> None:
    adapters = DeviceAdapters(DeviceArena(4 * GRANULE, CPU), ImmediateCopies())
    places: dict[int, PackedAdapter] = {}

    def put(granules: int, value: int) -> None:
        made = adapter(granules, value)
        places[value] = adapters.take(made, lambda moved: places.__setitem__(value, moved))

    for value in (1, 2, 3, 4):
        put(1, value)
    adapters.free(places.pop(1))
    adapters.free(places.pop(3))
    put(2, 9)
    assert {value: int(placed.data[0]) for value, placed in places.items()} == {2: 2, 4: 4, 9: 9}
    assert adapters.arena.moves == 2


def test_what_does_not_fit_is_refused_and_nothing_is_left_behind(adapters: DeviceAdapters) -> None:
    with pytest.raises(ArenaFull):
        adapters.prepare(adapter(5, 1))
    assert adapters.arena.used == 0
    assert adapters.take(adapter(4, 2), lambda _: None).nbytes == 4 * GRANULE
