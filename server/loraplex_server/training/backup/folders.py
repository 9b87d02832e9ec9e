"""The folders of training that belong into a backup: data files, and the records of jobs.

A job's examples, configuration, checkpoints and log are left out: they matter only to a trainer,
and the adapter that it made is in the store. So a job that has not ended cannot go on after a
recovery; the backup has it as failed, with the reason INTERRUPTED.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
from loraplex_adapters.store.backup import AttachedFile, AttachedFolder
from loraplex_model.base.durable import read_regular
from loraplex_model.base.refusal import Reason
from msgspec.structs import replace

from loraplex_server.training import records
from loraplex_server.training.files import folder as files
from loraplex_server.training.files.record import DataFileRecord
from loraplex_server.training.history.events import JobEventRecord
from loraplex_server.training.history.file import EVENTS
from loraplex_server.training.jobs import FailureRecord, JobRecord, State
from loraplex_server.training.table import entered

_ID: Final = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}")
_NOT_ENDED: Final = (
    "the job had not ended when the store was backed up; unless its adapter is there, "
    "order it again"
)

log = logging.getLogger(__name__)


class TrainingFolders:
    """The folders of a directory of training jobs, which a server may use meanwhile."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def exists(self) -> bool:
        """Whether there is such a directory."""
        return self._root.is_dir()

    def folders(self) -> Iterator[AttachedFolder]:
        """Yields each data file and each job; what cannot be read has no files. Raises OSError."""
        for folder in _with_ids(self._root / records.DATA):
            yield from _read(folder, f"{records.DATA}/{folder.name}", _data_file)
        for folder in _with_ids(self._root):
            yield from _read(folder, folder.name, _job)


def _with_ids(root: Path) -> list[Path]:
    try:
        return sorted(entry for entry in root.iterdir() if _ID.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def _read(
    folder: Path, name: str, files_of: Callable[[Path], dict[str, AttachedFile]]
) -> Iterator[AttachedFolder]:
    """Yields a folder, unless it is being made or removed."""
    try:
        found = files_of(folder)
    except FileNotFoundError:
        return  # without a record it is neither a data file nor a job
    except (msgspec.DecodeError, OSError) as error:
        log.error("the record of %s cannot be backed up: %s", name, error)
        yield AttachedFolder(name, None)
        return
    yield AttachedFolder(name, found)


def _data_file(folder: Path) -> dict[str, AttachedFile]:
    content = read_regular(folder / files.RECORD)
    record = msgspec.json.decode(content, type=DataFileRecord)
    data = AttachedFile(folder / files.BYTES, record.digest.removeprefix("sha256:"))
    return {files.BYTES: data, files.RECORD: AttachedFile(content)}


def _job(folder: Path) -> dict[str, AttachedFile]:
    content = read_regular(folder / records.RECORD)
    job = msgspec.json.decode(content, type=JobRecord)
    try:
        events = read_regular(folder / EVENTS)
    except FileNotFoundError:
        events = b""
    events = events[: events.rfind(b"\n") + 1]  # the last line may be half written
    if not job.final:
        job = _given_up(job)
        content = msgspec.json.encode(job)
        events += _last_events(job, events)
    found = {records.RECORD: AttachedFile(content)}
    return {**found, EVENTS: AttachedFile(events)} if events else found


def _given_up(job: JobRecord) -> JobRecord:
    error = FailureRecord(Reason.INTERRUPTED, _NOT_ENDED)
    return job.change(state=State.FAILED, ended=time.time(), error=error)


def _last_events(job: JobRecord, before: bytes) -> bytes:
    """The lines that say how a job ended, after those before."""
    number = before.count(b"\n")
    for line in before.splitlines():
        try:
            number = max(number, msgspec.json.decode(line, type=JobEventRecord).number)
        except msgspec.DecodeError:
            continue
    lines = b""
    for event in entered(job):
        number += 1
        lines += msgspec.json.encode(replace(event, number=number, time=job.ended)) + b"\n"
    return lines
