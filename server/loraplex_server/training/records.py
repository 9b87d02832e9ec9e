"""The jobs on disk: a folder each, with its record, its data and whatever its trainer writes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from loraplex_server.training.jobs import Job

RECORD: Final = "job.json"
_LOCK: Final = "lock"
_ID: Final = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}")

log = logging.getLogger(__name__)


class Records:
    """The folder of jobs, owned by one server at a time. Every method blocks; none is on the loop.

    OSError goes through, from all of them.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._lock: int | None = None

    def acquire(self) -> bool:
        """Takes the folder; False while another server has it. Made if it is missing.

        The kernel gives it back when the process ends, however it ends.
        """
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        return True

    def release(self) -> None:
        """Gives the folder back. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def folder(self, job_id: str) -> Path:
        """Where a job's files are."""
        assert _ID.fullmatch(job_id), job_id
        return self._root / job_id

    def make(self, job_id: str) -> Path:
        """The empty folder of a new job, which is none before it is saved."""
        folder = self.folder(job_id)
        folder.mkdir(mode=0o700)
        return folder

    def save(self, job: Job) -> None:
        """Writes the record: the old one or the new one is there, whatever happens."""
        folder = self.folder(job.id)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".job-")
        try:
            with open(handle, "wb") as file:
                file.write(msgspec.json.encode(job))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, folder / RECORD)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        for path in (folder, self._root):
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def load(self) -> list[Job]:
        """All jobs, the oldest first. Folders of jobs that never came to be are removed.

        A record that cannot be read is logged and left for the operator.
        """
        found = []
        for folder in sorted(self._root.iterdir()):
            if not _ID.fullmatch(folder.name):
                continue
            try:
                found.append(msgspec.json.decode((folder / RECORD).read_bytes(), type=Job))
            except FileNotFoundError:
                self.remove(folder.name)
            except msgspec.DecodeError as error:
                log.error("the record of training job %s is damaged: %s", folder.name, error)
        return found

    def remove(self, job_id: str) -> None:
        """Removes a job and all that it left."""
        folder = self.folder(job_id)
        with contextlib.suppress(FileNotFoundError):
            (folder / RECORD).unlink()  # first: a job that is half gone is none
        shutil.rmtree(folder, ignore_errors=True)
