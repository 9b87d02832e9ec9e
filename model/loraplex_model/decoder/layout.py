"""The structs of `cpu/model.h`, `cpu/matmul.h` and `cpu/adapters.h`, field by field.

tests/kernels/test_layout.py compares them with the headers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from enum import IntEnum
from functools import cache

import torch

from loraplex_model.adapters.table import SlotTable
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.config import NormSpan
from loraplex_model.ops import mapping

PANEL = 16
"""Number of output rows of a panel, as in `cpu/matmul.h`."""


class Storage(IntEnum):
    """Storage of a matrix's weights, as in `cpu/matmul.h`."""

    NF4 = 0
    BF16 = 1
    F32 = 2
    NF4_PACKED = 3
    BF16_PACKED = 4


class Span(IntEnum):
    """What a norm of queries or keys runs over, as `NormSpan` in `cpu/model.h`."""

    HEAD_SPAN = 0
    EACH_SPAN = 1
    ALL_SPAN = 2

    @staticmethod
    def of(span: NormSpan) -> Span:
        """The number of a span."""
        return Span[f"{span.name}_SPAN"]


class Fault(IntEnum):
    """What a pass returns, as in `cpu/bounds.h`."""

    NO_FAULT = 0
    NO_MEMORY = 1
    BAD_ROWS = 2
    BAD_TOKEN = 3
    BAD_POSITION = 4
    BAD_BLOCK = 5
    BAD_SLOT = 6


class PassOutOfBounds(Exception):
    """A number of a batch is outside of the table that it indexes; nothing was computed.

    This is a programming error: requests and adapters are checked long before.
    """


FAULTS = {
    Fault.BAD_ROWS: "its row counts contradict each other",
    Fault.BAD_TOKEN: "a token id is outside of the vocabulary and the adapter's virtual tokens",
    Fault.BAD_POSITION: "a position is outside of the longest sequence or of its block table",
    Fault.BAD_BLOCK: "a block is outside of the KV cache",
    Fault.BAD_SLOT: "an adapter slot is outside of the slot table",
}


class CMatrix(Structure):
    """The struct `Matrix`: weights in panels of 16 output rows."""

    _fields_ = (
        ("data", c_void_p),
        ("absmax", c_void_p),
        ("bias", c_void_p),
        ("out", c_int32),
        ("in_", c_int32),
        ("kind", c_int32),
        ("reserved", c_int32),
    )


class CNormWeights(Structure):
    """The struct `NormWeights`."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class CRotary(Structure):
    """The struct `Rotary`."""

    _fields_ = (
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("half", c_int32),
        ("reserved", c_int32),
    )


class CLayer(Structure):
    """The struct `Layer`."""

    _fields_ = (
        ("input_norm", CNormWeights),
        ("post_norm", CNormWeights),
        ("q_norm", CNormWeights),
        ("k_norm", CNormWeights),
        ("attention_output_norm", CNormWeights),
        ("mlp_output_norm", CNormWeights),
        ("qkv", CMatrix),
        ("o", CMatrix),
        ("gate_up", CMatrix),
        ("down", CMatrix),
        ("router", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int32),
        ("rotary", c_int32),
    )


class CSlotTable(Structure):
    """The struct `SlotTable`."""

    _fields_ = (
        ("entries", c_void_p),
        ("max_ranks", c_void_p),
        ("uses", c_void_p),
        ("prompts", c_void_p),
        ("merged", c_void_p),
        ("prompt_counts", c_void_p),
        ("layers", c_int32),
        ("slots", c_int32),
    )


class CModel(Structure):
    """The struct `Model`."""

    _fields_ = (
        ("layers", POINTER(CLayer)),
        ("embed", c_void_p),
        ("norm", CNormWeights),
        ("lm_head", CMatrix),
        ("rotaries", POINTER(CRotary)),
        ("query_scale", c_void_p),
        ("adapters", CSlotTable),
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("threads", c_int32),
        ("eps", c_float),
        ("attention_scale", c_float),
        ("norm_offset", c_float),
        ("embed_scale", c_float),
        ("residual_scale", c_float),
        ("logit_scale", c_float),
        ("logit_softcap", c_float),
        ("attention_softcap", c_float),
        ("embed_in_panels", c_int32),
        ("bf16_storage", c_int32),
        ("layer_norm", c_int32),
        ("qk_span", c_int32),
        ("activation", c_int32),
        ("gated", c_int32),
        ("parallel", c_int32),
        ("interleaved", c_int32),
        ("long_rotary", c_int32),
        ("scaled_prompts", c_int32),
        ("vocab", c_int32),
        ("positions", c_int32),
        ("blocks", c_int32),
        ("num_experts", c_int32),
        ("experts_per_token", c_int32),
        ("normalised_experts", c_int32),
        ("bf16_products", c_int32),
    )


class CBatch(Structure):
    """The struct `Batch`."""

    _fields_ = (
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("query_starts", c_void_p),
        ("block_tables", c_void_p),
        ("mix_starts", c_void_p),
        ("mix_slots", c_void_p),
        ("mix_weights", c_void_p),
        ("logit_rows", c_void_p),
        ("state_rows", c_void_p),
        ("is_long", c_void_p),
        ("num_tokens", c_int32),
        ("num_sequences", c_int32),
        ("table_width", c_int32),
        ("num_logits", c_int32),
        ("num_states", c_int32),
        ("num_mixes", c_int32),
        ("num_long", c_int32),
    )


def _pointers(struct: type[Structure], arrays: object) -> dict[str, int]:
    """Addresses of the C-contiguous arrays that are attributes with the names of void pointers."""
    found = {}
    for name in _pointer_names(struct):
        array = getattr(arrays, name)
        assert array.flags.c_contiguous
        found[name] = array.ctypes.data
    return found


@cache
def _pointer_names(struct: type[Structure]) -> list[str]:
    return [name for name, kind, *_ in struct._fields_ if kind is c_void_p]


def c_adapters(table: SlotTable) -> CSlotTable:
    """The C struct that points to the table's arrays; `table` must outlive it."""
    return CSlotTable(
        **_pointers(CSlotTable, table), layers=table.merged.shape[1], slots=len(table.uses)
    )


