"""The stored values of a base model, read in pieces and without torch, to compare others with them.

`stored` writes the file. Nothing stays in memory: every call reads the elements that it returns.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from loraplex_model.base.config import MODEL, DecoderConfig, Site
from loraplex_model.base.dtypes import ITEM_SIZES, SAFETENSORS
from loraplex_model.base.quantisation import BLOCK, NESTED_BLOCK, blocks_of

Floats = NDArray[np.float32]

_NORMS = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_norm"}
_MAX_HEADER = 64 << 20


@dataclass(frozen=True, slots=True)
class Blocks:
    """Quantised weights: codes uint8 [n], and what is stored of each block's maximum.

    A maximum is float32 in `maxima`, or, with double quantisation, the byte in `maxima`, whose
    value of the 8-bit code is multiplied by `scales` (one for each block here) and added to
    `offset`.
    """

    codes: NDArray[np.uint8]
    maxima: NDArray[np.uint8] | Floats
    scales: Floats | None = None
    offset: float = 0.0


class BaseValues:
    """The open file of a stored model; a context manager.

    Raises OSError or ValueError if the file is missing, damaged or not of this `config`.
    """

    def __init__(self, path: str, config: DecoderConfig) -> None:
        self._config = config
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            length = int.from_bytes(self._read(0, 8), "little")
            if length > _MAX_HEADER:
                raise ValueError("the header is too long")
            self._table: dict[str, Any] = json.loads(self._read(8, length))
            self._data = 8 + length
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def dense(self, site: Site, start: int, count: int) -> Floats:
        """Elements of the flat weight of the embeddings, the head or a norm, as float32."""
        layer, name = site
        if site == (MODEL, "lm_head") and self._config.tie_embeddings:
            name = "embed_tokens"
        stored = {"embed_tokens": "embed"}.get(name, name)
        if layer != MODEL:
            stored = f"layers.{layer}.{_NORMS.get(name, name)}"
        return self._floats(stored, start, count)

    def blocks(self, site: Site, start: int, count: int) -> Blocks:
        """Elements of the flat matrix of one of the checkpoint's modules.

        `start` is a multiple of 64.
        """
        fused, _, _ = self._config.place(site[1])
        shapes, modules = self._config.module_shapes(), self._config.modules_of(fused)
        rows, place = [shapes[module][1] for module in modules], modules.index(site[1])
        fan_in = shapes[site[1]][0]
        at = f"layers.{site[0]}.{fused}"
        packed = self._elements(
            f"{at}.packed", (sum(rows[:place]) * fan_in + start) // 2, -(-count // 2), np.uint8
        )
        codes = np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)[:count]
        before = sum(blocks_of(n, fan_in) for n in rows[:place])
        first, wanted = start // BLOCK, -(-count // BLOCK)
        if f"{at}.scales" not in self._table:
            return Blocks(codes, self._floats(f"{at}.absmax", before + first, wanted))
        maxima = self._elements(f"{at}.absmax", before + first, wanted, np.uint8)
        nested = sum(-(-blocks_of(n, fan_in) // NESTED_BLOCK) for n in rows[:place])
        low, high = first // NESTED_BLOCK, (first + wanted - 1) // NESTED_BLOCK
        scales = self._floats(f"{at}.scales", nested + low, high - low + 1)
        offset = float(self._floats(f"{at}.offsets", place, 1)[0])
        own = scales[(first + np.arange(wanted)) // NESTED_BLOCK - low]
        return Blocks(codes, maxima, own, offset)

    def _floats(self, name: str, start: int, count: int) -> Floats:
        kind = self._table[name]["dtype"] if name in self._table else ""
        if kind not in SAFETENSORS:
            raise ValueError(f"there is no tensor {name} of floats")
        size = ITEM_SIZES[SAFETENSORS[kind]]
        return floats(self._piece(name, start, count, size), kind)

    def _elements(
        self, name: str, start: int, count: int, kind: type[np.uint8]
    ) -> NDArray[np.uint8]:
        return np.frombuffer(self._piece(name, start, count, 1), kind)

    def _piece(self, name: str, start: int, count: int, size: int) -> bytes:
        if name not in self._table:
            raise ValueError(f"there is no tensor {name}")
        begin, end = self._table[name]["data_offsets"]
        if begin + (start + count) * size > end:
            raise ValueError(f"{name} is too short")
        return self._read(self._data + begin + start * size, count * size)

    def _read(self, offset: int, length: int) -> bytes:
        pieces = []
        while length > 0:
            piece = os.pread(self._file, length, offset)
            if not piece:
                raise ValueError("the file is too short")
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)


def floats(data: bytes | memoryview, kind: str) -> Floats:
    """Elements of the type `kind` ("F32", "F16", "BF16"), little-endian, as float32."""
    if kind == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    return np.frombuffer(data, np.float32)


def rounded(values: Floats, kind: str) -> Floats:
    """Values rounded to the nearest number of the type `kind`, ties to even, as float32."""
    if kind == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return values
