"""`client.training`: training jobs through the blocking client."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypeVar, Unpack

import grpc

from loraplex import channel, training
from loraplex.errors import from_rpc_error
from loraplex.streams import Call
from loraplex.training import JobState, TrainingJob, TrainingOptions
from loraplex.v1 import training_pb2, training_pb2_grpc

Q = TypeVar("Q")
R = TypeVar("R")

_Jobs: TypeAlias = list[TrainingJob]  # "list" is a method below


class JobWatch(Call[training_pb2.WatchJobResponse]):
    """A running watch of a job: iterate it for its states, the last of them final.

    When it ends, the job goes on.
    """

    def __iter__(self) -> Iterator[TrainingJob]:
        return self

    def __next__(self) -> TrainingJob:
        message = self._message()
        if message is None:
            raise StopIteration
        return training.job(message.job)


class Training:
    """The training jobs of a server. Every call may raise LoraplexError.

    A server that does not train raises FailedPrecondition (TRAINING_DISABLED).
    """

    def __init__(self, connection: grpc.Channel, defaults: channel.CallDefaults) -> None:
        self._stub = training_pb2_grpc.TrainingServiceStub(connection)
        self._defaults = defaults

    def create(
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
        """Queue the training of an adapter `name`; returns when the server has checked it.

        `data` is a JSONL file of this machine, or its bytes (3 MiB at most); `server_path` is one
        below the server's import root. The same for what it is evaluated on. The same `request_id`
        is the same job. Raises InvalidRequest with every line and option that is wrong,
        AdapterConflict, FailedPrecondition (TRAINING_MEMORY), ResourceExhausted.
        """
        request = training.create(
            name, data, server_path, eval_data, eval_server_path, request_id, options
        )
        return training.job(self._call(self._stub.CreateJob, request, timeout).job)

    def get(self, job_id: str, *, timeout: float | None = None) -> TrainingJob:
        """One job. Raises JobNotFound."""
        request = training_pb2.GetJobRequest(job_id=job_id)
        return training.job(self._call(self._stub.GetJob, request, timeout).job)

    def list(
        self,
        *,
        states: Sequence[JobState | str] = (),
        page_size: int = 0,
        timeout: float | None = None,
    ) -> _Jobs:
        """All jobs that the server remembers, or those in these states, the newest first.

        `page_size` and `timeout` are for each page's call.
        """
        found: list[TrainingJob] = []
        token = ""
        while True:
            request = training.page(page_size, token, states)
            reply = self._call(self._stub.ListJobs, request, timeout)
            found += map(training.job, reply.jobs)
            token = reply.next_page_token
            if not token:
                return found

    def cancel(self, job_id: str, *, timeout: float | None = None) -> TrainingJob:
        """End a job; returns when it has ended. One that has ended stays as it is."""
        request = training_pb2.CancelJobRequest(job_id=job_id)
        return training.job(self._call(self._stub.CancelJob, request, timeout).job)

    def watch(self, job_id: str, *, timeout: float | None = None) -> JobWatch:
        """The job now and whenever it has changed, until it has ended; None is no deadline.

        A slow reader gets the newest state only. A server that shuts down or is lost raises
        Unavailable; the job goes on when it is there again.
        """
        request = training_pb2.WatchJobRequest(job_id=job_id)
        return JobWatch(self._stub.WatchJob(request, **self._defaults.unbounded(timeout)))

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> R:
        try:
            return method(request, **self._defaults.arguments(timeout))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
