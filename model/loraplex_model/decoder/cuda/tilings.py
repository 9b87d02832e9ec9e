"""How products with NF4 weights are cut into programs, and the scratch memory that this takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from loraplex_model.base.weights import BLOCK
from loraplex_model.decoder.cuda.pack import TILE


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one product is cut into programs.

    Attributes:
        out_tile: weight rows of a program: 64, 128 or 256, and a divisor of the padded rows.
        row_tile: activation rows of a program, a power of two from 16.
        split: programs that share the input dimension of a tile.
        unroll: blocks of 64 inputs in one step of the loop; divides those of every program.
        warps, stages: of Triton.
    """

    out_tile: int
    row_tile: int
    split: int = 1
    unroll: int = 1
    warps: int = 4
    stages: int = 3

    @property
    def name(self) -> str:
        """Name in reports and in the file of timings."""
        shape = f"{self.out_tile}x{self.row_tile}"
        return f"nf4 {shape} split {self.split} unroll {self.unroll} w{self.warps} s{self.stages}"

    def grid(self, shape: tuple[int, int], rows: int) -> tuple[int, int, int]:
        """Programs along the rows, along the outputs, and along the input."""
        return -(-rows // self.row_tile), -(-shape[0] // self.out_tile), self.split


_FAMILIES: Mapping[int, Sequence[Tiling]] = {
    16: (
        Tiling(64, 16, unroll=2),
        Tiling(128, 16, unroll=2),
        Tiling(64, 16, unroll=4, stages=4),
    ),
    32: (
        Tiling(64, 32, unroll=2),
        Tiling(128, 32, unroll=2),
    ),
    64: (
        Tiling(64, 64, unroll=2),
        Tiling(256, 64, warps=8),
    ),
    128: (Tiling(64, 128, warps=8),),
}
"""Configurations by their activation rows, without the split, for any device."""

_WITH_WARP_GROUPS: Mapping[int, Sequence[Tiling]] = {
    64: (
        Tiling(128, 64, unroll=2, warps=8),
        Tiling(64, 64, unroll=2),
        Tiling(256, 64, warps=8),
    ),
    128: (
        Tiling(128, 128, unroll=2, warps=8),
        Tiling(128, 128, warps=8),
        Tiling(64, 128),
    ),
}
"""The same for devices of `WARP_GROUPS`; elsewhere some of these spill registers."""

WARP_GROUPS = 9
"""Major compute capability of the devices whose matrix instructions take the work of four warps."""

_PROGRAMS = 3
"""Programs for each multiprocessor that keep enough reads in flight. An estimate, not measured: a
program reads 4 to 8 KiB at a time, and 3 TB/s at a latency of 0.8 microseconds need 18 KiB on each
of 132 multiprocessors."""

_MOST_SPLITS = 16


def tilings(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, processors: int, major: int
) -> Sequence[Tiling]:
    """Configurations for a product of `rows` rows; without a measurement, the first is taken.

    They depend on the tile that holds `rows`, not on `rows` itself, and on the device's
    multiprocessors and major compute capability.
    """
    row_tile = min(max(_FAMILIES), max(min(_FAMILIES), 1 << (rows - 1).bit_length()))
    families = _FAMILIES[row_tile]
    if major == WARP_GROUPS:
        families = _WITH_WARP_GROUPS.get(row_tile, families)
    if dtype == torch.float32:  # no tensor cores: each thread needs registers for both operands
        row_tile = min(row_tile, 32)
        families = (Tiling(64, row_tile),)
    padded, blocks = shape[0] + -shape[0] % TILE, shape[1] // BLOCK
    found: dict[Tiling, None] = {}
    for family in families:
        if padded % family.out_tile:
            continue
        programs = padded // family.out_tile * -(-rows // row_tile)
        split = 1
        while split < _MOST_SPLITS and programs * split < _PROGRAMS * processors:
            split *= 2
        wider = split * 2 if split > 1 and row_tile <= 32 else split
        for each in dict.fromkeys((split, split // 2, wider)):
            if 1 <= each <= min(_MOST_SPLITS, max(1, blocks // 4)):
                found[_fitted(family, each, blocks)] = None
        if not found:
            found[_fitted(family, max(1, blocks // 8), blocks)] = None
    return list(found)


def _fitted(family: Tiling, split: int, blocks: int) -> Tiling:
    unroll = family.unroll
    while blocks % (split * unroll):
        unroll //= 2
        if unroll <= 1:
            return replace(family, split=split, unroll=1)
    return replace(family, split=split, unroll=unroll)


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """Device memory of products with a split input. Used by one stream at a time.

    Attributes:
        partials: float32, sums of the programs of every tile.
        arrivals: int32, for every tile the number of programs that have ended; 0 between launches.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def for_launches(
        cls, launches: Sequence[tuple[Tiling, tuple[int, int], int]], device: torch.device | str
    ) -> Scratch:
        """Memory for the largest of launches, each a tiling, a shape and a number of rows."""
        sums, tiles = 1, 1
        for tiling, shape, rows in launches:
            if tiling.split > 1:
                across, along, split = tiling.grid(shape, rows)
                tiles = max(tiles, across * along)
                sums = max(sums, across * along * split * tiling.out_tile * tiling.row_tile)
        return cls(
            torch.zeros(sums, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )
