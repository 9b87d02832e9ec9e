"""The key of a client: on every call, in nothing that can be read, replaced without a restart."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from client.fake_server import FakeServer, failure
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from loraplex import (
    AsyncClient,
    Client,
    InvalidRequest,
    LoraplexError,
    QuotaExceeded,
    Unauthenticated,
)
from loraplex.access.keys import ClientKey
from loraplex.uploads import CONFIG_FILE, WEIGHTS_FILE

SECRET = "kQ7" * 14
KEY = f"lpx_abc_{SECRET}"
BEARER = f"Bearer {KEY}"

VARIABLES = ("KEY", "KEY_FILE", "TLS", "CA", "SERVER_NAME", "CERTIFICATE", "PRIVATE_KEY")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"LORAPLEX_{name}", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like an adapter's directory."""
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    (tmp_path / WEIGHTS_FILE).write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(5000))
    return tmp_path


class Refusing(grpc.GenericRpcHandler):
    """A server without services, which notes the metadata of every call and then refuses it."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        self.codes = list(codes)
        self.seen: list[tuple[str, list[Any]]] = []
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[self])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        sent = [value for key, value in details.invocation_metadata if key == "authorization"]
        self.seen.append((details.method.rpartition("/")[2], sent))
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    def _refuse(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        code = self.codes.pop(0) if self.codes else grpc.StatusCode.UNAUTHENTICATED
        # If a stream ends during a write, grpc.aio may report an error of its own: see
        # `loraplex.uploads`. That is no matter of keys, so what is sent is read first.
        for _ in requests:
            pass
        context.abort(code, "refused")
        yield b""

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def refusing() -> Iterator[Refusing]:
    server = Refusing()
    yield server
    server.stop()


async def pieces() -> AsyncIterator[bytes]:
    yield b"{}"


def calls(client: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """Every call of a client, with arguments that it accepts; each is started when taken."""
    given = {
        "folder": folder,
        "messages": [{"role": "user", "content": "x"}],
        "data": b"{}",
        "pieces": pieces(),
        "token_ids": [1],
    }
    for owner in (client, client.training):
        for name, method in inspect.getmembers(owner, inspect.ismethod):
            if name.startswith("_") or name in ("close", "health", "for_caller"):
                continue
            needed = [
                given.get(parameter.name, "x")
                for parameter in inspect.signature(method).parameters.values()
                if parameter.default is inspect.Parameter.empty
                and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            ]
            if name == "create":
                needed.append(given["data"])
            elif name in ("generate", "stream", "validate_adapter"):
                needed.append("x")
            elif name == "embed":
                needed.append(["x"])
            yield name, (method, needed)


def test_every_call_carries_the_key_once_and_is_not_repeated(
    refusing: Refusing, folder: Path
) -> None:
    names = []
    with Client(refusing.target, key=KEY) as client:
        for name, (method, needed) in calls(client, folder):
            refusing.seen.clear()
            with pytest.raises(Unauthenticated) as caught:
                list(method(*needed))  # a stream fails when it is read
            assert [sent for _, sent in refusing.seen] == [[BEARER]], name
            assert "key_file" in str(caught.value)
            names.append(name)
    assert len(names) >= 29, names
    assert {"stream", "watch_adapters", "watch", "upload_adapter", "create"} <= set(names)


async def finished(call: Any) -> None:
    """Waits for a call, or reads its stream."""
    if inspect.isawaitable(call):
        await call
    async for _ in call:
        pass


async def test_every_call_of_the_asyncio_client_does_too(refusing: Refusing, folder: Path) -> None:
    names = []
    async with AsyncClient(refusing.target, key=KEY) as client:
        for name, (method, needed) in calls(client, folder):
            refusing.seen.clear()
            with pytest.raises(Unauthenticated):
                await finished(method(*needed))
            assert [sent for _, sent in refusing.seen] == [[BEARER]], name
            names.append(name)
    assert len(names) >= 29, names


def test_a_health_check_carries_no_key(refusing: Refusing) -> None:
    with Client(refusing.target, key=KEY) as client, pytest.raises(LoraplexError):
        client.health()
    assert refusing.seen == [("Check", [])]


def test_every_attempt_of_a_repeated_call_carries_the_key(refusing: Refusing) -> None:
    refusing.codes = [grpc.StatusCode.UNAVAILABLE] * 2
    with Client(refusing.target, key=KEY) as client:
        for start in (lambda: client.generate("x"), lambda: list(client.stream("x"))):
            refusing.codes = [grpc.StatusCode.UNAVAILABLE] * 2
            refusing.seen.clear()
            with pytest.raises(Unauthenticated):
                start()
            assert [sent for _, sent in refusing.seen] == [[BEARER]] * 3


async def test_every_attempt_of_the_asyncio_client_does_too(refusing: Refusing) -> None:
    refusing.codes = [grpc.StatusCode.UNAVAILABLE] * 2
    async with AsyncClient(refusing.target, key=KEY) as client:
        with pytest.raises(Unauthenticated):
            async for _ in client.stream("x"):
                pass
    assert [sent for _, sent in refusing.seen] == [[BEARER]] * 3


def test_the_pieces_of_a_broken_upload_carry_the_key(
    server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.uploads.CHUNK_BYTES", 1000)
    server.break_uploads = [failure(grpc.StatusCode.UNAVAILABLE, "OVERLOADED")] * 2
    with Client(server.target, key=KEY) as client:
        client.upload_adapter("pirate", folder)
    sent = [(call.method, call.metadata.get("authorization")) for call in server.calls]
    assert [key for _, key in sent] == [BEARER] * len(sent)
    assert sum(method == "UploadAdapter" for method, _ in sent) == 3


def test_what_is_given_beside_the_key_is_sent_too(server: FakeServer) -> None:
    with Client(server.target, key=KEY, metadata=[("x-team", "search")]) as client:
        client.generate("x")
    metadata = server.calls[0].metadata
    assert (metadata["x-team"], metadata["authorization"]) == ("search", BEARER)


def test_an_authorization_in_the_metadata_takes_the_place_of_the_environments_key(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_KEY", "lpx_of_variable")
    own = [("authorization", BEARER)]
    with Client(server.target, metadata=own) as client:
        client.generate("x")
    assert server.calls[0].metadata["authorization"] == BEARER
    with pytest.raises(InvalidRequest, match="twice"):
        Client(server.target, metadata=own, key=KEY)


# quotas


def quota(seconds: float | None):
    detail = error_details_pb2.QuotaFailure()
    detail.violations.add(subject="search", description="60 requests per minute")
    pause = [] if seconds is None else [
        error_details_pb2.RetryInfo(
            retry_delay=duration_pb2.Duration(nanos=round(seconds * 1e9) % 10**9,
                                              seconds=int(seconds))
        )
    ]  # fmt: skip
    return failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", detail, *pause)


def test_a_quota_names_its_pause_and_is_not_waited_for(server: FakeServer) -> None:
    server.failures = [quota(12.5)]
    with Client(server.target, key=KEY) as client, pytest.raises(QuotaExceeded) as caught:
        client.generate("x")
    assert caught.value.retry_after == 12.5
    assert str(caught.value).endswith("try again in 12.5 s")
    assert server.methods() == ["Generate"]


def test_a_quota_that_waiting_does_not_free_says_so(server: FakeServer) -> None:
    server.failures = [quota(None)]
    with Client(server.target) as client, pytest.raises(QuotaExceeded) as caught:
        client.generate("x")
    assert caught.value.retry_after is None
    assert "ask the operator" in str(caught.value)


def test_an_upload_waits_for_a_quota_of_calls(
    server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("loraplex.connection.time.sleep", waits.append)
    server.break_uploads = [quota(12.5)]
    with Client(server.target) as client:
        assert client.upload_adapter("pirate", folder).created
    assert waits == [12.5]


@pytest.mark.parametrize("pause", [None, 3600.0])
def test_an_upload_does_not_wait_for_a_quota_that_does_not_come_back_soon(
    server: FakeServer, folder: Path, pause: float | None
) -> None:
    server.break_uploads = [quota(pause)]
    with Client(server.target) as client, pytest.raises(QuotaExceeded):
        client.upload_adapter("pirate", folder)
    assert server.methods().count("UploadAdapter") == 1
    assert server.uploads == {}, "it is dropped"


def test_an_upload_whose_key_was_revoked_can_be_resumed(server: FakeServer, folder: Path) -> None:
    server.break_uploads = [failure(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")]
    with Client(server.target, key=KEY) as client, pytest.raises(Unauthenticated):
        client.upload_adapter("pirate", folder)
    assert len(server.uploads) == 1
    assert server.methods().count("UploadAdapter") == 1


# secrecy


def test_nothing_that_can_be_shown_has_the_key_in_it(
    refusing: Refusing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = Client(refusing.target, key=KEY, metadata=[("x-other", "value-of-metadata")])
    connection = client._connection
    shown = [repr(each) for each in (client, connection, connection.defaults, connection._access)]
    try:
        client.generate("x")
    except Unauthenticated as error:
        shown += [repr(error), str(error), "".join(traceback.format_exception(error))]
        shown.append(repr(error.__cause__))
    client.close()
    shown.append(caplog.text)
    assert [text for text in shown if SECRET in text] == []
    assert "value-of-metadata" not in repr(connection.defaults)


@pytest.mark.parametrize(
    "wrong",
    [f"Bearer {KEY}", f"{KEY}\r\nx-admin: 1", f"{KEY}\nmore", f"{KEY}\0", f"{KEY}é", " ", "\n",
     "x" * 10_000, f"{KEY}\u2028", f"{KEY}\x7f"],
)  # fmt: skip
def test_what_is_no_key_is_refused_and_not_repeated(wrong: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client(key=wrong)
    assert SECRET not in str(caught.value) + repr(caught.value)
    assert caught.value.violations[0].field == "key"


def test_a_proxy_of_the_environment_does_not_see_the_key(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        proxy.setblocking(False)
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", f"127.0.0.1:{port}")
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        target = server.target.replace("127.0.0.1", "localhost")
        with Client(target, key=KEY) as client:
            assert client.generate("x").text == "base says x"
        with Client(server.target, key=KEY) as client:
            assert client.generate("x").text == "base says x"
        with pytest.raises(BlockingIOError):
            proxy.accept()


# files and variables


def test_a_key_file_that_is_replaced_needs_no_new_client(
    server: FakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    with Client(server.target, key_file=file) as client:
        client.generate("x")
        (tmp_path / "next").write_text("lpx_def_second")
        (tmp_path / "next").replace(file)
        client.generate("x")
        file.write_text("lpx_ghi_thirdd")  # the same size, perhaps the same time
        list(client.stream("x"))
    sent = [call.metadata["authorization"] for call in server.calls]
    assert sent == [BEARER, "Bearer lpx_def_second", "Bearer lpx_ghi_thirdd"]


@pytest.mark.parametrize("state", ["absent", "empty", "spaces", "binary", "two words", "folder",
                                   "fifo", "huge"])  # fmt: skip
def test_a_key_file_that_is_unusable_meanwhile_leaves_the_key_in_use(
    tmp_path: Path, state: str
) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    key = ClientKey.in_file(file)
    spoil(file, state)
    assert key.metadata() == (("authorization", BEARER),)
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_text("lpx_def_new")
    assert key.metadata() == (("authorization", "Bearer lpx_def_new"),)


@pytest.mark.parametrize("state", ["absent", "empty", "spaces", "binary", "two words", "folder",
                                   "huge"])  # fmt: skip
def test_a_key_file_that_is_unusable_at_first_is_refused_by_its_name(
    tmp_path: Path, state: str
) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    spoil(file, state)
    with pytest.raises(InvalidRequest) as caught:
        Client(key_file=file)
    assert caught.value.violations[0].field == "key_file"
    assert SECRET not in str(caught.value)


def spoil(file: Path, state: str) -> None:
    """Makes a key file unusable."""
    file.unlink()
    match state:
        case "empty":
            file.touch()
        case "spaces":
            file.write_text(" \n\t")
        case "binary":
            file.write_bytes(bytes(range(256)))
        case "two words":
            file.write_text(f"{KEY} {KEY}")
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "huge":
            file.write_bytes(b"k" * (1 << 20))


def test_a_key_can_come_through_a_pipe_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(KEY))
    writer.start()
    key = ClientKey.in_file(pipe)
    writer.join()
    assert key.metadata() == key.metadata() == (("authorization", BEARER),)


def test_concurrent_calls_read_whole_keys(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("lpx_0_" + "0" * 40)
    key = ClientKey.in_file(file)
    allowed = {f"Bearer lpx_{i % 10}_" + str(i % 10) * 40 for i in range(10)}
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(key.metadata()[0][1])

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for i in range(300):
        (tmp_path / "next").write_text(f"lpx_{i % 10}_" + str(i % 10) * 40)
        (tmp_path / "next").replace(file)
    done.set()
    for reader in readers:
        reader.join()
    assert seen <= allowed


def test_the_environment_gives_the_key_unless_an_argument_does(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("lpx_of_file")

    def sent(**options: Any) -> str | None:
        server.calls.clear()
        with Client(server.target, **options) as client:
            client.generate("x")
        return server.calls[0].metadata.get("authorization")

    assert sent() is None
    monkeypatch.setenv("LORAPLEX_KEY", "lpx_of_variable")
    assert sent() == "Bearer lpx_of_variable"
    assert sent(key="lpx_of_argument") == "Bearer lpx_of_argument"
    assert sent(key_file=file) == "Bearer lpx_of_file"
    assert sent(key="") is None
    monkeypatch.setenv("LORAPLEX_KEY_FILE", str(file))
    with pytest.raises(InvalidRequest, match="twice"):
        sent()
    assert sent(key="lpx_of_argument") == "Bearer lpx_of_argument"
    monkeypatch.delenv("LORAPLEX_KEY")
    assert sent() == "Bearer lpx_of_file"
    with pytest.raises(InvalidRequest, match="twice"):
        sent(key=KEY, key_file=file)


async def test_the_asyncio_client_reads_the_same_variables(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_KEY", KEY)
    async with AsyncClient(server.target) as client:
        await asyncio.gather(*(client.generate("x") for _ in range(3)))
    assert {call.metadata["authorization"] for call in server.calls} == {BEARER}
