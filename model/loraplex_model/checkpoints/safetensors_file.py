"""Safetensors files written as a stream: the memory of one tensor, the same bytes every time.

Large tensors are written at once; small ones are kept until the end and ordered by element size, so
that every tensor is aligned for its type and there are no gaps. The header is written last, into
space reserved for it and padded with blanks, as the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from loraplex_model.ops.dtypes import SAFETENSORS_NAMES

_BIG = 1 << 16  # bytes
_ALIGNMENT = 64
_ENTRY_BYTES = 256  # of the header per tensor, for its name, shape and offsets


class SafetensorsFile:
    """Writes a new file, which is complete when the context ends without an exception.

    Attributes:
        nbytes: size in bytes of the tensors added so far.
    """

    def __init__(
        self, path: Path, most_tensors: int, metadata: Mapping[str, str] | None = None
    ) -> None:
        """`metadata` is added to the header, with the "format" that PyTorch's readers need."""
        self._file = path.open("xb")
        self._entries: dict[str, Any] = {}
        space = 8 + most_tensors * _ENTRY_BYTES
        if metadata is not None:
            self._entries["__metadata__"] = dict(sorted({"format": "pt", **metadata}.items()))
            space += len(json.dumps(self._entries["__metadata__"])) + 64
        self._space = -(-space // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(self._space)
        self._small: dict[str, torch.Tensor] = {}
        self._end = 0
        self.nbytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a tensor on the CPU, of one of the types of `SAFETENSORS_NAMES`."""
        tensor = tensor.detach().contiguous()
        self.nbytes += tensor.nbytes
        if tensor.nbytes >= _BIG and tensor.nbytes % _ALIGNMENT == 0:
            self._write(name, tensor)
        else:
            self._small[name] = tensor.clone()

    def close(self) -> None:
        """Writes the small tensors and the header."""
        for name, tensor in sorted(self._small.items(), key=lambda item: -item[1].itemsize):
            self._write(name, tensor)
        header = json.dumps(self._entries).encode()
        assert len(header) <= self._space - 8, "too little space was reserved for the header"
        self._file.seek(0)
        self._file.write((self._space - 8).to_bytes(8, "little"))
        self._file.write(header.ljust(self._space - 8))
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._entries[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + tensor.nbytes],
        }
        self._end += tensor.nbytes
