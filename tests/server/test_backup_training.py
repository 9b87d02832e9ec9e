"""A backup has users' data files and the records of jobs, and a server takes them as they were."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from adapters.adapter_files import BASE
from loraplex_adapters.store import Store
from loraplex_model.base.refusal import Reason
from loraplex_server.commands.program import app
from loraplex_server.runtime.lanes import Lane
from loraplex_server.training.backup.folders import TrainingFolders
from loraplex_server.training.files.folder import DataFolder
from loraplex_server.training.files.record import DataFileRecord, DataUpload
from loraplex_server.training.files.shelf import DataShelf, ShelfLimits
from loraplex_server.training.history.events import JobEventRecord
from loraplex_server.training.history.file import EventFile
from loraplex_server.training.history.history import JobHistories
from loraplex_server.training.jobs import (
    FINAL,
    JobOrder,
    JobOwner,
    JobRecord,
    ProgressRecord,
    ResultRecord,
    State,
)
from loraplex_server.training.records import Records
from loraplex_server.training.table import JobTable
from typer.testing import CliRunner, Result

from adapters import stores

DATA = b'{"text": "\xc3\xb6"}\n' * 40_000  # more than one piece


def shelf(root: Path) -> DataShelf:
    limits = ShelfLimits(1 << 20, 10, 1 << 24)
    return DataShelf(DataFolder(root / "files"), limits, Lane("files", 2, 8))


async def upload(root: Path, data: bytes = DATA, **fields: Any) -> DataFileRecord:
    async def chunks() -> AsyncIterator[bytes]:
        yield data[:1000]
        yield data[1000:]

    async def allowed(held: int, more: int) -> None:
        """Every principal may have every file."""

    there = shelf(root)
    await there.load()
    return await there.receive(DataUpload(peer="", **{"owner": "", **fields}), chunks(), allowed)


def save(root: Path, number: int, state: State, *events: JobEventRecord) -> JobRecord:
    """A job in the directory, with everything that a trainer leaves there."""
    records = Records(root)
    job = JobRecord(
        id=f"{number:012x}-0000000a",
        order=JobOrder(name="made", labels={"team": "öps"}),
        owner=JobOwner("anna"),
        state=state,
        progress=ProgressRecord(step=3, steps=9, loss=0.5),
        ended=7.0 if state in FINAL else 0.0,
        result=ResultRecord(version=1, digest="sha256:1") if state is State.SUCCEEDED else None,
    )
    root.mkdir(exist_ok=True)
    folder = records.make(job.id)
    (folder / "data.jsonl").write_bytes(DATA)
    (folder / "trainer.log").write_text("loss\n")
    (folder / "run").mkdir()
    (folder / "run" / "weights").write_bytes(b"weights")
    if events:
        EventFile(folder).append(events)
    records.save(job)
    return job


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    with Store(tmp_path / "store") as store:
        store.register("a", stores.adapter(tmp_path / "source"), BASE)
    return tmp_path / "jobs"


@pytest.fixture
def where(tmp_path: Path) -> tuple[object, ...]:
    return ("--store", tmp_path / "store", "--training-jobs-dir", tmp_path / "jobs")


@pytest.fixture
def other(tmp_path: Path) -> tuple[object, ...]:
    return ("--store", tmp_path / "new", "--training-jobs-dir", tmp_path / "new-jobs")


async def test_a_recovered_server_has_its_users_files(
    jobs: Path, tmp_path: Path, where: tuple[object, ...], other: tuple[object, ...]
) -> None:
    named = {"owner": "änna", "filename": "../x\n.jsonl", "labels": {"a": "b"}, "request_id": "r"}
    first = await upload(jobs, **named)
    second = await upload(jobs, b"other", owner="bob")
    (jobs / "files" / ".arriving-000000000001-0000000a").mkdir()
    done = run("store", "backup", tmp_path / "backup", *where)
    assert done.exit_code == 0, done.output
    assert "2 data files and 0 records of training jobs; 4 contents copied" in done.stdout
    checked = run("store", "backup", tmp_path / "backup", "--verify", *other)
    assert "2 data files and 0 records of training jobs are intact, 0 damaged" in checked.stdout
    done = run("store", "recover", tmp_path / "backup", *other)
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (
        0,
        "recovered 2 data files and 0 records of training jobs",
    )
    there = shelf(tmp_path / "new-jobs")
    await there.load()
    assert [there.get(each.id, each.owner) for each in (first, second)] == [first, second]
    assert b"".join([piece async for piece in there.read(first)]) == DATA
    assert there.page(9, "", "änna")[0] == [first]
    # It belongs to the same principal, and a repeated upload is still known.
    assert await upload(tmp_path / "new-jobs", **named) == first
    await there.remove(second.id, "bob")
    assert len(list((tmp_path / "new-jobs" / "files").iterdir())) == 1


async def test_ended_jobs_come_back_with_their_events_and_without_their_work(
    jobs: Path, tmp_path: Path, where: tuple[object, ...], other: tuple[object, ...]
) -> None:
    events = [JobEventRecord(number=n, time=n, message=f"ö {n}") for n in (1, 2, 3)]
    ended = [save(jobs, n, state, *events) for n, state in enumerate(sorted(FINAL, key=str))]
    run("store", "backup", tmp_path / "backup", *where)
    done = run("store", "recover", tmp_path / "backup", *other)
    assert done.exit_code == 0, done.output
    records, lane = Records(tmp_path / "new-jobs"), Lane("jobs", 2, 8)
    assert records.acquire()
    table = JobTable(records, 50, lane)
    assert await table.load() == ended
    page, _ = await table.histories.page(ended[0].id, 10, 0, newest_first=False)
    assert page == events
    names = {path.name for path in records.folder(ended[0].id).iterdir()}
    assert names == {"job.json", "events.jsonl"}
    records.release()


@pytest.mark.parametrize("state", sorted(set(State) - FINAL, key=str))
async def test_a_job_that_has_not_ended_is_there_as_failed_with_the_reason(
    state: State,
    jobs: Path,
    tmp_path: Path,
    where: tuple[object, ...],
    other: tuple[object, ...],
) -> None:
    job = save(jobs, 1, state, JobEventRecord(number=5, time=1.0, message="begun"))
    with (jobs / job.id / "events.jsonl").open("ab") as file:
        file.write(b'{"number":6,"mess')  # a server writes, or was killed
    before = (jobs / job.id / "job.json").read_bytes()
    run("store", "backup", tmp_path / "backup", *where)
    run("store", "recover", tmp_path / "backup", *other)
    (there,) = Records(tmp_path / "new-jobs").load()
    assert there.error is not None
    assert (there.state, there.error.reason) == (State.FAILED, Reason.INTERRUPTED)
    assert "order it again" in there.error.message
    assert there.change(state=state, error=None, ended=0.0) == job
    histories = JobHistories(Records(tmp_path / "new-jobs"), Lane("jobs", 2, 8))
    page, _ = await histories.page(job.id, 10, 0, newest_first=False)
    assert [event.number for event in page] == [5, 6, 7]
    assert (page[0].message, page[-1].state, page[-1].time) == ("begun", State.FAILED, there.ended)
    assert (jobs / job.id / "job.json").read_bytes() == before


async def test_damaged_records_are_named_and_the_rest_is_backed_up(
    jobs: Path, tmp_path: Path, where: tuple[object, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    files = [await upload(jobs, bytes([65 + n])) for n in range(5)]
    folders = [jobs / "files" / each.id for each in files]
    (folders[0] / "data").write_bytes(b"x")
    (folders[1] / "data").unlink()
    (folders[2] / "file.json").write_text("{")
    record = msgspec.json.decode((folders[3] / "file.json").read_bytes())
    (folders[3] / "file.json").write_text(json.dumps({**record, "digest": "sha256:../x"}))
    damaged = [save(jobs, n, State.FAILED) for n in (1, 2, 3)]
    (jobs / damaged[0].id / "job.json").write_text("")
    (jobs / damaged[1].id / "job.json").unlink()  # no job
    (jobs / damaged[2].id / "job.json").unlink()
    (jobs / damaged[2].id / "job.json").symlink_to("/dev/zero")
    done = run("store", "backup", tmp_path / "backup", *where, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert list(found["attached"]) == [f"files/{files[4].id}"]
    lost = [*(f"files/{each.id}" for each in files[:4]), damaged[0].id, damaged[2].id]
    assert sorted(found["attached_lost"]) == sorted(lost)


async def test_training_can_be_left_out_and_is_not_lost_by_mistake(
    jobs: Path, tmp_path: Path, where: tuple[object, ...], other: tuple[object, ...]
) -> None:
    place = tmp_path / "backup"
    await upload(jobs)
    run("store", "backup", place, *where)
    mistyped = run("store", "backup", place, "--store", where[1], "--training-jobs-dir", "none")
    assert (mistyped.exit_code, mistyped.stderr[:22]) == (1, "error: BACKUP_FAILED: ")
    done = run("store", "recover", place, *other, "--no-training")
    assert "left out: 1 data files" in done.stdout
    assert not (tmp_path / "new-jobs").exists()
    shutil.rmtree(tmp_path / "new")
    # A directory of jobs in use is never recovered over.
    refused = run("store", "recover", place, "--store", tmp_path / "new", *where[2:])
    assert refused.stderr.startswith("error: STORE_EXISTS: "), refused.output
    assert (
        json.loads(run("store", "backup", place, *where, "--no-training", "--json").stdout)[
            "attached"
        ]
        == {}
    )


async def test_files_that_come_and_go_meanwhile_are_whole_or_absent(
    jobs: Path, tmp_path: Path, where: tuple[object, ...]
) -> None:
    there, over, problems = shelf(jobs), asyncio.Event(), []
    await there.load()

    async def allowed(held: int, more: int) -> None:
        """Every principal may have every file."""

    async def change(number: int) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield bytes([65 + number]) * 5000

        while not over.is_set():
            record = await there.receive(DataUpload("", str(number)), chunks(), allowed)
            await there.remove(record.id, None)

    def back_up() -> None:
        for _ in range(5):
            done = run("store", "backup", tmp_path / "backup", *where, "--prune")
            checked = run("store", "backup", tmp_path / "backup", "--verify")
            if done.exit_code or checked.exit_code:
                problems.append(done.output + checked.output)

    changing = [asyncio.create_task(change(number)) for number in range(3)]
    try:
        await asyncio.to_thread(back_up)
    finally:
        over.set()
        await asyncio.gather(*changing)
    assert not problems


def test_the_folders_of_a_directory_without_training_are_none(tmp_path: Path) -> None:
    folders = TrainingFolders(tmp_path / "none")
    assert (folders.exists(), list(folders.folders())) == (False, [])
    assert Records(tmp_path / "jobs").acquire()
    assert list(TrainingFolders(tmp_path / "jobs").folders()) == []
