"""Uploads: an adapter's files, the messages that carry them, and when to try again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import grpc

from loraplex.errors import (
    AdapterRejected,
    ErrorDetails,
    FieldViolation,
    LoraplexError,
    QuotaExceeded,
    ServerFault,
    Unavailable,
    UploadOutOfStep,
    invalid,
)
from loraplex.folder import HEAD_BYTES, cause_in, cause_of
from loraplex.results import UploadProgress
from loraplex.v1 import adapter_pb2

CHUNK_BYTES = 1 << 20
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MOST_NAMES = 256
_ATTEMPTS = 6  # in a row without progress
_LONGEST_PAUSE = 5.0  # seconds
_LONGEST_QUOTA_PAUSE = 60.0  # seconds; a rate is counted by the minute

# Called with the number of bytes sent so far and the size of both files.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Files:
    """The two files of a PEFT adapter directory. `digest` identifies the adapter.

    `others` are the names of the directory's other files, at most 256.
    """

    config: bytes
    weights: Path
    weights_size: int
    digest: str
    others: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Files:
        """Reads both files once. Raises AdapterRejected and InvalidRequest as `require_adapter`."""
        require_adapter(folder)
        weights = Path(folder) / WEIGHTS_FILE
        try:
            config = (Path(folder) / CONFIG_FILE).read_bytes()
            digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
            with weights.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                while piece := file.read(CHUNK_BYTES):
                    digest.update(piece)
            others = sorted(set(os.listdir(folder)) - {CONFIG_FILE, WEIGHTS_FILE})
        except OSError as error:
            raise invalid("folder", f"{error.filename}: {error.strerror}") from None
        named = tuple(name for name in others if name.isprintable())[:_MOST_NAMES]
        return cls(config, weights, size, f"sha256:{digest.hexdigest()}", named)

    @property
    def size(self) -> int:
        """Number of bytes of both files."""
        return len(self.config) + self.weights_size

    def header(
        self, upload_id: str, labels: Mapping[str, str] | None = None, **terms: Any
    ) -> adapter_pb2.UploadHeader:
        """Returns the first message of a stream. `terms` are further fields of it."""
        return adapter_pb2.UploadHeader(
            upload_id=upload_id,
            config_size=len(self.config),
            weights_size=self.weights_size,
            expected_digest=self.digest,
            labels=labels,
            other_files=self.others,
            **terms,
        )

    def chunks(self, arrived: UploadProgress) -> Iterator[adapter_pb2.UploadAdapterRequest]:
        """Yields the bytes after `arrived` as messages. Reads the weights piece by piece."""
        if arrived.config_bytes < len(self.config):
            yield _chunk(
                adapter_pb2.ADAPTER_FILE_CONFIG,
                arrived.config_bytes,
                self.config[arrived.config_bytes :],
            )
        with self.weights.open("rb") as file:
            file.seek(arrived.weights_bytes)
            offset = arrived.weights_bytes
            while piece := file.read(CHUNK_BYTES):
                yield _chunk(adapter_pb2.ADAPTER_FILE_WEIGHTS, offset, piece)
                offset += len(piece)


def require_adapter(folder: str | os.PathLike[str]) -> None:
    """Looks at the names in a folder and at the beginnings of the two files.

    Raises AdapterRejected, with what the folder holds instead and what to do; InvalidRequest if
    there is no such folder or it cannot be read.
    """
    root = Path(folder)
    try:
        if not _listing(root, ""):
            raise invalid("folder", f"{root} is empty")
        cause = cause_of(partial(_listing, root))
        if cause is None and (head := _head(root / CONFIG_FILE)) is not None:
            cause = cause_in(head, CONFIG_FILE, text=True)
        if cause is None and (head := _head(root / WEIGHTS_FILE)) is not None:
            cause = cause_in(head, WEIGHTS_FILE)
    except NotADirectoryError:
        raise invalid("folder", f"{root} is a file; give the folder of the adapter") from None
    except OSError as error:
        raise invalid("folder", f"{error.filename}: {error.strerror}") from None
    if cause is not None:
        reason, message, field = cause
        violations = (FieldViolation(field, message),)
        code = grpc.StatusCode.FAILED_PRECONDITION
        details = ErrorDetails(code, f"{root}: {message}", reason, violations=violations)
        raise AdapterRejected(details)


def _listing(root: Path, below: str) -> list[tuple[str, bool]]:
    """The names in a folder, and which are folders; none if a folder below cannot be read."""
    try:
        with os.scandir(root / below) as entries:
            return [(entry.name, entry.is_dir()) for entry in islice(entries, 1000)]
    except OSError:
        if not below:
            raise
        return []


def _head(file: Path) -> bytes | None:
    """The first bytes of a regular file; None for anything else."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return opened.read(HEAD_BYTES)


class Attempts:
    """Counts the attempts at an upload. It is given up after six in a row without progress."""

    def __init__(self) -> None:
        self._furthest = -1
        self._fruitless = 0
        self.made = 0

    def pause(self, error: LoraplexError, arrived: UploadProgress | None) -> float | None:
        """Returns the seconds to wait before the next attempt; None to give up."""
        self.made += 1
        if not _passes(error):
            return None
        reached = arrived.config_bytes + arrived.weights_bytes if arrived else -1
        self._fruitless = 1 if reached > self._furthest else self._fruitless + 1
        self._furthest = max(self._furthest, reached)
        if self._fruitless >= _ATTEMPTS:
            return None
        return max(error.retry_after or 0.0, min(0.1 * 2.0**self._fruitless, _LONGEST_PAUSE))


def stream(
    files: Files,
    header: adapter_pb2.UploadHeader,
    arrived: UploadProgress,
    progress: Progress | None,
) -> Iterator[adapter_pb2.UploadAdapterRequest]:
    """Yields the messages of one stream, and calls `progress` after each chunk."""
    sent = arrived.config_bytes + arrived.weights_bytes
    yield adapter_pb2.UploadAdapterRequest(header=header)
    for message in files.chunks(arrived):
        yield message
        sent += len(message.chunk.data)
        if progress is not None:
            progress(sent, files.size)


def _passes(error: LoraplexError) -> bool:
    """Whether another attempt can succeed."""
    if isinstance(error, QuotaExceeded):
        return error.retry_after is not None and error.retry_after <= _LONGEST_QUOTA_PAUSE
    return isinstance(error, Unavailable | UploadOutOfStep) or _status_lost(error)


def _status_lost(error: LoraplexError) -> bool:
    """Whether the server's status was lost.

    If the server ends the stream during a write, grpc.aio reports an error of its own in place of
    the server's status. The next attempt, which has less to write, gets the status.
    """
    local = isinstance(error, ServerFault) and not error.reason
    return local and error.message == "Internal error from Core"


def _chunk(
    file: adapter_pb2.AdapterFile, offset: int, data: bytes
) -> adapter_pb2.UploadAdapterRequest:
    chunk = adapter_pb2.UploadChunk(file=file, offset=offset, data=data)
    return adapter_pb2.UploadAdapterRequest(chunk=chunk)
