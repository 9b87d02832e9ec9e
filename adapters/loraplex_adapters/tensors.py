"""Brings an adapter's tensors into memory. The one module of this package that imports torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from loraplex_model.adapter import LoraFactors
from numpy.typing import NDArray

from loraplex_adapters.digest import AdapterDigest
from loraplex_adapters.errors import AdapterError
from loraplex_adapters.files import open_directory
from loraplex_adapters.format import judge
from loraplex_adapters.safetensors_header import read_header
from loraplex_adapters.spec import AdapterSpec, BaseShapes, Limits, TensorLocation

Factors = dict[tuple[int, str], LoraFactors]
"""The modules' deltas by (layer, module name), in the file's dtype, on the CPU."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(directory: Path, spec: AdapterSpec) -> Factors:
    """The factors of every module of `spec`.

    The file is read into memory once, digested there, and the tensors are views of those bytes:
    nothing changes between the check and the use, and nothing is mapped that could be cut short.
    Raises AdapterError(ADAPTER_CORRUPT) unless the bytes have the digest `spec.digest`.
    """
    _, weights = _read_verified(directory, spec.digest, spec.size_bytes)
    return _factors(weights, spec)


def load_blob(
    directory: Path, digest: str, base: BaseShapes, limits: Limits | None = None
) -> tuple[AdapterSpec, Factors]:
    """What the engine does with an `AdapterRef`: reads, verifies and places a stored adapter.

    The elements are not looked at again: the digest says that they are what was registered.
    Raises AdapterError: ADAPTER_CORRUPT (missing, or not the bytes of `digest`), and what
    `format.inspect` raises.
    """
    limits = limits or Limits()
    config, weights = _read_verified(directory, digest, limits.max_weights_bytes)
    view = weights.data
    header = read_header(lambda start, length: bytes(view[start : start + length]), len(weights))
    report = judge(config, header, len(weights), base, limits)
    if report.spec is None:
        raise AdapterError.of(report.findings)
    spec = replace(report.spec, digest=digest)
    return spec, _factors(weights, spec)


def _read_verified(directory: Path, digest: str, max_bytes: int) -> tuple[bytes, NDArray[np.uint8]]:
    try:
        with open_directory(directory) as opened:
            with opened.open_config() as file:
                config = file.read(0, file.size)
            with opened.open_weights(max_bytes) as file:
                weights = np.empty(file.size, np.uint8)
                file.read_into(weights.data, 0)
    except AdapterError as error:
        message = f"the stored adapter cannot be read: {error.message}"
        raise AdapterError("ADAPTER_CORRUPT", message, digest) from None
    actual = AdapterDigest(config, len(weights))
    actual.update(weights.data)
    if actual.text() != digest:
        raise AdapterError(
            "ADAPTER_CORRUPT",
            "the stored adapter's bytes have changed since it was registered",
            digest,
        )
    return config, weights


def _factors(weights: NDArray[np.uint8], spec: AdapterSpec) -> Factors:
    return {
        (m.layer, m.module): LoraFactors(_tensor(weights, m.a), _tensor(weights, m.b), m.scale)
        for m in spec.modules
    }


def _tensor(weights: NDArray[np.uint8], location: TensorLocation) -> torch.Tensor:
    data = weights[location.start : location.end]
    dtype = _DTYPES[location.dtype]
    if location.start % dtype.itemsize:
        data = data.copy()  # the format does not promise alignment
    return torch.from_numpy(data).view(dtype).view(location.shape)
