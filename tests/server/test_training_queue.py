"""The queue of training jobs across its own ends: restarts, crashes, a full disk, two servers."""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.principals import Principal
from loraplex_server.training import queue as module
from loraplex_server.training.jobs import (
    FailureRecord,
    JobOrder,
    JobOwner,
    JobRecord,
    ProgressRecord,
    ResultRecord,
    State,
)
from loraplex_server.training.queue import JobLimits, JobQueue
from loraplex_server.training.records import Records
from loraplex_server.training.request import DataSource, JobRequest
from loraplex_server.training.trainer import Trainer
from rpc.harness import until
from rpc.training_jobs import SCRIPT, alive, lines


@dataclass
class Shelf:
    """Takes adapters, or fails as told."""

    failures: list[Refusal] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    owners: list[JobOwner] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def check(self, order: JobOrder, principal: Principal) -> None:
        """Everything is free."""

    async def deliver(self, folder: Path, order: JobOrder, owner: JobOwner) -> ResultRecord:
        """Notes what it is given."""
        self.folders.append(folder)
        self.owners.append(owner)
        if self.gate is not None:
            await self.gate.wait()
        if self.failures:
            raise self.failures.pop()
        assert (folder / "weights").read_text() == "trained"
        return ResultRecord(version=1, digest="sha256:1")


@dataclass
class Counts:
    """What was counted."""

    now: tuple[int, int] = (0, 0)
    ended: list[tuple[str, int]] = field(default_factory=list)

    def training_jobs(self, queued: int, running: int) -> None:
        self.now = (queued, running)

    def training_ended(self, result: str, tokens: int) -> None:
        self.ended.append((result, tokens))


@dataclass
class Bench:
    """A queue over a folder, and what is around it."""

    queue: JobQueue
    records: Records
    shelf: Shelf
    counts: Counts
    made: str

    async def create(self, *texts: str, name: str = "made", **fields: Any) -> JobRecord:
        order = JobOrder(name=name, settings={"steps": 9}, replace=True)
        request = JobRequest(order, DataSource(lines(*texts)), **fields)
        return (await self.queue.create(request))[0]

    async def at(self, job: JobRecord, step: int) -> None:
        """Waits until it has saved at this step."""

        def there() -> bool:
            progress = self.queue.get(job.id).progress
            return progress is not None and progress.saved_step == step

        await until(there)

    async def ended(self, job: JobRecord) -> JobRecord:
        """The job once it has ended."""
        async for state in self.queue.watch(job.id):
            job = state
        return job

    def release(self, job: JobRecord) -> None:
        (self.records.folder(job.id) / "release").touch()

    def calls(self, job: JobRecord) -> list[str]:
        text = (self.records.folder(job.id) / "calls").read_text()
        return [line.split()[0] for line in text.splitlines()]


def bench(folder: Path, **bounds: int) -> Bench:
    made = folder / "result"
    made.mkdir(exist_ok=True)
    (made / "weights").write_text("trained")
    program = [sys.executable, "-I", "-S", str(SCRIPT)]
    trainer = Trainer(program, {"device": "cpu", "model": "m"}, patience=5.0)
    records, shelf, counts = Records(folder / "jobs"), Shelf(), Counts()
    limits = JobLimits(**{"waiting": 8, "kept": 50, "data_bytes": 1000, **bounds})
    queue = JobQueue(records, trainer, shelf, counts, folder, limits)
    return Bench(queue, records, shelf, counts, str(made))


@asynccontextmanager
async def opened(folder: Path, **bounds: int) -> AsyncIterator[Bench]:
    one = bench(folder, **bounds)
    await one.queue.open()
    try:
        yield one
    finally:
        await one.queue.stop(5.0)


