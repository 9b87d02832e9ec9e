"""The blocking client. It is safe to share between threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import grpc

from loraplex import channel, requests
from loraplex.access.options import AccessOptions
from loraplex.calls import Calls
from loraplex.connection import BlockingConnection
from loraplex.jobs.calls import JobCalls
from loraplex.requests import GenerateOptions
from loraplex.streams import DataReading, JobWatch, Stream, Watch
from loraplex.v1 import adapter_pb2, generation_pb2, training_pb2
from loraplex.views import embedding
from loraplex.views.engine import EngineWatch, watch_request

P = ParamSpec("P")
T = TypeVar("T")


def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], T]:
    """Returns a method that runs the coroutine `method` of `self._calls` to its end.

    It has the arguments and the documentation of `method`.
    """

    @functools.wraps(method)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            method(self._calls, *args, **kwargs).send(None)
        except StopIteration as end:
            result: T = end.value
            return result
        raise RuntimeError(f"{method.__qualname__} suspended on a blocking connection")

    return run


class Client:
    """A connection to a server, used as a context manager or closed with `close`.

    `timeout` is the default deadline of a call in seconds (None: no deadline); each call may set
    its own. With `wait_for_ready`, calls wait for a server instead of raising Unavailable after a
    few retries. `metadata` is sent with every call. `training` holds the calls for training jobs.

    `AccessOptions` lists the options of encryption (`tls`, `ca`, ...) and of keys (`key`,
    `key_file`), which are taken from the environment if they are not given. A key is sent only over
    an encrypted connection or to this machine. `credentials`, of any kind that gRPC has, take the
    place of these options. Raises InvalidRequest if an option or one of its files is wrong.
    """

    def __init__(
        self,
        target: str = channel.DEFAULT_TARGET,
        *,
        timeout: float | None = channel.DEFAULT_TIMEOUT,
        wait_for_ready: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        **access: Unpack[AccessOptions],
    ) -> None:
        self._use(
            BlockingConnection(target, timeout, wait_for_ready, credentials, metadata, access)
        )

    def _use(self, connection: BlockingConnection) -> None:
        self._connection = connection
        self._calls = Calls(connection)
        self.training = Training(connection)

    def for_caller(self, key: str, metadata: channel.Metadata = ()) -> Client:
        """Returns a client whose calls carry the key of somebody else, over this connection.

        For programs that stand between callers and a server. `key` is a key or a signed token, ""
        for none; this client's own is not sent. `metadata` is sent in addition to this client's.
        The connection is closed by this client alone. Raises InvalidRequest if a key would leave
        this machine unencrypted.
        """
        other = object.__new__(Client)
        other._use(self._connection.for_caller(key, metadata))
        return other

    generate = blocking(Calls.generate)
    embed = blocking(embedding.embed)
    get_model = blocking(Calls.get_model)
    render_chat = blocking(Calls.render_chat)
    tokenize = blocking(Calls.tokenize)
    detokenize = blocking(Calls.detokenize)
    register_adapter = blocking(Calls.register_adapter)
    get_adapter = blocking(Calls.get_adapter)
    list_adapters = blocking(Calls.list_adapters)
    list_versions = blocking(Calls.list_versions)
    validate_adapter = blocking(Calls.validate_adapter)
    label_adapter = blocking(Calls.label_adapter)
    set_alias = blocking(Calls.set_alias)
    delete_alias = blocking(Calls.delete_alias)
    delete_adapter = blocking(Calls.delete_adapter)
    restore_adapter = blocking(Calls.restore_adapter)
    load_adapter = blocking(Calls.load_adapter)
    unload_adapter = blocking(Calls.unload_adapter)
    pin_adapter = blocking(Calls.pin_adapter)
    unpin_adapter = blocking(Calls.unpin_adapter)
    merge_adapter = blocking(Calls.merge_adapter)
    unmerge_adapter = blocking(Calls.unmerge_adapter)
    upload_adapter = blocking(Calls.upload_adapter)
    stage_adapter = blocking(Calls.stage_adapter)
    start_upload = blocking(Calls.start_upload)
    get_upload = blocking(Calls.get_upload)
    list_uploads = blocking(Calls.list_uploads)
    abort_upload = blocking(Calls.abort_upload)
    health = blocking(Calls.health)

    def stream(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Starts a completion and returns its stream. `GenerateOptions` lists the options."""
        request = generation_pb2.GenerateStreamRequest(request=requests.generate(prompt, **options))
        arguments = self._connection.defaults.arguments(timeout)
        call = self._connection.stubs.generation.GenerateStream(request, **arguments)
        return Stream(call, request.request.n)

    def watch_adapters(self, *, timeout: float | None = None) -> Watch:
        """Watches the table of adapters. `timeout` None means no deadline.

        Iterating yields an AdapterTable, then an AdapterEvent for each change. If the reader is too
        slow for the changes, another table follows, with `resync` set. The watch ends when it is
        cancelled. A server that shuts down or is lost raises Unavailable.
        """
        request = adapter_pb2.WatchAdaptersRequest()
        arguments = self._connection.defaults.unbounded(timeout)
        return Watch(self._connection.stubs.adapters.WatchAdapters(request, **arguments))

    def watch_engine(
        self, interval: float | None = None, *, timeout: float | None = None
    ) -> EngineWatch:
        """Watches the batch of the engine. `timeout` None means no deadline.

        Iterating yields an EngineState every `interval` seconds, 0.1 to 60 (None: 0.25). A slow
        reader gets only the newest state. The watch goes on while the engine is restarted, and ends
        when it is cancelled. A server that shuts down or is lost raises Unavailable.
        """
        arguments = self._connection.defaults.unbounded(timeout)
        method = self._connection.stubs.engine.WatchEngine
        return EngineWatch(method(watch_request(interval), **arguments))

    def close(self) -> None:
        """Closes the connection; running calls are cancelled."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Training:
    """The training jobs of a server. Every call may raise LoraplexError.

    A server that does not train raises FailedPrecondition (TRAINING_DISABLED).
    """

    def __init__(self, connection: BlockingConnection) -> None:
        self._connection = connection
        self._calls = JobCalls(connection)

    create = blocking(JobCalls.create)
    get = blocking(JobCalls.get)
    list = blocking(JobCalls.list)
    cancel = blocking(JobCalls.cancel)
    events = blocking(JobCalls.events)
    upload_data = blocking(JobCalls.upload_data)
    get_data = blocking(JobCalls.get_data)
    list_data = blocking(JobCalls.list_data)
    delete_data = blocking(JobCalls.delete_data)

    def watch(self, job_id: str, *, timeout: float | None = None) -> JobWatch:
        """Watches a job until it ends. `timeout` None means no deadline.

        Iterating yields the job as it is, then after each change. A slow reader gets only the
        newest state. A server that shuts down or is lost raises Unavailable; the job continues when
        the server is back.
        """
        request = training_pb2.WatchJobRequest(job_id=job_id)
        arguments = self._connection.defaults.unbounded(timeout)
        return JobWatch(self._connection.stubs.training.WatchJob(request, **arguments))

    def read_data(self, data_id: str, *, timeout: float | None = None) -> DataReading:
        """Reads an uploaded file. Iterating yields its bytes in pieces.

        `timeout` None means no deadline. Raises DataNotFound, and ServerFault (DATA_CORRUPT) before
        the last piece of a file that was damaged.
        """
        request = training_pb2.ReadDataRequest(data_id=data_id)
        arguments = self._connection.defaults.unbounded(timeout)
        return DataReading(self._connection.stubs.training.ReadData(request, **arguments))
