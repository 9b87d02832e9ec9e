"""The calls for training jobs, written once for both clients."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias, Unpack

from loraplex import training
from loraplex.connection import ServerConnection
from loraplex.training import JobState, TrainingJob, TrainingOptions
from loraplex.v1 import training_pb2, training_pb2_grpc

_Jobs: TypeAlias = list[TrainingJob]  # "list" is a method below


class JobCalls:
    """All calls for training jobs except `watch`. Every call may raise LoraplexError."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._call = connection.call

    async def create(
        self,
        name: str,
        data: bytes | str | os.PathLike[str] | None = None,
        *,
        server_path: str = "",
        eval_data: bytes | str | os.PathLike[str] | None = None,
        eval_server_path: str = "",
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[TrainingOptions],
    ) -> TrainingJob:
        """Queues the training of an adapter `name`; returns when the server has checked the job.

        The examples are `data`, a local file (JSON lines, JSON, CSV, ...) or its bytes (at most
        3 MiB), or `server_path`, a file below the server's import root; likewise the evaluation
        data. Calls with the same `request_id` create one job. Raises InvalidRequest that names
        every wrong line and option, AdapterConflict, FailedPrecondition
        (TRAINING_MEMORY) or ResourceExhausted.
        """
        request = await self._connection.offload(
            training.create,
            *(name, data, server_path, eval_data, eval_server_path, request_id, options),
        )
        return training.job((await self._call(self._stub.CreateJob, request, timeout)).job)

    async def get(self, job_id: str, *, timeout: float | None = None) -> TrainingJob:
        """Returns one job. Raises JobNotFound."""
        request = training_pb2.GetJobRequest(job_id=job_id)
        return training.job((await self._call(self._stub.GetJob, request, timeout)).job)

    async def list(
        self,
        *,
        states: Sequence[JobState | str] = (),
        page_size: int = 0,
        timeout: float | None = None,
    ) -> _Jobs:
        """Returns the jobs that the server remembers, or those in `states`, the newest first.

        Each page is a call of its own, for which `page_size` (0: the server's choice) and `timeout`
        hold.
        """
        request = training.page(page_size, states)
        pages = await self._connection.pages(self._stub.ListJobs, request, timeout)
        return [training.job(job) for page in pages for job in page.jobs]

    async def cancel(self, job_id: str, *, timeout: float | None = None) -> TrainingJob:
        """Cancels a job; returns when it has ended. A job that had ended already is unchanged."""
        request = training_pb2.CancelJobRequest(job_id=job_id)
        return training.job((await self._call(self._stub.CancelJob, request, timeout)).job)

    @property
    def _stub(self) -> training_pb2_grpc.TrainingServiceAsyncStub:
        return self._connection.stubs.training
