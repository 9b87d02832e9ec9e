"""Brings a stored adapter into memory, verified, as what it changes of a base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.ops.dtypes import BY_SAFETENSORS
from numpy.typing import NDArray

from loraplex_adapters.format.digest import AdapterDigest
from loraplex_adapters.format.examine import judge
from loraplex_adapters.format.files import open_directory
from loraplex_adapters.format.header import read_header
from loraplex_adapters.format.spec import AdapterLimits, AdapterSpec, TensorLocation
from loraplex_adapters.load.deltas import adapter_delta


def load(
    directory: Path,
    digest: str,
    base: BaseWeights,
    limits: AdapterLimits | None = None,
) -> tuple[AdapterSpec, AdapterDelta]:
    """Reads, verifies and places the adapter in `directory`, for `base`.

    The file is read into memory once, digested there, and the tensors are views of those bytes:
    nothing changes between the check and the use, and nothing is mapped that could be cut short.
    The elements are not looked at again: the digest says that they are what was registered.
    Raises Refusal: ADAPTER_CORRUPT (missing, or not the bytes of `digest`), and what
    `format.inspect` raises.
    """
    limits = limits or AdapterLimits()
    config, weights = _read_verified(directory, digest, limits.max_weights_bytes)
    view = weights.data
    header = read_header(lambda start, length: bytes(view[start : start + length]), len(weights))
    report = judge(config, header, len(weights), base.info, limits)
    if report.spec is None:
        raise Refusal.of(report.findings)
    spec = replace(report.spec, digest=digest)
    return spec, adapter_delta(spec, lambda location: _tensor(weights, location), base)


def _read_verified(directory: Path, digest: str, max_bytes: int) -> tuple[bytes, NDArray[np.uint8]]:
    try:
        with open_directory(directory) as opened:
            with opened.open_config() as file:
                config = file.read(0, file.size)
            with opened.open_weights(max_bytes) as file:
                weights = np.empty(file.size, np.uint8)
                file.read_into(weights.data, 0)
    except Refusal as error:
        message = f"the stored adapter cannot be read: {error.message}"
        raise Refusal(Reason.ADAPTER_CORRUPT, message, digest) from None
    actual = AdapterDigest(config, len(weights))
    actual.update(weights.data)
    if actual.text() != digest:
        raise Refusal(
            Reason.ADAPTER_CORRUPT,
            "the stored adapter's bytes have changed since it was registered",
            digest,
        )
    return config, weights


def _tensor(weights: NDArray[np.uint8], location: TensorLocation) -> torch.Tensor:
    data = weights[location.start : location.end]
    dtype = BY_SAFETENSORS[location.dtype]
    if location.start % dtype.itemsize:
        data = data.copy()  # the format does not promise alignment
    if not data.size:
        return torch.empty(location.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(location.shape)