async def test_a_job_that_was_running_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    async with opened(tmp_path) as one:
        job = await one.create("step 2", "hold", "step 4", f"publish {one.made}")
        waiting = await one.create(f"publish {one.made}", name="after")
        await one.at(job, 2)
        watched = asyncio.create_task(one.ended(job))
        await asyncio.sleep(0)
    assert (await watched).state is State.INTERRUPTED
    one.release(job)
    async with opened(tmp_path) as two:
        done = await two.ended(job)
        assert done.state is State.SUCCEEDED
        assert done.resumptions == 0  # it was ended in good order
        assert (done.progress.step, done.progress.loss) == (4, 0.25)
        assert two.calls(job) == ["plan", "run", "resume"]
        assert (await two.ended(waiting)).state is State.SUCCEEDED
        assert two.calls(waiting) == ["plan", "run"]
        assert two.shelf.folders == [
            two.records.folder(j.id) / "run" / "adapter" for j in (job, waiting)
        ]


async def test_a_job_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as one:
        job = await one.create("hold", f"publish {one.made}")
        await until(lambda: one.queue.get(job.id).progress is not None)
    one.release(job)
    async with opened(tmp_path) as two:
        assert (await two.ended(job)).state is State.SUCCEEDED
        assert two.calls(job) == ["plan", "run", "run"]


def crashed(folder: Path, one: Bench, **fields: Any) -> JobRecord:
    """A job as a server leaves it that was killed."""
    job_id = "0" * 12 + "-" + "0" * 8
    job = JobRecord(id=job_id, order=JobOrder(name="made"), state=State.RUNNING, **fields)
    assert one.records.acquire()
    one.records.make(job_id)
    one.records.save(job)
    one.records.release()
    return job


async def test_a_job_under_which_the_server_dies_again_and_again_is_given_up(
    tmp_path: Path,
) -> None:
    job = crashed(tmp_path, bench(tmp_path), resumptions=module.MAX_RESUMPTIONS)
    async with opened(tmp_path) as one:
        found = one.queue.get(job.id)
        assert (found.state, found.error.reason) == (State.FAILED, "INTERRUPTED")
        assert "loraplex-train resume" in found.error.message
        assert one.counts.ended == [("failed", 0)]


async def test_an_adapter_that_was_made_is_not_trained_again(tmp_path: Path) -> None:
    one = bench(tmp_path)
    job = crashed(tmp_path, one, made="run/adapter")
    adapter = one.records.folder(job.id) / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "weights").write_text("trained")
    async with opened(tmp_path) as two:
        done = await two.ended(job)
        assert (done.state, done.resumptions) == (State.SUCCEEDED, 1)
        assert two.shelf.folders == [adapter]


async def test_a_hand_over_that_hangs_does_not_hold_the_end_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HANDOVER_SECONDS", 0.05)
    one = bench(tmp_path)
    one.shelf.gate = asyncio.Event()
    await one.queue.open()
    job = await one.create(f"publish {one.made}")
    await until(lambda: bool(one.shelf.folders))
    await asyncio.wait_for(one.queue.stop(0.05), 20)
    async with opened(tmp_path) as two:
        done = await two.ended(job)
        assert (done.state, done.resumptions) == (State.SUCCEEDED, 1)
        assert two.calls(job) == ["plan", "run"]


async def test_a_second_server_waits_until_the_first_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.02)
    first = bench(tmp_path)
    await first.queue.open()
    job = await first.create("step 1", "hold", f"publish {first.made}")
    await first.at(job, 1)
    async with opened(tmp_path) as second:
        for call in (
            lambda: second.queue.get(job.id),
            lambda: second.queue.page(1, "", ()),
        ):
            with pytest.raises(Refusal) as caught:
                call()
            assert caught.value.reason == "TRAINING_ELSEWHERE"
        with pytest.raises(Refusal) as caught:
            await second.create("hold")
        assert caught.value.reason == "TRAINING_ELSEWHERE"
        first.release(job)
        await first.queue.stop(5.0)
        await until(lambda: second.queue._owned)
        assert (await second.ended(job)).state is State.SUCCEEDED


