"""The calls for training jobs, written once for both clients."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias, Unpack

from loraplex import training
from loraplex.connection import ServerConnection
from loraplex.jobs import data as data_files
from loraplex.jobs import events as job_events
from loraplex.jobs.data import DataFile
from loraplex.jobs.events import JobEvent
from loraplex.replies import read
from loraplex.requests import fill
from loraplex.training import JobState, TrainingJob, TrainingOptions
from loraplex.v1 import training_pb2, training_pb2_grpc

_Jobs: TypeAlias = list[TrainingJob]  # "list" is a method below
_Events: TypeAlias = list[JobEvent]
_Files: TypeAlias = list[DataFile]

_EVENTS_PAGE = 5000


class JobCalls:
    """All calls for training jobs except those that return streams.

    Every call may raise LoraplexError.
    """

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
        data_id: str = "",
        eval_data_id: str = "",
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[TrainingOptions],
    ) -> TrainingJob:
        """Queues the training of an adapter `name`; returns when the server has checked the job.

        The examples are `data`, a local file (JSON lines, JSON, CSV, ...) or its bytes (at most
        3 MiB), `server_path`, a file below the server's import root, or `data_id`, the id of a file
        that `upload_data` stored; likewise the evaluation data. Calls with the same `request_id`
        create one job. Raises InvalidRequest that names every wrong line and option,
        AdapterConflict, FailedPrecondition (TRAINING_MEMORY) or ResourceExhausted.
        """
        request = await self._connection.offload(
            training.create,
            *(name, data, server_path, eval_data, eval_server_path, request_id, options),
            data_id=data_id,
            eval_data_id=eval_data_id,
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

    async def events(
        self,
        job_id: str,
        *,
        after: int = 0,
        limit: int = 0,
        newest_first: bool = False,
        timeout: float | None = None,
    ) -> _Events:
        """Returns what happened to a job, the oldest first unless `newest_first`.

        `after` is the number of an event after which to go on in that order, 0 for the first.
        `limit` is the largest number of events, 0 for all; each page is a call of its own. Raises
        JobNotFound.
        """
        found: _Events = []
        while True:
            size = min(limit - len(found), _EVENTS_PAGE) if limit else _EVENTS_PAGE
            request = job_events.page(job_id, size, after, newest_first)
            reply = await self._call(self._stub.ListJobEvents, request, timeout)
            found += map(job_events.event, reply.events)
            if not reply.next_page_token or len(found) == limit:
                return found
            after = int(reply.next_page_token)

    async def upload_data(
        self,
        data: bytes | str | os.PathLike[str],
        *,
        filename: str = "",
        labels: Mapping[str, str] | None = None,
        request_id: str = "",
        timeout: float | None = None,
    ) -> DataFile:
        """Stores a file of examples on the server, for `create` to name by its `data_id`.

        `data` is a local file or its bytes. What it holds is checked when a job is created. Calls
        with the same `request_id` and the same bytes store one file. `timeout` None sets no
        deadline. Raises DataConflict, ResourceExhausted or InvalidRequest.
        """
        opened = await self._connection.offload(data_files.opened, data, filename)
        pieces, filename = opened
        head = data_files.start(filename, request_id, labels)
        messages = data_files.messages(head, pieces)
        reply = await self._connection.send(self._stub.UploadData, messages, timeout)
        return read(DataFile, reply.file)

    async def get_data(self, data_id: str, *, timeout: float | None = None) -> DataFile:
        """Returns one uploaded file's description. Raises DataNotFound."""
        request = training_pb2.GetDataRequest(data_id=data_id)
        return read(DataFile, (await self._call(self._stub.GetData, request, timeout)).file)

    async def list_data(self, *, page_size: int = 0, timeout: float | None = None) -> _Files:
        """Returns the uploaded files, the newest first. Each page is a call of its own."""
        request = fill(training_pb2.ListDataRequest, page_size=page_size)
        pages = await self._connection.pages(self._stub.ListData, request, timeout)
        return [read(DataFile, file) for page in pages for file in page.files]

    async def delete_data(self, data_id: str, *, timeout: float | None = None) -> None:
        """Deletes an uploaded file; jobs keep their copy. Raises DataNotFound."""
        request = training_pb2.DeleteDataRequest(data_id=data_id)
        await self._call(self._stub.DeleteData, request, timeout)

    @property
    def _stub(self) -> training_pb2_grpc.TrainingServiceAsyncStub:
        return self._connection.stubs.training
