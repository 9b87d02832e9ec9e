"""The kernels' layout of NF4 weights, and the choice among implementations of a product.

None of it needs Triton or a GPU.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loraplex_model.base.weights import NF4Matrix
from loraplex_model.decoder.cuda.choices import Group, Times, Timings, best, place_copies
from loraplex_model.decoder.cuda.pack import (
    TILE,
    codes_in_rows,
    maxima_in_rows,
    pack_matrix,
)
from loraplex_model.decoder.cuda.support import obstacle_to_bitsandbytes
from loraplex_model.ops import nf4


def stacked(*rows: int, fan_in: int) -> NF4Matrix:
    random = torch.Generator().manual_seed(fan_in)
    parts = [
        nf4.quantise(torch.randn(count, fan_in, generator=random) * (n + 1))
        for n, count in enumerate(rows)
    ]
    return nf4.stack(parts)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("rows", [(64,), (70, 30), (1,), (128, 300, 5)], ids=str)
def test_packing_keeps_every_bit(rows: tuple[int, ...], nested: bool) -> None:
    """With 300 rows of 192 weights a module has several scales, and rows that lie across two."""
    matrix = stacked(*rows, fan_in=192)
    if not nested:
        plain = nf4.maxima(matrix)
        matrix = replace(matrix, absmax=plain, absmax_scales=(), absmax_offsets=())
    packed = pack_matrix(matrix, None, "cpu")
    assert packed.is_nested == nested
    assert packed.codes.shape == (-(-sum(rows) // TILE), 3, TILE, 32)
    assert torch.equal(codes_in_rows(packed), matrix.packed)
    assert torch.equal(maxima_in_rows(packed), nf4.absmax_float(matrix))


def test_a_byte_holds_codes_that_are_32_apart() -> None:
    matrix = stacked(64, fan_in=128)
    codes = torch.stack([matrix.packed >> 4, matrix.packed & 15], dim=-1).view(64, 2, 64)
    packed = pack_matrix(matrix, None, "cpu").codes
    row, block, place = 37, 1, 20
    byte = int(packed[0, block, row, place])
    assert byte & 15 == codes[row, block, place]
    assert byte >> 4 == codes[row, block, place + 32]


def test_rows_without_whole_blocks_become_dense() -> None:
    matrix = stacked(7, 4, fan_in=80)
    bias = torch.ones(11)
    packed = pack_matrix(matrix, bias, "cpu", dtype=torch.float16)
    assert packed.dense is not None
    assert torch.equal(packed.dense, nf4.dequantize(matrix).half())
    assert packed.bias is not None
    assert packed.bias.dtype == torch.float16
    assert packed.nbytes == 11 * 80 * 2 + 11 * 2 + packed.scales.nbytes


SHAPE = (4096, 4096)
TIMES: Times = {"a": 3.0, "b": math.inf}


def kept(path: Path, card: str = "card") -> Times | None:
    return Timings(path, card).get(SHAPE, 16, ["a", "b"])


def test_times_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "times.json"
    timings = Timings(path, "card")
    assert timings.get(SHAPE, 16, ["a"]) is None
    timings.put(SHAPE, 16, TIMES)
    timings.save()
    assert kept(path) == TIMES
    assert Timings(path, "card").rows() == [(SHAPE, 16, TIMES)]
    assert kept(path, "another card") is None
    assert Timings(path, "card").get(SHAPE, 32, ["a"]) is None
    assert Timings(path, "card").get(SHAPE, 16, ["a", "new"]) is None


def test_the_times_of_other_cards_stay(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    for number in range(20):
        timings = Timings(path, f"card {number}")
        timings.put(SHAPE, 16, TIMES)
        timings.save()
    assert [kept(path, f"card {number}") for number in (3, 4, 19)] == [None, TIMES, TIMES]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": 1}',
        '{"format": 1, "cards": 3}',
        '{"format": 1, "cards": {"card": {"4096x4096": {"16": {"a": "fast", "b": 1}}}}}',
        '{"format": 1, "cards": {"card": {"4096x4096": {"16": {"a": -1.0, "b": 1}}}}}',
        '{"format": 1, "cards": {"card": {"4096": {"16": {"a": 1.0, "b": 1}}}}}',
        '{"format": 1, "cards": {"card": {"4096x4096": [1]}}}',
    ],
)
def test_a_damaged_file_is_made_again(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "times.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        timings = Timings(path, "card")
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "The file of products' times is damaged and will be made again"
    ]
    timings.put(SHAPE, 16, TIMES)
    timings.save()
    assert kept(path) == TIMES


def test_a_file_of_another_format_is_made_again_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"format": 2}))
    assert kept(path) is None
    assert not caplog.records


def test_times_that_cannot_be_kept_are_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    timings = Timings(tmp_path / "file" / "times.json", "card")
    timings.put(SHAPE, 16, TIMES)
    timings.save()
    assert "Times of products are not kept" in caplog.text


def test_the_fastest_possible_candidate_is_chosen() -> None:
    times = {"ours": 2.0, "dense": 1.0, "bitsandbytes": 1.5}
    copies = {"dense": 1, "bitsandbytes": 2}
    assert [best(times, copies, index) for index in range(3)] == ["dense", "bitsandbytes", "ours"]


def test_copies_go_where_a_byte_saves_most_time() -> None:
    wide = Group(
        (8, 8),
        4,
        {1: {"ours": 5.0, "dense": 9.0}, 64: {"ours": 50.0, "dense": 40.0}},
        {"dense": 100},
    )
    deep = Group(
        (8, 4),
        4,
        {1: {"ours": 5.0, "dense": 9.0}, 64: {"ours": 50.0, "dense": 42.0}},
        {"dense": 50},
    )
    place_copies([wide, deep], 350)
    assert (wide.copies, deep.copies) == ({"dense": 1}, {"dense": 4})


def test_a_second_kind_of_copy_counts_what_the_first_has_saved() -> None:
    times = {1: {"ours": 10.0, "dense": 4.0, "bitsandbytes": 5.0}}
    group = Group((8, 8), 2, times, {"dense": 100, "bitsandbytes": 30})
    place_copies([group], 1000)
    assert group.copies == {"dense": 2, "bitsandbytes": 2}  # 5 µs for 30 bytes, then 1 µs for 100
    group.times = {1: {"ours": 10.0, "dense": 5.0, "bitsandbytes": 5.0}}
    place_copies([group], 1000)
    assert group.copies == {"dense": 0, "bitsandbytes": 2}


def test_a_slower_copy_is_never_made() -> None:
    group = Group((8, 8), 2, {1: {"ours": 1.0, "dense": 2.0}}, {"dense": 100})
    place_copies([group], 10**9)
    assert group.copies == {"dense": 0}


def test_what_bitsandbytes_offers_is_found_without_importing_it() -> None:
    assert obstacle_to_bitsandbytes(None) == "torch is built without CUDA"
    assert "no library for CUDA 99.1" in str(obstacle_to_bitsandbytes("99.1"))
