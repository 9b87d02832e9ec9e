"""Safetensors files written as a stream: the memory of one tensor, the same bytes every time.

Space is left for the header, which is written last and padded with blanks, as the format allows.
Large tensors go to the file as they come; small ones are kept to the end and laid by element size,
so that every tensor is aligned for its type and nothing lies between two of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
"""Bytes of tensors in one file of a checkpoint; a larger tensor gets a file of its own."""

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
_BIG = 1 << 16  # bytes
_ALIGNMENT = 64
_ENTRY_BYTES = 256  # of the header, per tensor: room for its name, shape and place


class SafetensorsFile:
    """Writes one new file; the context ends with a whole file, or an exception.

    Attributes:
        nbytes: of the tensors added so far.
    """

    def __init__(self, path: Path, most_tensors: int, metadata: Mapping[str, str]) -> None:
        """`metadata` are texts for the header, beside the "format" that PyTorch's readers want."""
        self._file = path.open("xb")
        self._metadata = dict(sorted({"format": "pt", **metadata}.items()))
        text = json.dumps(self._metadata)
        space = 8 + len(text) + 64 + most_tensors * _ENTRY_BYTES
        self._space = -(-space // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(self._space)
        self._entries: dict[str, Any] = {}
        self._small: dict[str, torch.Tensor] = {}
        self._end = 0
        self.nbytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a tensor on the CPU, of one of the types of `_DTYPES`."""
        tensor = tensor.detach().contiguous()
        self.nbytes += tensor.nbytes
        if tensor.nbytes >= _BIG and tensor.nbytes % _ALIGNMENT == 0:
            self._write(name, tensor)
        else:
            self._small[name] = tensor.clone()

    def close(self) -> None:
        """Writes what was kept, and the header."""
        by_size = sorted(self._small.items(), key=lambda item: -item[1].itemsize)
        for name, tensor in by_size:
            self._write(name, tensor)
        header = json.dumps({"__metadata__": self._metadata, **self._entries}).encode()
        assert len(header) <= self._space - 8, "too little space was left for the header"
        self._file.seek(0)
        self._file.write((self._space - 8).to_bytes(8, "little"))
        self._file.write(header.ljust(self._space - 8))
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + tensor.nbytes],
        }
        self._end += tensor.nbytes


class Checkpoint:
    """A Hugging Face checkpoint's weights: one file, or several and their index."""

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
        """Gives the files their names, which say how many there are, and writes the index."""
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
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._directory / INDEX).write_text(text, "utf-8")
