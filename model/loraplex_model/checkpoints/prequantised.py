"""Checkpoints that bitsandbytes has quantised to NF4, whose bytes are used unchanged.

A module's `weight` holds the packed codes. Further tensors are `weight.absmax`, `weight.quant_map`,
`weight.quant_state.bitsandbytes__nf4` (JSON in bytes) and, with double quantisation,
`weight.nested_absmax` and `weight.nested_quant_map`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from loraplex_model.base.refusal import model_invalid, model_unsupported
from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.checkpoints.checkpoint import TensorSource
from loraplex_model.ops.nf4 import NESTED_BLOCK, blocks_of, dynamic_map, nf4_code

_STATE = ".quant_state.bitsandbytes__"


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises `Refusal` (MODEL_UNSUPPORTED) for a checkpoint quantised in another way."""
    quantisation = config.get("quantization_config")
    if not quantisation:
        return
    method = quantisation.get("quant_method", "bitsandbytes")
    kind = quantisation.get("bnb_4bit_quant_type", "fp4")
    if method != "bitsandbytes" or not quantisation.get("load_in_4bit") or kind != "nf4":
        what = f"{method} {kind}" if quantisation.get("load_in_4bit") else method
        raise model_unsupported(
            f"the checkpoint is quantised with {what}; only bitsandbytes NF4 is supported, and "
            "unquantised checkpoints, which are quantised on loading"
        )


def is_nf4(source: TensorSource, name: str) -> bool:
    """Whether the source holds the tensor `name` in NF4. Raises `Refusal` if it holds it in fp4."""
    if f"{name}{_STATE}fp4" in source.names():
        raise model_unsupported(f"{name} is quantised to fp4; only NF4 is supported")
    return f"{name}{_STATE}nf4" in source.names()


def read(source: TensorSource, name: str, shape: tuple[int, int]) -> NF4Matrix:
    """Reads one module of `shape` (out, in).

    Raises `Refusal`: MODEL_UNSUPPORTED for other block sizes or codes, MODEL_INVALID for
    tensors that contradict each other.
    """
    state = json.loads(bytes(source.read(f"{name}{_STATE}nf4").tolist()))
    nested = "nested_blocksize" in state
    _expect(name, "block size", state.get("blocksize"), BLOCK)
    _same(name, "code", source.read(f"{name}.quant_map"), nf4_code())
    if nested:
        _expect(name, "nested block size", state["nested_blocksize"], NESTED_BLOCK)
        _same(name, "nested code", source.read(f"{name}.nested_quant_map"), dynamic_map())
    packed = source.read(name).contiguous().view(torch.uint8).reshape(-1)
    absmax = source.read(f"{name}.absmax").reshape(-1)
    blocks = blocks_of(*shape)
    wanted = torch.uint8 if nested else torch.float32
    if (
        tuple(state.get("shape") or ()) != shape
        or packed.numel() * 2 != shape[0] * shape[1]
        or absmax.numel() != blocks
        or absmax.dtype != wanted
    ):
        raise model_invalid(
            f"{name} has {packed.numel()} bytes and {absmax.numel()} maxima for shape "
            f"{state.get('shape')}, but the configuration needs {list(shape)}"
        )
    if not nested:
        return NF4Matrix(shape, packed, absmax, (), (), (shape[0],))
    scales = source.read(f"{name}.nested_absmax").reshape(-1)
    if scales.numel() != -(-blocks // NESTED_BLOCK):
        raise model_invalid(f"{name} has {scales.numel()} scales for {blocks} blocks")
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32).item()
    return NF4Matrix(shape, packed, absmax, (scales.float(),), (offset,), (shape[0],))


def _expect(name: str, what: str, found: Any, wanted: int) -> None:
    if found != wanted:
        raise model_unsupported(f"{name} has {what} {found}, not {wanted}")


def _same(name: str, what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=1e-7):
        raise model_unsupported(f"{name} uses another {what} than bitsandbytes' own")
