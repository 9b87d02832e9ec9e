"""The quantised model as one safetensors file, written as a stream and read by mapping it.

The big tensors (embeddings, packed codes) go to the file as they come; the small ones are kept
until the end and laid by element size, so that every tensor is aligned for its type. The header is
written last, into space left for it and padded with blanks, as the format allows. So writing needs
the memory of one tensor, and reading costs page cache that all processes share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex_model.base.config import FUSED, DecoderConfig
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights, LayerWeights, NF4Matrix
from loraplex_model.ops.nf4 import NESTED_BLOCK, blocks_of

WEIGHTS = "model.safetensors"

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_BIG = 1 << 16  # bytes
_ALIGNMENT = 64
_HEADER_BYTES = 256  # per tensor: room for its name, shape and place


class StoredWriter:
    """Writes tensors to a new file; the context ends with a whole file or an exception.

    `fingerprint` is over the configuration and the names, types, shapes and bytes of dense tensors
    and codes. The mean of many floats (the quantised maxima) is left out and what is a power
    (the frequencies) is rounded: their last bits depend on the vector width of the machine.
    """

    def __init__(self, path: Path, most_tensors: int, config: DecoderConfig) -> None:
        self._file = path.open("wb")
        self._space = -(-(8 + most_tensors * _HEADER_BYTES) // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(self._space)
        self._header: dict[str, dict[str, Any]] = {}
        self._small: dict[str, torch.Tensor] = {}
        fields = dataclasses.asdict(config)
        fields["rope_inv_freq"] = [f"{frequency:.4e}" for frequency in config.rope_inv_freq]
        self._digest = hashlib.sha256(json.dumps(fields).encode())
        self._end = 0

    @property
    def fingerprint(self) -> str:
        """Digest of the configuration and everything added so far."""
        return "sha256:" + self._digest.hexdigest()

    def add(self, name: str, tensor: torch.Tensor, *, identifies: bool = True) -> None:
        """Appends a tensor; `identifies` says whether the fingerprint covers it."""
        tensor = tensor.detach().contiguous()
        if identifies:
            self._digest.update(f"{name} {_DTYPES[tensor.dtype]} {list(tensor.shape)}\n".encode())
            self._digest.update(_bytes(tensor))
        if tensor.nbytes >= _BIG and tensor.nbytes % _ALIGNMENT == 0:
            self._write(name, tensor)
        else:
            self._small[name] = tensor.clone()

    def add_matrix(self, name: str, matrix: NF4Matrix) -> None:
        """Appends an NF4 matrix as its parts."""
        self.add(f"{name}.packed", matrix.packed)
        self.add(f"{name}.absmax", matrix.absmax, identifies=False)
        if matrix.absmax_scales:
            self.add(f"{name}.scales", torch.cat(matrix.absmax_scales), identifies=False)
            self.add(f"{name}.offsets", torch.tensor(matrix.absmax_offsets), identifies=False)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        self._file.write(_bytes(tensor))
        self._header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + tensor.nbytes],
        }
        self._end += tensor.nbytes

    def __enter__(self) -> StoredWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            if error is not None:
                return
            for name, tensor in sorted(self._small.items(), key=lambda item: -item[1].itemsize):
                self._write(name, tensor)
            header = json.dumps(self._header).encode()
            assert len(header) <= self._space - 8, "too little space was left for the header"
            self._file.seek(0)
            self._file.write((self._space - 8).to_bytes(8, "little"))
            self._file.write(header.ljust(self._space - 8))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_weights(
    path: Path,
    config: DecoderConfig,
    fingerprint: str,
    eos_token_ids: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> BaseWeights:
    """Maps the file. Packed codes stay in it (on the CPU); dense tensors become `dtype`.

    Raises `Refusal` (MODEL_INVALID) if the file does not hold what the configuration asks for.
    """
    try:
        with safe_open(path, framework="pt") as file:
            reader = _Reader(file, config, dtype, device)
            embed = reader.dense("embed")
            return BaseWeights(
                config=config,
                embed=embed,
                layers=tuple(reader.layer(i) for i in range(config.num_layers)),
                norm=reader.dense("norm"),
                lm_head=embed if config.tie_embeddings else reader.dense("lm_head"),
                fingerprint=fingerprint,
                eos_token_ids=eos_token_ids,
            )
    except (SafetensorError, OSError) as error:
        raise Refusal(Reason.MODEL_INVALID, f"{path} is damaged: {error}; delete it") from error


class _Reader:
    """Tensors of the file, by their place in the decoder."""

    def __init__(
        self, file: Any, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._file, self._names = file, frozenset(file.keys())
        self._config, self._dtype, self._device = config, dtype, device

    def dense(self, name: str) -> torch.Tensor:
        return self._tensor(name).to(self._device, self._dtype)

    def _tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def _optional(self, name: str) -> torch.Tensor | None:
        return self.dense(name) if name in self._names else None

    def layer(self, i: int) -> LayerWeights:
        at = f"layers.{i}."
        return LayerWeights(
            input_norm=self.dense(at + "input_norm"),
            qkv=self._matrix(at, "qkv"),
            qkv_bias=self._optional(at + "qkv_bias"),
            q_norm=self._optional(at + "q_norm"),
            k_norm=self._optional(at + "k_norm"),
            o=self._matrix(at, "o"),
            o_bias=self._optional(at + "o_bias"),
            post_norm=self.dense(at + "post_norm"),
            gate_up=self._matrix(at, "gate_up"),
            down=self._matrix(at, "down"),
        )

    def _matrix(self, at: str, name: str) -> NF4Matrix:
        shapes = self._config.projection_shapes()
        rows = tuple(shapes[module][1] for module in FUSED[name])
        fan_in = shapes[FUSED[name][0]][0]
        at += name
        scales: tuple[torch.Tensor, ...] = ()
        offsets: tuple[float, ...] = ()
        if f"{at}.scales" in self._names:
            counts = [-(-blocks_of(count, fan_in) // NESTED_BLOCK) for count in rows]
            scales = torch.split(self._tensor(f"{at}.scales").to(self._device), counts)
            offsets = tuple(self._tensor(f"{at}.offsets").tolist())
        return NF4Matrix(
            (sum(rows), fan_in),
            self._tensor(f"{at}.packed").to(self._device),
            self._tensor(f"{at}.absmax").to(self._device),
            scales,
            offsets,
            rows,
        )
