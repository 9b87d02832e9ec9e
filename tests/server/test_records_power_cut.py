"""Training jobs on the server's disk after a loss of power."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from loraplex_server.runtime.lanes import Lanes
from loraplex_server.training.creation import JobFactory
from loraplex_server.training.files.folder import DataFolder
from loraplex_server.training.files.record import DataFileRecord, DataUpload
from loraplex_server.training.files.shelf import DataShelf, ShelfLimits
from loraplex_server.training.jobs import JobOrder, JobRecord, State
from loraplex_server.training.records import RECORD, Records
from loraplex_server.training.request import DataSource, JobRequest
from loraplex_server.training.trainer import CONFIG, DATA, Trainer, TrainerPlan
from power.recorder import Recorder
from power.replay import replay

pytestmark = pytest.mark.fault("power-cut")

EXAMPLES = b'{"prompt": "a", "completion": "b"}\n' * 100


class Planned(Trainer):
    """A trainer that plans nothing."""

    async def plan(self, folder: Path) -> TrainerPlan:
        return TrainerPlan(1)

    def require(self, plan: TrainerPlan, held_bytes: int) -> None:
        pass


def shelf_of(records: Records) -> DataShelf:
    limits = ShelfLimits(1 << 20, 10, 1 << 20)
    return DataShelf(DataFolder(records.data), limits, Lanes().training)


async def create(records: Records, top: Path) -> JobRecord:
    trainer = Planned(["true"], {"model": "tiny"})
    factory = JobFactory(records, trainer, shelf_of(records), top, 1 << 20)
    request = JobRequest(JobOrder(name="job"), DataSource(EXAMPLES))
    return await factory.create(request, "", 0, lambda: None)


async def test_a_job_that_was_accepted_is_there_with_its_examples(tmp_path: Path) -> None:
    root = tmp_path / "var" / "jobs"
    recorder = Recorder(tmp_path)
    with recorder.recording():
        records = Records(root)
        assert records.acquire()
        job = await create(records, tmp_path)
        configuration = (records.folder(job.id) / CONFIG).read_bytes()
        recorder.acknowledge("accepted")
        records.save(job.change(state=State.RUNNING, started=1.0))
        recorder.acknowledge("running")
        records.save(job.change(state=State.SUCCEEDED, started=1.0, ended=2.0))
        recorder.acknowledge("done")
        records.remove(job.id)
        recorder.acknowledge("removed")
        records.release()
    order = [State.QUEUED, State.RUNNING, State.SUCCEEDED, None]
    steps = {"accepted": 0, "running": 1, "done": 2, "removed": 3}

    def check(left: Path, acknowledged: frozenset[str]) -> None:
        there = Records(left / "var" / "jobs")
        assert there.acquire()
        found = there.load()
        there.release()
        reached = max((steps[step] for step in acknowledged), default=-1)
        state = found[0].state if found else None
        allowed = order[max(reached, 0) : reached + 2] + [None] * (reached < 0)
        assert state in allowed, f"{state} after {sorted(acknowledged)}"
        folder = there.folder(job.id)
        assert bool(found) == folder.exists()
        assert not found or (folder / RECORD).is_file()
        if state in (State.QUEUED, State.RUNNING):  # a server would train it
            assert (folder / DATA).read_bytes() == EXAMPLES
            assert (folder / CONFIG).read_bytes() == configuration

    replay(recorder.moments, check)


async def test_a_file_that_was_stored_is_there_whole(tmp_path: Path) -> None:
    root = tmp_path / "var" / "jobs"
    recorder = Recorder(tmp_path)

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(EXAMPLES), 1000):
            yield EXAMPLES[at : at + 1000]

    async def allowed(held: int, size: int) -> None:
        pass

    with recorder.recording():
        records = Records(root)
        assert records.acquire()
        shelf = shelf_of(records)
        await shelf.load()
        stored = await shelf.receive(DataUpload("", "peer", "a", "once"), chunks(), allowed)
        recorder.acknowledge("stored")
        await shelf.remove(stored.id, None)
        recorder.acknowledge("removed")
        records.release()

    def check(left: Path, acknowledged: frozenset[str]) -> None:
        folder = DataFolder(left / "var" / "jobs" / "files")
        found: list[DataFileRecord] = folder.load()
        if "removed" in acknowledged:
            assert not found
        elif "stored" in acknowledged:
            assert found in ([stored], [])  # it is being removed
        for record in found:
            assert record == stored
            target = left / "copy"
            target.unlink(missing_ok=True)
            folder.copy(record, target)  # compares the bytes with the digest
            assert target.read_bytes() == EXAMPLES
        there = left / "var" / "jobs" / "files"
        assert not there.exists() or {path.name for path in there.iterdir()} == {
            record.id for record in found
        }

    replay(recorder.moments, check)
