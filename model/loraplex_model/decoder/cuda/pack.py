"""The layout in which the CUDA kernels read NF4 weights.

Rows are grouped in tiles of 64, padded with zero bytes. Blocks of 64 weights follow one another
along the input, and within a block byte j holds code j in its low half and code j + 32 in its high
half. A warp reads whole blocks side by side, and both halves of a byte meet contiguous inputs.
Maxima stay as they were stored: bytes of the dynamic code, or float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.ops import nf4

TILE = 64
"""Number of output rows that lie side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMatrix:
    """A stacked NF4 matrix in the kernels' layout, with its bias. Written once, never changed.

    A matrix whose rows do not hold whole blocks has only `dense`, and `codes` is empty.

    Attributes:
        shape: (out, in) without padding.
        codes: uint8 [tiles, in / 64, 64, 32].
        absmax: uint8, or float32 without double quantisation, [tiles, in / 64, 64].
        starts: int32 [tiles * 64]: the number of a row's first block, where every module begins at
            a multiple of 256, so that block b of a row has scale (start + b) / 256.
        scales: float32, of all modules; one unused number without double quantisation.
        offsets: float32 [tiles * 64], the module's offset for each row.
        levels: float32 [256], values of the dynamic code.
        values: float32 [16], values of NF4.
        bias: [out] in the compute dtype, or None.
        dense: [out, in] in the compute dtype if there are no codes.
    """

    shape: tuple[int, int]
    codes: torch.Tensor
    absmax: torch.Tensor
    starts: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    levels: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None
    dense: torch.Tensor | None

    @property
    def is_nested(self) -> bool:
        """Whether the maxima are quantised too."""
        return self.absmax.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.codes, self.absmax, self.starts, self.scales, self.offsets)
        return sum(each.nbytes for each in (*tensors, self.bias, self.dense) if each is not None)


def pack_matrix(
    matrix: NF4Matrix,
    bias: torch.Tensor | None,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> DeviceMatrix:
    """Brings a matrix to `device` in the kernels' layout; every weight keeps its exact value.

    `dtype` is the compute dtype: of the bias, and of the copy that replaces the codes if rows do
    not hold whole blocks.
    """
    whole = matrix.shape[1] % BLOCK == 0
    dense = None if whole else nf4.dequantize(matrix).to(dtype).to(device)
    codes, absmax = _tiles(matrix) if whole else (_nothing(), _nothing())
    starts, offsets = _numbering(matrix) if whole else (_nothing(), _nothing())
    scales = torch.cat(matrix.absmax_scales) if matrix.absmax_scales else torch.ones(1)
    return DeviceMatrix(
        shape=matrix.shape,
        codes=codes.to(device),
        absmax=absmax.to(device),
        starts=starts.to(device),
        scales=scales.to(device),
        offsets=offsets.to(device),
        levels=nf4.dynamic_map().to(device),
        values=nf4.nf4_code(device),
        bias=None if bias is None else bias.to(device, dtype).contiguous(),
        dense=dense,
    )


def codes_in_rows(matrix: DeviceMatrix) -> torch.Tensor:
    """The codes as an `NF4Matrix` holds them, uint8 [out * in / 2], for bitsandbytes."""
    out, fan_in = matrix.shape
    rows = matrix.codes.transpose(1, 2).reshape(-1, fan_in // BLOCK, BLOCK // 2)[:out]
    pairs = torch.cat([rows & 15, rows >> 4], dim=-1).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def maxima_in_rows(matrix: DeviceMatrix) -> torch.Tensor:
    """The maxima of all blocks, float32 [out, in / 64], bit for bit those of `nf4.absmax_float`."""
    out, fan_in = matrix.shape
    blocks = fan_in // BLOCK
    maxima = matrix.absmax.transpose(1, 2).reshape(-1, blocks)[:out]
    if not matrix.is_nested:
        return maxima.contiguous()
    numbers = matrix.starts[:out, None] + torch.arange(blocks, device=maxima.device)
    scales = matrix.scales[numbers // nf4.NESTED_BLOCK]
    return matrix.levels[maxima.int()].mul_(scales).add_(matrix.offsets[:out, None])


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _tiles(matrix: NF4Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and maxima in tiles of rows, on the device where `matrix` is."""
    out, fan_in = matrix.shape
    blocks, padding = fan_in // BLOCK, -out % TILE
    packed = matrix.packed.view(out, blocks, BLOCK // 2)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(out, blocks, 2, BLOCK // 2)
    merged = codes[:, :, 0] | (codes[:, :, 1] << 4)
    absmax = matrix.absmax.view(out, blocks)
    if padding:
        merged = torch.nn.functional.pad(merged, (0, 0, 0, 0, 0, padding))
        absmax = torch.nn.functional.pad(absmax, (0, 0, 0, padding))
    tiles = (out + padding) // TILE
    return (
        merged.view(tiles, TILE, blocks, BLOCK // 2).transpose(1, 2).contiguous(),
        absmax.view(tiles, TILE, blocks).transpose(1, 2).contiguous(),
    )


def _numbering(matrix: NF4Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """`starts` and `offsets` of `DeviceMatrix`; padding rows are like rows of zeros."""
    out, fan_in = matrix.shape
    blocks = fan_in // BLOCK
    starts = torch.zeros(out + -out % TILE, dtype=torch.int32)
    offsets = torch.zeros(len(starts))
    first_row, first_block = 0, 0
    modules = zip(matrix.rows, matrix.absmax_scales, matrix.absmax_offsets, strict=True)
    for rows, scales, offset in modules if matrix.absmax_scales else ():
        end = first_row + rows
        starts[first_row:end] = first_block + torch.arange(rows, dtype=torch.int32) * blocks
        offsets[first_row:end] = offset
        first_row, first_block = end, first_block + len(scales) * nf4.NESTED_BLOCK
    return starts, offsets
