"""LoRA on mixed rows: one launch for A x and one for B h, whatever the number of adapters.

A fused matrix has parts, the projections whose outputs lie side by side. For the rows of a chunk

    y = gain * y + sum over terms of w (B (A x) + bias),    gain = 1 + sum w (gain_i - 1)

where y is the base's result, and addresses and exact ranks come from the table of addresses. Sums
are in float32; y is rounded once, and A x is rounded to the compute dtype, times its weight.

`shrink` writes A x in a fixed number of partial sums over parts of the input, and `expand` adds
these up in order: no atomics, and no sum depends on the other rows or on their adapters. The number
of programs follows from the capacity and the device alone; they share the work that the number of
chunks in device memory implies, so that no replay of a captured graph leaves out an adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from loraplex_model.base.config import Gate
from loraplex_model.decoder.cuda.kernels.common import (
    TYPES,
    Compilation,
    product_precision,
    product_type,
)
from loraplex_model.decoder.cuda.kernels.lora_programs import (
    expand_gated_kernel,
    expand_kernel,
    shrink_kernel,
)
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.plan import RANK_STEP

_MAX_SPLITS = 8
_SPLIT_INPUTS = 256  # inputs of a partial sum, at least
_RANKS = 32  # of a tile: with fewer, some of the four warps of `shrink` would have no columns
_WARPS = 4  # of a program
_SHRINK_PROGRAMS = 4  # for each multiprocessor: as many as it runs at once, by their registers
_EXPAND_PROGRAMS = 3


@dataclass(frozen=True, slots=True)
class ShrinkShape:
    """How `shrink` computes A x for inputs of one width.

    Attributes:
        splits: partial sums.
        span: inputs of a partial sum.
        step: inputs of a tile.
    """

    splits: int
    span: int
    step: int


def shrink_shape(fan_in: int) -> ShrinkShape:
    """The configuration of `shrink`, which depends on the shape of the matrix alone."""
    step = 128 if fan_in >= 1024 else 64
    steps = -(-fan_in // step)
    splits = min(_MAX_SPLITS, max(1, fan_in // _SPLIT_INPUTS))
    per_split = -(-steps // splits)
    return ShrinkShape(-(-steps // per_split), per_split * step, step)


def expand_columns(widths: Sequence[int]) -> int:
    """Outputs of a tile of the expanding kernels for parts of these widths."""
    return 64 if sum(widths) < 2048 else 128


def h_size(lora: LoraPass, fan_in: int, parts: int) -> int:
    """Number of float32 elements of A x for one fused matrix."""
    capacity = lora.capacity
    return shrink_shape(fan_in).splits * parts * capacity.h_rows * capacity.rank_stride


def h_view(scratch: torch.Tensor, lora: LoraPass, fan_in: int, parts: int) -> torch.Tensor:
    """A x of one fused matrix at the front of a float32 buffer.

    Its shape is [partial sums, parts, capacity.h_rows, capacity.rank_stride]. Only the rows of
    chunks and the exact ranks are written and read.
    """
    capacity = lora.capacity
    shape = (shrink_shape(fan_in).splits, parts, capacity.h_rows, capacity.rank_stride)
    return scratch[: h_size(lora, fan_in, parts)].view(shape)


def shrink(x: torch.Tensor, h: torch.Tensor, lora: LoraPass, site: int, parts: int) -> None:
    """Computes A x of all parts of a fused matrix for all chunks.

    `x` is [T, fan_in] in the compute dtype, `h` is that of `h_view`; `site` is the table's index of
    the first part, and the other parts follow.
    """
    _check(h, lora, parts, x)
    constants, options = shrink_configuration(x.shape[1], parts, x.dtype)
    shrink_kernel[_grid(lora, h.shape[0] * parts, _SHRINK_PROGRAMS)](
        x,
        h,
        lora.entries,
        lora.chunk_begin,
        lora.chunk_end,
        lora.chunk_count,
        lora.term_start,
        lora.term_slot,
        lora.term_row,
        h.shape[2],
        h.shape[3],
        lora.sites,
        site,
        **constants,
        **options,
    )


def expand(
    h: torch.Tensor,
    y: torch.Tensor,
    lora: LoraPass,
    site: int,
    widths: Sequence[int],
    dtype: torch.dtype | None = None,
) -> None:
    """Adds the adapters' changes to the base's result `y` [T, sum of widths], in place.

    `h` is what `shrink` wrote, of the same site. `dtype` is that of the adapters' matrices, if it
    is not that of `y` (at the head).
    """
    _check(h, lora, len(widths), y)
    assert y.shape[1] == sum(widths)
    constants, options = expand_configuration(h.shape[0], widths, dtype or y.dtype)
    tiles = sum(triton.cdiv(width, constants["BN"]) for width in widths)
    expand_kernel[_grid(lora, tiles, _EXPAND_PROGRAMS)](
        h,
        y,
        lora.entries,
        lora.chunk_begin,
        lora.chunk_end,
        lora.chunk_count,
        lora.term_start,
        lora.term_slot,
        lora.term_weight,
        lora.term_row,
        h.shape[2],
        h.shape[3],
        lora.sites,
        site,
        **constants,
        **options,
    )


def expand_gated(
    h: torch.Tensor,
    gate_up: torch.Tensor,
    out: torch.Tensor,
    lora: LoraPass,
    site: int,
    activation: Gate = Gate.SILU,
) -> None:
    """`out = activation(gate) * up`, with the adapters' changes of gate and up, for all rows.

    `gate_up` [T, 2 * ff] is the base's result and is only read; `out` is [T, ff], and T is at most
    the rows of the pass's capacity. Bit for bit what `expand` and `activate` compute one after the
    other.
    """
    rows, width = out.shape
    _check(h, lora, 2, gate_up, out)
    assert gate_up.shape == (rows, 2 * width)
    assert rows <= lora.capacity.rows
    constants, options = gated_configuration(h.shape[0], width, out.dtype, activation)
    tiles = triton.cdiv(width, constants["BN"])
    expand_gated_kernel[_grid(lora, tiles, _EXPAND_PROGRAMS)](
        h,
        gate_up,
        out,
        lora.entries,
        lora.chunk_begin,
        lora.chunk_end,
        lora.chunk_count,
        lora.term_start,
        lora.term_slot,
        lora.term_weight,
        lora.term_row,
        lora.row_chunk,
        h.shape[2],
        h.shape[3],
        lora.sites,
        site,
        rows,
        **constants,
        **options,
    )


def _grid(lora: LoraPass, items: int, programs: int) -> tuple[int]:
    """Programs of a launch with `items` for each chunk, and `programs` for each multiprocessor."""
    programs *= _multiprocessors(lora.entries.device)
    return (max(1, min(programs, lora.capacity.rows * items)),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # so that programs of the interpreter have several items
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(h: torch.Tensor, lora: LoraPass, parts: int, *activations: torch.Tensor) -> None:
    capacity = lora.capacity
    assert h.shape[1:] == (parts, capacity.h_rows, capacity.rank_stride)
    assert capacity.rank_stride % RANK_STEP == 0
    assert all(tensor.is_contiguous() for tensor in (h, *activations))


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "RANKS": _RANKS,
        "TYPE": TYPES[dtype],
        "DT": product_type(dtype),
        "PRECISION": product_precision(dtype),
    }


def shrink_configuration(
    fan_in: int, parts: int, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of `shrink_kernel`, and its warps and stages."""
    shape = shrink_shape(fan_in)
    constants = {"FAN_IN": fan_in, "PARTS": parts, "SPLITS": shape.splits}
    constants |= {"SPAN": shape.span, "STEP": shape.step}
    stages = 4 if dtype.itemsize == 2 else 2
    return {**constants, **_constants(dtype)}, {"num_warps": _WARPS, "num_stages": stages}


