"""What is known of an adapter once its files have been checked, and what it is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

PACK_ALIGNMENT = 64
"""`loraplex_model.adapter.ALIGNMENT`, repeated because that module imports torch."""

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one element of a compute dtype."""


class BaseModel(Protocol):
    """What `BaseShapes.of` reads; the engine's `ModelInfo` has it."""

    @property
    def num_layers(self) -> int: ...
    @property
    def projections(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """The base model as far as an adapter must fit it.

    Attributes:
        projections: module name ("q_proj", ...) to (in_features, out_features).
        fingerprint: "sha256:<hex>", compared with an adapter's stamp, where it has one.
        dtype: what the adapter is packed in: "float32" or "bfloat16".
    """

    num_layers: int
    projections: Mapping[str, tuple[int, int]]
    fingerprint: str = ""
    dtype: str = "bfloat16"

    @classmethod
    def of(cls, model: BaseModel) -> BaseShapes:
        """From the engine's description of its model."""
        shapes = {name: (int(i), int(o)) for name, (i, o) in model.projections.items()}
        return cls(model.num_layers, shapes, model.fingerprint, model.dtype)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an adapter may ask for. Sizes are bytes.

    Attributes:
        max_rank: the largest rank of any module.
        max_weights_bytes: size of the weights file.
        max_device_bytes: packed size in the base's dtype; None leaves it unchecked.
        max_scale: largest |alpha / r|.
        max_abs_value: largest |element| of any tensor; the default is float16's largest number.
    """

    max_rank: int = 256
    max_weights_bytes: int = 4 << 30
    max_device_bytes: int | None = None
    max_scale: float = 1e4
    max_abs_value: float = 65504.0


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor lies in the weights file.

    `start` and `end` are byte offsets from the beginning of the file; `dtype` is safetensors' word:
    "F32", "F16" or "BF16".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module's delta, `scale * B @ A`: `a` locates [rank, in] and `b` [out, rank]."""

    layer: int
    module: str
    rank: int
    scale: float
    a: TensorLocation
    b: TensorLocation


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A checked adapter. Everything that its weights file holds is in `modules`.

    Attributes:
        digest: "sha256:<64 hex digits>" over the configuration and the weights, byte for byte.
        peft_type: PEFT's name of the kind.
        rank: the largest of the modules' ranks.
        target_modules: the modules that it changes, in the order of `PROJECTIONS`.
        modules: in the order of (layer, projection).
        size_bytes: size of the weights file.
        base_model: what the configuration says it was trained on; informational, may be "".
    """

    digest: str
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    modules: tuple[ModuleSpec, ...]
    size_bytes: int
    base_model: str

    def packed_bytes(self, dtype: str) -> int:
        """Bytes on the device in `dtype` ("float32", "float16" or "bfloat16"), padding included."""
        item = ITEM_SIZES[dtype]
        elements = (n for m in self.modules for n in (_numel(m.a), _numel(m.b)))
        return sum(-(-n * item // PACK_ALIGNMENT) * PACK_ALIGNMENT for n in elements)


def _numel(location: TensorLocation) -> int:
    rows, columns = location.shape
    return rows * columns
