"""Writes the weights of a checkpoint as one safetensors file, or as several with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile

from loraplex_adapters.convert.export.directory import write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
"""Bytes of tensors in one file of a checkpoint; a larger tensor is written to its own file."""


class Checkpoint:
    """Writer of a Hugging Face checkpoint's weights."""

    def __init__(
        self,
        directory: Path,
        most_tensors: int,
        metadata: Mapping[str, str],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._directory, self._most, self._metadata = directory, most_tensors, metadata
        self._shard_bytes = shard_bytes
        self._names: list[list[str]] = []
        self._file: SafetensorsFile | None = None
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a tensor, to a new file if the last one is full."""
        file = self._file
        if file is not None and file.nbytes + tensor.nbytes > self._shard_bytes:
            file.close()
            file = None
        if file is None:
            path = self._directory / f"shard-{len(self._names)}"
            file = self._file = SafetensorsFile(path, self._most, self._metadata)
            self._names.append([])
        file.add(name, tensor)
        self._names[-1].append(name)
        self._total += tensor.nbytes

    def close(self) -> None:
        """Renames the files, whose names contain their number, and writes the index."""
        if self._file is not None:
            self._file.close()
        count = len(self._names)
        if count == 1:
            (self._directory / "shard-0").rename(self._directory / WEIGHTS)
            return
        weight_map = {}
        for i, names in enumerate(self._names):
            shard = f"model-{i + 1:05}-of-{count:05}.safetensors"
            (self._directory / f"shard-{i}").rename(self._directory / shard)
            weight_map.update(dict.fromkeys(names, shard))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self._directory / INDEX, index)
