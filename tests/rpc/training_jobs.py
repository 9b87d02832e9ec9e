"""A server whose trainer is a script, and jobs that say what it shall do."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.v1 import training_pb2 as pb
from loraplex.v1 import training_pb2_grpc
from rpc.harness import Running, running, until, write_adapter

SCRIPT = Path(__file__).with_name("fake_trainer.py")
State = pb.TrainingJobState


def lines(*texts: str) -> bytes:
    """Data that makes the trainer do this."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def order(*texts: str, name: str = "made", steps: int = 9, **fields: Any) -> pb.CreateJobRequest:
    """A job whose trainer does this."""
    spec = pb.TrainingSpec(name=name, steps=steps)
    spec.MergeFrom(pb.TrainingSpec(**fields.pop("spec", {})))
    fields.setdefault("data", pb.TrainingData(jsonl=lines(*texts)))
    return pb.CreateJobRequest(spec=spec, **fields)


@dataclass
class Training:
    """A server that trains, and its jobs."""

    up: Running
    stub: Any

    async def create(self, *texts: str, **fields: Any) -> pb.TrainingJob:
        """Queues a job."""
        return (await self.stub.CreateJob(order(*texts, **fields))).job

    async def get(self, job: pb.TrainingJob) -> pb.TrainingJob:
        """The job as it is now."""
        return (await self.stub.GetJob(pb.GetJobRequest(job_id=job.job_id))).job

    async def cancel(self, job: pb.TrainingJob) -> pb.TrainingJob:
        """Ends it."""
        return (await self.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))).job

    def watch(self, job: pb.TrainingJob) -> Any:
        """A call that tells of it."""
        return self.stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))

    async def ended(self, job: pb.TrainingJob) -> pb.TrainingJob:
        """The job, once it has ended."""
        last = job
        async for message in self.watch(job):
            last = message.job
        return last

    async def list(self, **fields: Any) -> pb.ListJobsResponse:
        """A page of jobs."""
        return await self.stub.ListJobs(pb.ListJobsRequest(**fields))

    def folder(self, job: pb.TrainingJob) -> Path:
        """Where the job's files are."""
        return jobs_dir(self.up.folder) / job.job_id

    def release(self, job: pb.TrainingJob) -> None:
        """Lets it go on."""
        (self.folder(job) / "release").touch()

    def calls(self, job: pb.TrainingJob) -> list[list[str]]:
        """How its trainer was called: the command, its pid and its niceness."""
        file = self.folder(job) / "calls"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    async def holding(self, job: pb.TrainingJob, step: int) -> int:
        """Waits until its trainer is at this step; the trainer's pid."""
        queue = self.up.server._training
        assert queue is not None

        def there() -> bool:
            progress = queue.get(job.job_id).progress
            return progress is not None and progress.saved_step == step

        await until(there)
        return int(self.calls(job)[-1][1])

    def adapter(self, seed: int = 1, **config: Any) -> str:
        """An adapter that a trainer can say it made."""
        return str(write_adapter(self.up.folder / f"made-{seed}", seed, **config))


def alive(pid: int) -> bool:
    """Whether there is such a process, and it runs."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def read(*path: object) -> str:
    """A file's text."""
    return Path(*map(str, path)).read_text()


def jobs_dir(folder: Path) -> Path:
    return folder / "training"


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Settings of a server that trains."""
    return {
        "training": True,
        "training_jobs_dir": jobs_dir(folder),
        "trainer": [sys.executable, "-I", "-S", str(SCRIPT)],  # fast
        **more,
    }


@asynccontextmanager
async def training(folder: Path, **more: Any) -> AsyncIterator[Training]:
    """A server that trains, started and in the end closed."""
    async with running(folder, **settings(folder, **more)) as up:
        yield Training(up, training_pb2_grpc.TrainingServiceStub(up.channel))
