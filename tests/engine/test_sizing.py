"""The size of the KV cache, by the settings and by the memory of a device."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.sizing import CacheSizer, DeviceMemory, blocks_left, given_blocks

GIB = 1 << 30


def settings_with(**given: Any) -> RunnerConfig:
    plain: dict[str, Any] = {
        "model": "m",
        "dtype": "bfloat16",
        "device": "cuda",
        "threads": 0,
        "cache": "c",
        "max_context": 0,
        "kv_tokens": 0,
        "kv_memory": 0,
        "adapter_memory": 0,
        "max_rank": 8,
    }
    return RunnerConfig(**(plain | given))


def test_on_a_cpu_the_cache_takes_512_mebibytes_unless_the_settings_say_otherwise() -> None:
    assert given_blocks(settings_with(), 16, 1 << 10) == (512 << 20) // (16 << 10)
    assert given_blocks(settings_with(kv_memory=1 << 20), 16, 1 << 10) == 64
    assert given_blocks(settings_with(kv_tokens=100), 16, 1 << 10) == 6
    with pytest.raises(Refusal, match="kv_tokens") as refused:
        given_blocks(settings_with(kv_tokens=15), 16, 1 << 10)
    assert refused.value.reason is Reason.KV_TOO_SMALL


@given(
    total=st.integers(1, 80),
    elsewhere=st.integers(0, 20),
    fraction=st.floats(0.1, 1.0),
    taken=st.lists(st.integers(0, 8 * GIB), max_size=4),
    prefix=st.integers(0, 64),
)
def test_the_cache_takes_all_that_is_left_and_never_more(
    total: int, elsewhere: int, fraction: float, taken: list[int], prefix: int
) -> None:
    parts = {str(i): nbytes for i, nbytes in enumerate(taken)}
    memory = DeviceMemory(total * GIB, elsewhere * GIB, parts)
    block = 32 * 131_072
    try:
        blocks = blocks_left(settings_with(gpu_memory=fraction), memory, 32, 131_072, prefix)
    except Refusal:
        blocks = 0
    used = memory.elsewhere + sum(taken) + prefix * block
    limit = int(memory.total * fraction)
    assert not blocks or used + blocks * block <= limit
    assert used + (blocks + 1) * block > limit


def test_a_size_that_is_given_must_fit_and_the_message_names_every_part() -> None:
    memory = DeviceMemory(8 * GIB, GIB, {"weights": 4 * GIB, "adapters": GIB})
    fits = settings_with(gpu_memory=1.0, kv_memory=2 * GIB)
    assert blocks_left(fits, memory, 32, 1 << 15, 0) == 2 * GIB // (32 << 15)
    with pytest.raises(Refusal) as refused:
        blocks_left(settings_with(gpu_memory=0.9, kv_memory=2 * GIB), memory, 32, 1 << 15, 0)
    for part in ("weights 4096 MiB", "adapters 1024 MiB", "CUDA 1024 MiB", "gpu_memory 0.9"):
        assert part in refused.value.message


def test_copies_take_a_part_of_what_the_settings_leave_and_nothing_on_a_cpu() -> None:
    config = settings_with(gpu_memory=0.5, merge_memory=GIB, adapter_memory=2 * GIB, kv_tokens=100)
    used = 1 + 4 + 2  # elsewhere, base, adapters
    sizer = CacheSizer(config, GIB // 100, GIB, lambda: ((40 - used) * GIB, 40 * GIB))
    left = (20 - used - 4 - 1) * GIB - GIB // 100 * 100  # base again, merges, cache
    assert sizer.room_for_copies() == left // 4
    tight = CacheSizer(settings_with(gpu_memory=0.2), 1, GIB, sizer.measure)
    assert tight.room_for_copies() == 0
    assert CacheSizer(config, 1).room_for_copies() == 0


def test_what_is_on_the_device_is_measured_and_what_comes_later_is_left_free() -> None:
    free = [8 * GIB]
    config = settings_with(gpu_memory=1.0, merge_memory=GIB, virtual_tokens=100)
    sizer = CacheSizer(config, 1 << 15, 2 * GIB, lambda: (free[0], 10 * GIB))
    free[0] -= 3 * GIB
    blocks = sizer(32, {"graphs": GIB})
    assert sizer.prefix_blocks(32) == 4
    assert blocks == 3 * GIB // (32 << 15)
