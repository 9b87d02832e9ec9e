"""An adapter's files on their way to a server: what both clients share of an upload."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex.errors import LoraplexError, ServerFault, Unavailable, UploadOutOfStep, invalid
from loraplex.results import UploadProgress
from loraplex.v1 import adapter_pb2

CHUNK_BYTES = 1 << 20
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_ATTEMPTS = 6  # that bring nothing forward, one after the other
_LONGEST_PAUSE = 5.0  # seconds

# Called with the bytes that were sent, of both files, and their number in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Files:
    """The two files of a PEFT adapter directory. `digest` is the adapter's identity."""

    config: bytes
    weights: Path
    weights_size: int
    digest: str

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Files:
        """Reads both files once. Raises InvalidRequest when one of them cannot be."""
        weights = Path(folder) / WEIGHTS_FILE
        try:
            config = (Path(folder) / CONFIG_FILE).read_bytes()
            digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
            with weights.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                while piece := file.read(CHUNK_BYTES):
                    digest.update(piece)
        except OSError as error:
            raise invalid("folder", f"{error.filename}: {error.strerror}") from None
        return cls(config, weights, size, f"sha256:{digest.hexdigest()}")

    @property
    def size(self) -> int:
        """Bytes of both."""
        return len(self.config) + self.weights_size

    def chunks(self, there: UploadProgress) -> Iterator[adapter_pb2.UploadAdapterRequest]:
        """What is missing after `there`, piece by piece. Reads the weights as it goes."""
        if there.config_bytes < len(self.config):
            yield _chunk(
                adapter_pb2.ADAPTER_FILE_CONFIG,
                there.config_bytes,
                self.config[there.config_bytes :],
            )
        with self.weights.open("rb") as file:
            file.seek(there.weights_bytes)
            offset = there.weights_bytes
            while piece := file.read(CHUNK_BYTES):
                yield _chunk(adapter_pb2.ADAPTER_FILE_WEIGHTS, offset, piece)
                offset += len(piece)


@dataclass(frozen=True, slots=True)
class Order:
    """What shall become of the files; without a name they are only staged."""

    name: str = ""
    replace: bool = False
    load: bool = False
    labels: Mapping[str, str] | None = None

    def header(self, upload_id: str, files: Files) -> adapter_pb2.UploadAdapterRequest:
        """The first message of a stream."""
        return adapter_pb2.UploadAdapterRequest(
            header=adapter_pb2.UploadHeader(
                upload_id=upload_id,
                name=self.name,
                config_size=len(files.config),
                weights_size=files.weights_size,
                expected_digest=files.digest,
                replace=self.replace,
                load=self.load,
                labels=self.labels,
                stage_only=not self.name,
            )
        )


class Attempts:
    """Whether and when to go on with an upload that failed."""

    def __init__(self) -> None:
        self._furthest = -1
        self._in_vain = 0
        self.made = 0

    def pause(self, error: LoraplexError, there: UploadProgress | None) -> float | None:
        """Seconds to wait before going on; None when that would not help."""
        self.made += 1
        if not isinstance(error, Unavailable | UploadOutOfStep) and not _status_lost(error):
            return None
        reached = there.config_bytes + there.weights_bytes if there else -1
        self._in_vain = 1 if reached > self._furthest else self._in_vain + 1
        self._furthest = max(self._furthest, reached)
        if self._in_vain >= _ATTEMPTS:
            return None
        return max(error.retry_after or 0.0, min(0.1 * 2.0**self._in_vain, _LONGEST_PAUSE))


def stream(
    files: Files, order: Order, upload_id: str, there: UploadProgress, progress: Progress | None
) -> Iterator[adapter_pb2.UploadAdapterRequest]:
    """One stream's messages: the header, then what is missing; `progress` follows each."""
    sent = there.config_bytes + there.weights_bytes
    yield order.header(upload_id, files)
    for message in files.chunks(there):
        yield message
        sent += len(message.chunk.data)
        if progress is not None:
            progress(sent, files.size)


def _status_lost(error: LoraplexError) -> bool:
    """Whether the stream was ended by the server, under a write, and why is not known.

    grpc.aio then reports a fault of its own in place of the server's status. Going on brings the
    status to light, if it was for good: then little or nothing is left to be written.
    """
    local = isinstance(error, ServerFault) and not error.reason
    return local and error.message == "Internal error from Core"


def _chunk(
    file: adapter_pb2.AdapterFile, offset: int, data: bytes
) -> adapter_pb2.UploadAdapterRequest:
    chunk = adapter_pb2.UploadChunk(file=file, offset=offset, data=data)
    return adapter_pb2.UploadAdapterRequest(chunk=chunk)