async def test_one_that_ended_has_let_go_even_while_it_waited(tmp_path: Path) -> None:
    first, second = bench(tmp_path), bench(tmp_path)
    await first.queue.open()
    await second.queue.open()
    await asyncio.wait_for(second.queue.stop(1.0), 10)
    await first.queue.stop(1.0)
    assert bench(tmp_path).records.acquire()


async def test_old_jobs_are_forgotten_with_their_files(tmp_path: Path) -> None:
    async with opened(tmp_path, kept=2) as one:
        jobs = [await one.create("diverge", name=f"n{i}") for i in range(4)]
        await until(lambda: len(one.counts.ended) == 4 and len(list(one.queue._table)) == 2)
        kept, _ = one.queue.page(10, "", ())
        assert [job.id for job in kept] == [jobs[3].id, jobs[2].id]
        left = {"lock", jobs[2].id, jobs[3].id}
        await until(lambda: {path.name for path in (tmp_path / "jobs").iterdir()} == left)


@pytest.mark.fault("supervision-ends")
async def test_a_disk_that_removes_nothing_does_not_end_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Records, job_id: str) -> None:
        raise OSError(errno.EROFS, "the file system is read-only")

    monkeypatch.setattr(Records, "remove", fail)
    async with opened(tmp_path, kept=1) as one, asyncio.timeout(60):
        for _ in range(3):
            job = await one.create(f"publish {one.made}")
            assert (await one.ended(job)).state is State.SUCCEEDED
        await until(lambda: len(one.queue.page(10, "", ())[0]) == 1)


async def test_a_job_that_ends_last_is_kept_though_newer_ones_ended_before_it(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, kept=1) as one:
        old = await one.create("step 1", "hold", name="old")
        await one.at(old, 1)
        newer = await one.create("diverge", name="newer")
        await one.queue.cancel(newer.id)
        watched = asyncio.create_task(one.ended(old))
        assert (await one.queue.cancel(old.id)).state is State.CANCELLED
        assert (await watched).state is State.CANCELLED
        assert [job.id for job in one.queue.page(10, "", ())[0]] == [old.id]


async def test_what_is_no_job_is_cleared_away_and_a_damaged_one_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = bench(tmp_path)
    good = crashed(tmp_path, one, made="", resumptions=99)
    half, torn, other = "1" * 12 + "-" + "1" * 8, "2" * 12 + "-" + "2" * 8, "notes"
    for name in (half, torn, other):
        (tmp_path / "jobs" / name).mkdir()
    (tmp_path / "jobs" / half / "data.jsonl").write_text("{}")
    (tmp_path / "jobs" / torn / "job.json").write_text('{"id": ')
    async with opened(tmp_path) as two:
        found, _ = two.queue.page(10, "", ())
        assert [job.id for job in found] == [good.id]
    assert {path.name for path in (tmp_path / "jobs").iterdir()} == {"lock", good.id, torn, other}
    assert torn in caplog.text


async def test_a_full_disk_refuses_a_job_and_keeps_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with opened(tmp_path) as one:
        with monkeypatch.context() as patch:
            patch.setattr(Records, "save", full)
            with pytest.raises(Refusal) as caught:
                await one.create("diverge")
        assert caught.value.reason == "STORE_FULL"
        assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["lock"]
        assert one.queue.page(10, "", ()) == ([], "")
        # One that runs goes on without its record.
        job = await one.create("step 1", "hold", f"publish {one.made}")
        await one.at(job, 1)
        monkeypatch.setattr(Records, "save", full)
        one.release(job)
        assert (await one.ended(job)).state is State.SUCCEEDED