def expand_configuration(
    splits: int, widths: Sequence[int], dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of `expand_kernel`, and its warps and stages."""
    w0, w1, w2 = [*widths, 0, 0][:3]
    constants = {"W0": w0, "W1": w1, "W2": w2, "PARTS": len(widths), "BN": expand_columns(widths)}
    constants |= _sums(splits)
    return {**constants, **_constants(dtype)}, {"num_warps": _WARPS, "num_stages": 1}


def gated_configuration(
    splits: int, width: int, dtype: torch.dtype, activation: Gate = Gate.SILU
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of `expand_gated_kernel`, and its warps and stages."""
    constants = {"WIDTH": width, "KIND": activation.value, "BN": expand_columns([width])}
    constants |= _sums(splits)
    return {**constants, **_constants(dtype)}, {"num_warps": _WARPS, "num_stages": 1}


def _sums(splits: int) -> dict[str, int]:
    return {"SPLITS": splits, "SUMS": triton.next_power_of_2(splits)}


_PLAN = {
    "entries": "*i64",
    **dict.fromkeys(("chunk_begin", "chunk_end", "chunk_count", "term_start"), "*i32"),
    **dict.fromkeys(("term_slot", "term_row"), "*i32"),
    **dict.fromkeys(("h_rows", "rank_stride", "sites", "site"), "i32"),
}

_MODELS = {
    "8b": {"hidden": 4096, "kv": 1024, "ff": 14336, "vocab": 128256},
    "smollm2": {"hidden": 576, "kv": 192, "ff": 1536, "vocab": 49152},
}


def compilations() -> list[Compilation]:
    """The kernels for the shapes of Llama 3.1 8B and SmolLM2 135M, in bfloat16 and float32."""
    return [
        compilation
        for model, sizes in _MODELS.items()
        for dtype in (torch.bfloat16, torch.float32)
        for compilation in _of_model(model, dtype, **sizes)
    ]


def _of_model(
    model: str, dtype: torch.dtype, hidden: int, kv: int, ff: int, vocab: int
) -> Iterator[Compilation]:
    kind, is_hot = str(TYPES[dtype]), dtype != torch.float32  # which is for comparisons
    weighted = {**_PLAN, "h": "*fp32", "term_weight": "*fp32"}
    matrices: dict[str, tuple[int, tuple[int, ...], str]] = {
        "qkv": (hidden, (hidden, kv, kv), kind),
        "o": (hidden, (hidden,), kind),
        "gate_up": (hidden, (ff, ff), kind),
        "down": (ff, (hidden,), kind),
        "head": (hidden, (vocab,), "fp32"),
    }
    for name, (fan_in, widths, output) in matrices.items():
        named = f"{name}_{model}_{kind}"
        constants, options = shrink_configuration(fan_in, len(widths), dtype)
        signature = {**_PLAN, "x": f"*{kind}", "h": "*fp32"}
        yield Compilation(
            shrink_kernel, f"shrink_{named}", signature, constants, is_hot=is_hot, **options
        )
        splits = shrink_shape(fan_in).splits
        constants, options = expand_configuration(splits, widths, dtype)
        signature = {**weighted, "y": f"*{output}"}
        yield Compilation(
            expand_kernel, f"expand_{named}", signature, constants, is_hot=is_hot, **options
        )
    for activation in (Gate.SILU, *([Gate.GELU_TANH] if is_hot else [])):
        constants, options = gated_configuration(shrink_shape(hidden).splits, ff, dtype, activation)
        signature = {**weighted, "gate_up": f"*{kind}", "out": f"*{kind}", "row_chunk": "*i32"}
        signature |= {"rows": "i32"}
        yield Compilation(
            expand_gated_kernel,
            f"expand_gated_{activation.value}_{model}_{kind}",
            signature,
            constants,
            is_hot=is_hot,
            **options,
        )
