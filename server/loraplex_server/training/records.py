"""Jobs on the disk: one directory each, with its record, its data and the trainer's files."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Final

import msgspec
from loraplex_model.base.durable import (
    flush,
    lock,
    make_directory,
    read_regular,
    write_atomically,
)

from loraplex_server.training.jobs import JobRecord

RECORD: Final = "job.json"
DATA: Final = "files"
_LOCK: Final = "lock"
_ID: Final = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}")

log = logging.getLogger(__name__)


class Records:
    """The directory of all jobs, which one server at a time owns.

    Every method blocks and may raise OSError; none may run on the event loop.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._lock: int | None = None

    def acquire(self) -> bool:
        """Locks the directory, which is made if it is missing. False if another server has it.

        The kernel releases the lock when the process ends, however it ends.
        """
        make_directory(self._root, mode=0o700)
        try:
            self._lock = lock(self._root / _LOCK, wait=False, mode=0o600)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Releases the lock. Idempotent."""
        held, self._lock = self._lock, None
        if held is not None:
            os.close(held)

    @property
    def data(self) -> Path:
        """The directory of the uploaded files of examples."""
        return self._root / DATA

    def folder(self, job_id: str) -> Path:
        """Returns the path of a job's directory."""
        assert _ID.fullmatch(job_id), job_id
        return self._root / job_id

    def make(self, job_id: str) -> Path:
        """Makes the directory of a new job. Without a record it does not count as a job."""
        folder = self.folder(job_id)
        folder.mkdir(mode=0o700)
        return folder

    def save(self, job: JobRecord) -> None:
        """Writes a job's record atomically."""
        folder = self.folder(job.id)
        write_atomically(folder / RECORD, msgspec.json.encode(job), mode=0o600)
        flush(folder)
        flush(self._root)

    def load(self) -> list[JobRecord]:
        """Reads all jobs, oldest first. Directories without a record are removed.

        A damaged record is logged and left for the operator.
        """
        found = []
        for folder in sorted(self._root.iterdir()):
            if not _ID.fullmatch(folder.name):
                continue
            try:
                found.append(msgspec.json.decode(read_regular(folder / RECORD), type=JobRecord))
            except FileNotFoundError:
                self.remove(folder.name)
            except (msgspec.DecodeError, OSError) as error:
                log.error("the record of training job %s is damaged: %s", folder.name, error)
        return found

    def remove(self, job_id: str) -> None:
        """Removes a job with all its files."""
        folder = self.folder(job_id)
        with contextlib.suppress(FileNotFoundError):
            (folder / RECORD).unlink()  # first: without a record it is no job
            flush(folder)
        shutil.rmtree(folder, ignore_errors=True)


def next_id(newest: str) -> str:
    """Returns an id above `newest`: the time in milliseconds and a random number."""
    last = int(newest[:12] or "0", 16)
    number = max(time.time_ns() // 1_000_000, last + 1)
    return f"{number:012x}-{secrets.token_hex(4)}"
