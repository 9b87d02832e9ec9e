"""Loads a stored adapter into memory, verified, as its changes of a base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.ops import mapping
from loraplex_model.ops.dtypes import BY_SAFETENSORS
from numpy.typing import NDArray

from loraplex_adapters.format.copies.settling import settle
from loraplex_adapters.format.digest import AdapterDigest
from loraplex_adapters.format.examine import examine_parsed
from loraplex_adapters.format.files import open_directory
from loraplex_adapters.format.header import read_header
from loraplex_adapters.format.spec import AdapterLimits, CheckedAdapter, TensorLocation
from loraplex_adapters.load.deltas import adapter_delta


def load(
    directory: Path,
    digest: str,
    base: BaseWeights,
    limits: AdapterLimits | None = None,
) -> tuple[CheckedAdapter, AdapterDelta]:
    """Reads and verifies the adapter in `directory`; returns its spec and its changes of `base`.

    The weights are read into memory once and digested there, and the tensors are views of that
    memory: nothing can change between check and use, and no mapped file can be truncated. The
    values are not checked again, since the digest is that of the registered content, except that
    copies of the base's own weights are compared with them.
    Raises Refusal: ADAPTER_CORRUPT (missing, or its digest is not `digest`), STORE_UNAVAILABLE (no
    file descriptor is free), and as `examine_parsed` finds.
    """
    limits = limits or AdapterLimits()
    config, weights = _read_verified(directory, digest, limits.max_weights_bytes)
    view = weights.data
    header = read_header(lambda start, length: bytes(view[start : start + length]), len(weights))
    report = examine_parsed(config, header, len(weights), base.info, limits)
    if report.spec is None:
        raise Refusal.of(report.findings)
    spec, findings = settle(report.spec, lambda at, n: view[at : at + n], base.info, limits)
    if findings:
        raise Refusal.of(findings)
    spec = replace(spec, digest=digest)
    return spec, adapter_delta(spec, lambda location: _tensor(weights, location), base)


def _read_verified(directory: Path, digest: str, max_bytes: int) -> tuple[bytes, NDArray[np.uint8]]:
    try:
        with open_directory(directory) as opened:
            config = opened.read_config()
            with opened.open_weights(max_bytes) as file:
                weights = mapping.zeros(file.size).numpy()
                file.read_into(weights.data, 0)
    except Refusal as error:
        if error.reason is Reason.STORE_UNAVAILABLE:  # nothing is known about the files
            raise
        message = f"the stored adapter cannot be read: {error.message}"
        raise Refusal(Reason.ADAPTER_CORRUPT, message, digest) from None
    actual = AdapterDigest(config, len(weights))
    actual.update(weights.data)
    if actual.text() != digest:
        message = "the stored adapter's content has changed since it was registered"
        raise Refusal(Reason.ADAPTER_CORRUPT, message, digest)
    return config, weights


def _tensor(weights: NDArray[np.uint8], location: TensorLocation) -> torch.Tensor:
    data = weights[location.start : location.end]
    dtype = BY_SAFETENSORS[location.dtype]
    if location.start % dtype.itemsize:
        data = data.copy()  # the format does not guarantee alignment
    if not data.size:
        return torch.empty(location.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(location.shape)
