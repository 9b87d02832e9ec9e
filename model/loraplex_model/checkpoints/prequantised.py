"""Checkpoints that bitsandbytes has quantised to NF4, whose bytes are used unchanged.

A module's `weight` holds the packed codes. Further tensors are `weight.absmax`, `weight.quant_map`,
`weight.quant_state.bitsandbytes__nf4` (JSON in bytes) and, with double quantisation,
`weight.nested_absmax` and `weight.nested_quant_map`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from loraplex_model.base.refusal import model_invalid, model_unsupported
from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.checkpoints.checkpoint import TensorSource
from loraplex_model.ops.nf4 import NESTED_BLOCK, blocks_of, dynamic_map, nf4_code

_STATE = ".quant_state.bitsandbytes__"
_FURTHER = (".absmax", ".quant_map", f"{_STATE}nf4", ".nested_absmax", ".nested_quant_map")
FLOATS: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of numbers in safetensors files that are read, and their sizes in bytes."""

_MOST_STATE = 1 << 16  # bytes of JSON
_AGAIN = "quantise the model again, or fetch it again"


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises `Refusal` (MODEL_UNSUPPORTED) for a checkpoint quantised in another way."""
    quantisation = config.get("quantization_config")
    if not quantisation:
        return
    if not isinstance(quantisation, Mapping):
        raise model_invalid(
            "the model's configuration has a quantization_config that is no object; fetch the "
            "model again"
        )
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


def tensors(source: TensorSource, name: str) -> list[str]:
    """Names of all tensors that a module in NF4 consists of."""
    return [name, *(name + end for end in _FURTHER if name + end in source.names())]


def check(source: TensorSource, name: str, shape: tuple[int, int]) -> Mapping[str, Any]:
    """Checks one module of `shape` (out, in), all but its values; returns what it states.

    Raises `Refusal`: MODEL_UNSUPPORTED for other block sizes or codes, MODEL_INVALID for
    tensors that contradict each other.
    """
    state = _state(source, name)
    nested = "nested_blocksize" in state
    _expect(name, "block size", state.get("blocksize"), BLOCK)
    _same(source, name, "quant_map", nf4_code())
    if nested:
        _expect(name, "nested block size", state["nested_blocksize"], NESTED_BLOCK)
        _same(source, name, "nested_quant_map", dynamic_map())
    packed, absmax = source.info(name), source.info(f"{name}.absmax")
    blocks = blocks_of(*shape)
    if (
        state.get("shape") != list(shape)
        or packed.nbytes * 2 != shape[0] * shape[1]
        or prod(absmax.shape) != blocks
        or absmax.dtype != ("U8" if nested else "F32")
    ):
        raise model_invalid(
            f"{name} has {packed.nbytes} bytes and {prod(absmax.shape)} maxima for shape "
            f"{state.get('shape')}, but the configuration needs {list(shape)}"
        )
    if not nested:
        return state
    scales = source.info(f"{name}.nested_absmax")
    if prod(scales.shape) != -(-blocks // NESTED_BLOCK):
        raise model_invalid(f"{name} has {prod(scales.shape)} scales for {blocks} blocks")
    if not isinstance(state.get("nested_offset"), int | float) or scales.dtype not in FLOATS:
        raise model_invalid(f"{name} has no scales or no offset of its maxima; {_AGAIN}")
    return state


def read(source: TensorSource, name: str, shape: tuple[int, int]) -> NF4Matrix:
    """Reads one module of `shape` (out, in).

    Raises `Refusal` as `check` does, and MODEL_INVALID for maxima that are not finite.
    """
    state = check(source, name, shape)
    packed = source.read(name).contiguous().view(torch.uint8).reshape(-1)
    absmax = source.read(f"{name}.absmax").reshape(-1)
    if "nested_blocksize" not in state:
        _finite(name, absmax)
        return NF4Matrix(shape, packed, absmax, (), (), (shape[0],))
    scales = source.read(f"{name}.nested_absmax").reshape(-1).float()
    held = torch.tensor([state["nested_offset"]], dtype=torch.float32)
    _finite(name, scales, held)
    return NF4Matrix(shape, packed, absmax, (scales,), (held.item(),), (shape[0],))


def _state(source: TensorSource, name: str) -> dict[str, Any]:
    """What bitsandbytes states of a module: block sizes, shape, offset."""
    at = f"{name}{_STATE}nf4"
    info = source.info(at)
    try:
        if info.dtype != "U8" or info.nbytes > _MOST_STATE:
            raise ValueError
        state = json.loads(bytes(source.read(at).reshape(-1).tolist()))
        if not isinstance(state, dict):
            raise ValueError
    except ValueError as error:  # of JSON and UTF-8, too
        raise model_invalid(f"{at} is no object of JSON in bytes; {_AGAIN}") from error
    return state


def _finite(name: str, *maxima: torch.Tensor) -> None:
    if not all(bool(each.isfinite().all()) for each in maxima):
        raise model_invalid(f"{name} has maxima of blocks that are not finite; {_AGAIN}")


def _expect(name: str, what: str, found: Any, wanted: int) -> None:
    if found != wanted:
        raise model_unsupported(f"{name} has {what} {found}, not {wanted}")


def _same(source: TensorSource, name: str, what: str, wanted: torch.Tensor) -> None:
    """Refuses another table of codes than bitsandbytes' own."""
    found = None
    if source.info(f"{name}.{what}").shape == tuple(wanted.shape):
        found = source.read(f"{name}.{what}")
    if found is None or not torch.allclose(found.float(), wanted, rtol=0, atol=1e-7):
        raise model_unsupported(f"{name} uses another {what} than bitsandbytes' own")