async def test_a_client_that_leaves_while_its_job_is_checked_leaves_nothing(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as one:
        creating = asyncio.create_task(one.create("slow", "diverge"))
        planning = tmp_path / "jobs"
        await until(lambda: any(planning.glob("*/planning")))
        (pid,) = [int(f.read_text().split()[1]) for f in planning.glob("*/calls")]
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        await until(lambda: [path.name for path in planning.iterdir()] == ["lock"])
        await until(lambda: not alive(pid))
        assert (await one.ended(await one.create("diverge"))).state is State.FAILED


async def test_a_job_that_is_checked_while_the_server_ends_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as one:
        creating = asyncio.create_task(one.create("slow", "diverge"))
        await until(lambda: any((tmp_path / "jobs").glob("*/planning")))
        await one.queue.stop(1.0)
        for folder in (tmp_path / "jobs").glob("*-*"):
            (folder / "release").touch()
        with pytest.raises(Refusal) as caught:
            await creating
        assert caught.value.reason == "DRAINING"
        assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["lock"]


async def test_a_trainer_that_cannot_be_started_fails_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as one:
        first = await one.create("step 1", "hold")
        second = await one.create("diverge", name="second")
        await one.at(first, 1)

        async def broken(*_: object) -> None:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

        monkeypatch.setattr("loraplex_server.training.child.Child.start", broken)
        await one.queue.cancel(first.id)
        done = await one.ended(second)
        assert (done.state, done.error.reason) == (State.FAILED, "TRAINER_CRASHED")


async def test_a_fault_of_the_server_ends_a_job_and_not_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as one:
        with monkeypatch.context() as patch:

            def broken(*_: object) -> None:
                raise RuntimeError("a secret")

            patch.setattr(Trainer, "command", broken)
            done = await one.ended(await one.create("diverge"))
        assert done.error == FailureRecord("ENGINE_FAULT", "internal error")
        after = await one.ended(await one.create("diverge"))
        assert after.error.reason == "DIVERGED"


@pytest.mark.fault("supervision-ends")
async def test_a_trainer_whose_output_is_no_longer_read_fails_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as one:

        async def broken(*_: object) -> None:
            raise RuntimeError("a fault of the reader")

        monkeypatch.setattr("loraplex_server.training.runner.Runner._follow", broken)
        job = await one.create("step 1", "hold")  # it would go on until it is released
        done = await asyncio.wait_for(one.ended(job), 30)
        assert done.error == FailureRecord("ENGINE_FAULT", "internal error")


async def test_memory_that_has_gone_meanwhile_fails_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as one:
        first = await one.create("step 1", "hold")
        second = await one.create("diverge", name="second")
        await one.at(first, 1)
        monkeypatch.setattr("loraplex_server.training.memory.available", lambda: 999)
        await one.queue.cancel(first.id)
        done = await one.ended(second)
        assert (done.state, done.error.reason) == (State.FAILED, "TRAINING_MEMORY")


async def test_memory_that_a_running_trainer_gives_back_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_server.training.memory.available", lambda: 1000)
    async with opened(tmp_path) as one:
        with pytest.raises(Refusal) as caught:
            await one.create("plan 3000")
        assert caught.value.reason == "TRAINING_MEMORY"
        first = await one.create("step 1", "hold")
        await one.at(first, 1)  # it holds 2000
        await one.create("plan 3000", name="second")
        with pytest.raises(Refusal):
            await one.create("plan 3001", name="third")


async def test_a_refused_hand_over_fails_the_job(tmp_path: Path) -> None:
    async with opened(tmp_path) as one:
        one.shelf.failures.append(Refusal(Reason.STORE_FULL, "no space is left"))
        done = await one.ended(await one.create("step 3", f"publish {one.made}"))
        assert (done.state, done.error.reason) == (State.FAILED, "STORE_FULL")
        assert one.counts.ended == [("failed", 300)]


async def test_numbers_that_are_not_finite_survive_the_disk(tmp_path: Path) -> None:
    records = Records(tmp_path / "jobs")
    assert records.acquire()
    progress = ProgressRecord(loss=float("nan"), norm=float("inf"), remaining=float("inf"))
    job = JobRecord(id="0" * 12 + "-" + "0" * 8, order=JobOrder(name="n"), progress=progress)
    records.make(job.id)
    records.save(job)
    (found,) = records.load()
    assert (found.progress.loss, found.progress.norm, found.progress.remaining) == (None,) * 3
