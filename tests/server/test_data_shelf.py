"""An uploaded file is there or it is not, also if its caller goes while it gets its name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from loraplex_server.runtime.lanes import Lane
from loraplex_server.training.files.folder import ArrivingFile, DataFolder
from loraplex_server.training.files.record import DataFileRecord, DataUpload
from loraplex_server.training.files.shelf import DataShelf, ShelfLimits


async def chunks() -> AsyncIterator[bytes]:
    yield b'{"text": "a"}\n'


async def nothing_forbidden(held: int, more: int) -> None:
    """Every principal may have every file."""


async def test_a_file_that_cannot_be_deleted_is_there_again_also_without_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: DataFolder, record: DataFileRecord) -> None:
        time.sleep(0.2)
        raise OSError(30, "Read-only file system")

    shelf = DataShelf(
        DataFolder(tmp_path / "files"), ShelfLimits(1 << 20, 10, 1 << 20), Lane("files", 2, 8)
    )
    await shelf.load()
    stored = await shelf.receive(DataUpload("", ""), chunks(), nothing_forbidden)
    monkeypatch.setattr(DataFolder, "remove", full)
    gone = asyncio.create_task(shelf.remove(stored.id, None))
    await asyncio.sleep(0.1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await asyncio.sleep(0.3)
    assert shelf.get(stored.id, None) == stored


async def test_a_caller_that_goes_while_the_file_gets_its_name_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    finish = ArrivingFile.finish

    def late(file: ArrivingFile, record: DataFileRecord) -> None:
        time.sleep(0.2)
        finish(file, record)

    monkeypatch.setattr(ArrivingFile, "finish", late)
    shelf = DataShelf(
        DataFolder(tmp_path / "files"), ShelfLimits(1 << 20, 10, 1 << 20), Lane("files", 2, 8)
    )
    await shelf.load()
    upload = DataUpload("", "", "a.jsonl", "one")
    gone = asyncio.create_task(shelf.receive(upload, chunks(), nothing_forbidden))
    await asyncio.sleep(0.1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    stored = await shelf.receive(upload, chunks(), nothing_forbidden)
    pieces = [piece async for piece in shelf.read(stored)]
    assert b"".join(pieces) == b'{"text": "a"}\n'
    assert [path.name for path in (tmp_path / "files").iterdir()] == [stored.id]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