def c_batch(batch: ForwardBatch) -> CBatch:
    """The C struct that points to the batch's arrays; `batch` must outlive it."""
    return CBatch(
        **_pointers(CBatch, batch),
        num_tokens=len(batch.tokens),
        num_sequences=len(batch.context_lens),
        table_width=batch.block_tables.shape[1],
        num_logits=len(batch.logit_rows),
        num_states=len(batch.state_rows),
        num_mixes=len(batch.mix_slots),
        num_long=len(batch.is_long),
    )


def nf4_room(out: int, fan_in: int) -> int:
    """Bytes that `nf4_panels` takes from an arena for a matrix [out, in]."""
    weights = -(-out // PANEL) * PANEL * fan_in
    return mapping.Arena.room(weights // 2) + mapping.Arena.room(weights // 64 * 4)


def _empty(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(count, dtype=dtype)


def nf4_panels(
    library: ctypes.CDLL,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    out: int,
    fan_in: int,
    *,
    bf16_products: bool = False,
    empty: Callable[[int, torch.dtype], torch.Tensor] = _empty,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rearranges codes, uint8 [out * in / 2], and absmax, float32 [out, in / 64], into panels.

    With `bf16_products` they have the library's form for products of bfloat16. `empty` makes
    tensors of a number of elements and a type.
    """
    assert packed.numel() * 2 == out * fan_in
    assert absmax.numel() * 64 == out * fan_in
    count = -(-out // PANEL)
    codes = empty(count * fan_in // 8 * PANEL, torch.int32)
    scales = empty(count * (fan_in // 64) * PANEL, torch.float32)
    absmax = absmax.contiguous()
    pack = library.loraplex_pack_nf4_bf16 if bf16_products else library.loraplex_pack_nf4
    pack(
        c_void_p(packed.data_ptr()),
        c_void_p(absmax.data_ptr()),
        out,
        fan_in,
        c_void_p(codes.data_ptr()),
        c_void_p(scales.data_ptr()),
    )
    return codes, scales


def dense_panels(rows: torch.Tensor) -> torch.Tensor:
    """Rearranges a dense matrix [out, in], float32 or bfloat16, into panels."""
    out, fan_in = rows.shape
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -out % PANEL))
    return padded.view(-1, PANEL, fan_in).transpose(1, 2).contiguous().view(-1)


def packed_panels(library: ctypes.CDLL, rows: torch.Tensor) -> torch.Tensor:
    """Rearranges a dense matrix [out, in], bfloat16, for the library's products of bfloat16."""
    assert rows.dtype == torch.bfloat16
    rows = rows.contiguous()
    out, fan_in = rows.shape
    count = -(-out // PANEL) * PANEL * (-(-fan_in // 32) * 32)
    panels = mapping.zeros(2 * count).view(torch.bfloat16)
    library.loraplex_pack_bf16(c_void_p(rows.data_ptr()), out, fan_in, c_void_p(panels.data_ptr()))
    return panels
