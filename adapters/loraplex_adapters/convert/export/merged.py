"""Merged checkpoints in Hugging Face's layout: dense in one type, or NF4 as bitsandbytes stores it.

Merging into NF4 rounds small changes away, because the base's weights are on the grid that they are
rounded to. So the retained share of the change is measured, and a small one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.checkpoints.load import LoadedBase
from loraplex_model.ops import nf4

from loraplex_adapters.convert.export.account import Kept, measure, total
from loraplex_adapters.convert.export.model_files import write_config, write_tokenizer
from loraplex_adapters.convert.export.parameters import Parameter, merged_form, parameters
from loraplex_adapters.convert.export.shards import SHARD_BYTES, Checkpoint

LEAST_RETAINED = 0.95
"""Least retained share of the change, over all NF4 matrices, that is written without `force`."""

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_PER_LAYER = 64  # more than the number of tensors of any layer, in NF4 too


def write_dense(
    target: Path,
    base: LoadedBase,
    delta: AdapterDelta,
    dtype: torch.dtype,
    *,
    stamps: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> list[Kept]:
    """Creates the directory `target`: the base with the adapter merged, every tensor in `dtype`.

    Merges in float32 and rounds once. Returns what each changed tensor retains. Peak memory is a
    few times the largest matrix, in addition to the base.
    Raises Refusal(EXPORT_UNSUPPORTED) as `merged_form` does, and for values too large for `dtype`.
    """
    return _write(target, base, delta, dtype, None, stamps, shard_bytes)


def write_nf4(
    target: Path,
    base: LoadedBase,
    delta: AdapterDelta,
    dtype: torch.dtype,
    *,
    stamps: Mapping[str, str],
    force: bool = False,
) -> list[Kept]:
    """Creates the directory `target`: the merged projections quantised to NF4, the rest in `dtype`.

    Unchanged projections keep the base's bytes. Returns what each changed tensor retains.
    Raises Refusal: EXPORT_UNSUPPORTED; EXPORT_DELTA_LOST if the projections retain less than
    `LEAST_RETAINED` of their change and `force` is not set.
    """
    kept = _write(target, base, delta, dtype, _quantisation(dtype), stamps, SHARD_BYTES)
    rounded = [part for part in kept if part.quantised]  # a large head would hide the others' loss
    retained = total(rounded).retained
    if retained < LEAST_RETAINED and not force:
        worst = min(rounded, key=lambda part: part.retained)
        raise Refusal(
            Reason.EXPORT_DELTA_LOST,
            f"NF4 retains {retained:.1%} of the adapter's change ({worst.name}: "
            f"{worst.retained:.1%}), less than {LEAST_RETAINED:.0%}; export it as hf, serve it "
            "unmerged, or write it anyway with --force",
            "format",
        )
    return kept


def _write(
    target: Path,
    base: LoadedBase,
    delta: AdapterDelta,
    dtype: torch.dtype,
    quantisation: Mapping[str, object] | None,
    stamps: Mapping[str, str],
    shard_bytes: int,
) -> list[Kept]:
    form = merged_form(base.weights.config, delta)
    target.mkdir()
    write_config(target, base, dtype, form, quantisation)
    write_tokenizer(target, base)
    most = 8 + _PER_LAYER * base.weights.config.num_layers
    file = Checkpoint(target, most, stamps, shard_bytes)
    kept = []
    for parameter in parameters(base.weights, delta, form):
        quantise = quantisation is not None and parameter.matrix is not None
        found = (_write_nf4 if quantise else _write_dense)(file, parameter, dtype)
        if found is not None:
            kept.append(found)
    file.close()
    return kept


def _write_dense(file: Checkpoint, parameter: Parameter, dtype: torch.dtype) -> Kept | None:
    base = parameter.base()
    merged = base if parameter.change is None else parameter.change(base)
    written = merged.to(dtype)
    if not bool(written.isfinite().all()):
        message = f"{parameter.name} has values that are too large for {dtype}"
        raise Refusal(Reason.EXPORT_UNSUPPORTED, message, "dtype")
    file.add(parameter.name, written)
    return None if parameter.change is None else measure(parameter.name, base, merged, written)


def _write_nf4(file: Checkpoint, parameter: Parameter, dtype: torch.dtype) -> Kept | None:
    assert parameter.matrix is not None
    if parameter.change is None:
        _add_matrix(file, parameter.name, parameter.matrix, dtype)
        return None
    base = parameter.base()
    merged = parameter.change(base)
    matrix = nf4.quantise(merged)
    _add_matrix(file, parameter.name, matrix, dtype)
    kept = measure(parameter.name, base, merged, nf4.dequantize(matrix))
    return replace(kept, quantised=True)


def _add_matrix(file: Checkpoint, name: str, matrix: NF4Matrix, dtype: torch.dtype) -> None:
    """Adds the tensors of one NF4 matrix, named as bitsandbytes names those of `Params4bit`."""
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(matrix.shape),
    }
    file.add(name, matrix.packed.reshape(-1, 1))
    file.add(f"{name}.absmax", matrix.absmax)
    file.add(f"{name}.quant_map", nf4.nf4_code())
    if matrix.absmax_scales:
        state |= {
            "nested_blocksize": nf4.NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": matrix.absmax_offsets[0],
        }
        file.add(f"{name}.nested_absmax", matrix.absmax_scales[0])
        file.add(f"{name}.nested_quant_map", nf4.dynamic_map())
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    file.add(f"{name}.quant_state.bitsandbytes__nf4", text)


def _quantisation(dtype: torch.dtype) -> dict[str, object]:
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
