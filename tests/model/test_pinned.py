"""Pinned host memory: taken once, given back with the last reference, never overrun."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from loraplex_model.decoder.cuda.memory.pinned import PinnedArena

PAGE = 4096


def pinned(address: int, nbytes: int) -> str | None:
    assert address % PAGE == 0
    assert nbytes >= PAGE
    return None


def test_memory_is_given_back_with_the_last_view_of_it() -> None:
    arena = PinnedArena(4 * PAGE, pinned)
    whole = arena.zeros(3 * PAGE)
    view = whole[PAGE : PAGE + 8].view(torch.float32)
    view.fill_(2.0)
    assert arena.used == 3 * PAGE
    del whole
    gc.collect()
    assert arena.used == 3 * PAGE
    assert view.tolist() == [2.0, 2.0]
    del view
    gc.collect()
    assert arena.used == 0


def test_a_tensor_is_zero_although_its_memory_was_used_before() -> None:
    arena = PinnedArena(2 * PAGE, pinned)
    arena.zeros(2 * PAGE).fill_(7)
    gc.collect()
    assert not arena.zeros(2 * PAGE).any()
    assert arena.used in (0, 2 * PAGE)


def test_what_does_not_fit_is_in_ordinary_memory_and_takes_nothing() -> None:
    arena = PinnedArena(2 * PAGE, pinned)
    first = arena.zeros(PAGE + 1)
    second = arena.zeros(PAGE)
    second.fill_(1)
    first.fill_(2)
    assert arena.used == 2 * PAGE
    assert bool((second == 1).all())


def test_without_pinning_there_is_a_warning_and_ordinary_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arena = PinnedArena(4 * PAGE, lambda *_: "the limit is 0")
    assert "the limit is 0" in caplog.text
    assert arena.zeros(PAGE).sum() == 0
    assert (arena.size, arena.used) == (0, 0)


def test_threads_that_take_and_drop_never_share_bytes() -> None:
    arena = PinnedArena(64 * PAGE, pinned)
    wrong: list[int] = []

    def work(value: int) -> None:
        for turn in range(200):
            tensor = arena.zeros((turn * 7919 + value) % (6 * PAGE) + 1)
            tensor.fill_(value)
            if not bool((tensor == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert arena.used == 0
