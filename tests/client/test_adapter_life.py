"""Uploads, watches and the rest of an adapter's life, through both clients."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import grpc
import pytest
from client.fake_server import Failure, FakeServer, failure
from google.protobuf import duration_pb2, timestamp_pb2
from loraplex import (
    AdapterConflict,
    AdapterEvent,
    AdapterEventKind,
    AdapterInfo,
    AdapterRejected,
    AdapterTable,
    AdapterTier,
    AsyncClient,
    Client,
    InvalidRequest,
    ServerFault,
    Unavailable,
    UploadNotFound,
    UploadProgress,
)
from loraplex.errors import ErrorDetails
from loraplex.replies import read
from loraplex.uploads import CONFIG_FILE, WEIGHTS_FILE, Attempts, Files
from loraplex.v1 import adapter_pb2 as pb

CONFIG = b'{"r": 8}'
WEIGHTS = bytes(range(256)) * 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("loraplex.uploads.CHUNK_BYTES", 1000)
    (tmp_path / CONFIG_FILE).write_bytes(CONFIG)
    (tmp_path / WEIGHTS_FILE).write_bytes(WEIGHTS)
    return tmp_path


def test_both_clients_have_the_same_calls_with_the_same_arguments():
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        if name.startswith("_"):
            continue
        twin = getattr(AsyncClient, name)
        assert inspect.signature(twin).parameters == inspect.signature(method).parameters, name


# uploads


def test_an_upload_arrives_byte_for_byte(client: Client, server: FakeServer, folder: Path):
    seen: list[tuple[int, int]] = []
    done = client.upload_adapter(
        "alpha",
        folder,
        replace=True,
        load=True,
        labels={"team": "search"},
        progress=lambda sent, size: seen.append((sent, size)),
    )
    assert done.created
    assert server.received["alpha"] == (CONFIG, WEIGHTS)
    header = next(c.request for c in server.calls if c.method == "UploadAdapter")
    assert (header.replace, header.load, dict(header.labels)) == (True, True, {"team": "search"})
    assert header.expected_digest == Files.read(folder).digest
    total = len(CONFIG) + len(WEIGHTS)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_a_broken_upload_goes_on_from_what_arrived(
    client: Client, server: FakeServer, folder: Path
):
    server.break_uploads = [Failure(grpc.StatusCode.UNAVAILABLE)] * 2
    client.upload_adapter("alpha", folder)
    assert server.received["alpha"] == (CONFIG, WEIGHTS)
    assert server.methods().count("UploadAdapter") == 3
    assert server.methods().count("StartUpload") == 1


def test_an_upload_that_another_process_began_is_finished(
    client: Client, server: FakeServer, folder: Path
):
    upload_id = client.start_upload()
    server.uploads[upload_id][2] += WEIGHTS[:1234]
    assert client.get_upload(upload_id).weights_bytes == 1234
    client.upload_adapter("alpha", folder, upload_id=upload_id)
    assert server.received["alpha"] == (CONFIG, WEIGHTS)


@pytest.mark.fault("uploads-blocked")
def test_unfinished_uploads_are_listed(client: Client, server: FakeServer):
    assert client.list_uploads() == []
    upload_id = client.start_upload()
    server.uploads[upload_id][2] += b"12345"
    (upload,) = client.list_uploads()
    assert (upload.upload_id, upload.weights_bytes, upload.peer) == (upload_id, 5, "10.0.0.7")
    assert (upload.expire_time - upload.change_time).days == 1


def test_a_lost_reply_is_no_lost_upload(client: Client, server: FakeServer, folder: Path):
    server.lose_reply = True
    done = client.upload_adapter("alpha", folder)
    assert done.adapter.digest == Files.read(folder).digest


def test_what_is_refused_is_not_tried_again_and_leaves_nothing_open(
    client: Client, server: FakeServer, folder: Path
):
    server.break_uploads = [failure(grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_CONFLICT")]
    with pytest.raises(AdapterConflict):
        client.upload_adapter("alpha", folder)
    assert server.methods().count("UploadAdapter") == 1
    assert server.uploads == {}
    # One that the caller opened is the caller's to drop.
    server.break_uploads = [failure(grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_CONFLICT")]
    upload_id = client.start_upload()
    with pytest.raises(AdapterConflict):
        client.upload_adapter("alpha", folder, upload_id=upload_id)
    assert list(server.uploads) == [upload_id]
    client.abort_upload(upload_id)
    with pytest.raises(UploadNotFound):
        client.get_upload(upload_id)


def test_a_server_that_takes_nothing_is_given_up(
    client: Client, server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("loraplex.uploads._LONGEST_PAUSE", 0.001)
    upload_id = client.start_upload()
    server.failures = [Failure(grpc.StatusCode.UNAVAILABLE)] * 1000
    with pytest.raises(Unavailable):
        client.upload_adapter("alpha", folder, upload_id=upload_id)


def test_files_that_are_not_there_send_nothing(client: Client, server: FakeServer, tmp_path: Path):
    with pytest.raises(InvalidRequest) as caught:
        client.upload_adapter("alpha", tmp_path)
    assert caught.value.violations[0].field == "folder"
    assert server.calls == []


FOREIGN = {
    "one deeper": (
        {"support/adapter_config.json": b"{}"},
        "ADAPTER_INVALID",
        "adapter in support/",
    ),
    "mlx": ({"adapters.safetensors": b"x"}, "ADAPTER_UNSUPPORTED", "MLX"),
    "pointer": (
        {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
        },
        "ADAPTER_INVALID",
        "git lfs pull",
    ),
}


@pytest.mark.parametrize(("files", "reason", "word"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_adapter_is_said_before_anything_is_sent(
    client: Client,
    server: FakeServer,
    tmp_path: Path,
    files: dict[str, bytes],
    reason: str,
    word: str,
):
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(AdapterRejected) as caught:
        client.upload_adapter("alpha", tmp_path)
    assert caught.value.reason == reason
    assert word in caught.value.message
    with pytest.raises(InvalidRequest, match="is a file"):
        client.upload_adapter("alpha", tmp_path / next(iter(files)))
    assert server.calls == []


async def test_the_asyncio_client_uploads_likewise(server: FakeServer, folder: Path):
    server.break_uploads = [Failure(grpc.StatusCode.UNAVAILABLE)]
    async with AsyncClient(server.target) as client:
        done = await client.upload_adapter("alpha", folder)
        assert done.created
        assert server.received["alpha"] == (CONFIG, WEIGHTS)
        upload_id = await client.stage_adapter(folder)
        assert (await client.get_upload(upload_id)).weights_bytes == len(WEIGHTS)
        await client.abort_upload(upload_id)


# watches


def news() -> list[pb.WatchAdaptersResponse]:
    part = pb.WatchAdaptersResponse
    alias = pb.AdapterAlias(alias="live", name="a", version=3)
    changed = pb.AdapterChange(
        type=pb.ADAPTER_CHANGE_TYPE_ALIAS_SET, adapter=pb.Adapter(name="a"), alias="live"
    )
    return [
        part(table=pb.AdapterTable(adapters=[pb.Adapter(name="a")])),
        part(table=pb.AdapterTable(adapters=[pb.Adapter(name="b")])),
        part(table=pb.AdapterTable(complete=True, aliases=[alias])),
        part(change=changed),
        part(resync=pb.AdapterResync()),
        part(table=pb.AdapterTable(adapters=[pb.Adapter(name="c")], complete=True)),
        part(change=pb.AdapterChange(type=999)),  # of a newer server
    ]


def check(found: list[AdapterTable | AdapterEvent]) -> None:
    table, event, again, unknown = found
    assert isinstance(table, AdapterTable)
    assert [adapter.name for adapter in table.adapters] == ["a", "b"]
    assert (table.aliases, table.resync) == ({"live": "a@3"}, False)
    assert isinstance(event, AdapterEvent)
    assert (event.kind, event.alias) == (AdapterEventKind.ALIAS_SET, "live")
    assert isinstance(again, AdapterTable)
    assert ([adapter.name for adapter in again.adapters], again.resync) == (["c"], True)
    assert isinstance(unknown, AdapterEvent)
    assert unknown.kind is AdapterEventKind.UNSPECIFIED


def test_a_watch_is_tables_and_events(client: Client, server: FakeServer):
    server.news = news()
    with client.watch_adapters() as watch:
        check(list(watch))


async def test_the_asyncio_watch_is_too(server: FakeServer):
    server.news = news()
    async with AsyncClient(server.target) as client, client.watch_adapters() as watch:
        check([item async for item in watch])


def test_a_cancelled_watch_ends_quietly(client: Client, server: FakeServer):
    server.news, server.hold_after = news(), 0
    watch = client.watch_adapters()
    next(watch)
    watch.cancel()
    assert all(isinstance(item, AdapterTable | AdapterEvent) for item in watch)
    assert server.ended.wait(30)


async def test_a_cancelled_reader_of_a_watch_is_cancelled(server: FakeServer):
    server.hold_after = 0
    async with AsyncClient(server.target) as client:
        watch = client.watch_adapters()
        reader = asyncio.create_task(anext(watch))
        while not server.holding.is_set():  # noqa: ASYNC110  (set in a thread)
            await asyncio.sleep(0.005)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader


def test_every_kind_of_event_has_a_name():
    known = set(pb.AdapterChangeType.keys())
    assert {f"ADAPTER_CHANGE_TYPE_{kind.name}" for kind in AdapterEventKind} == known


# one adapter


def test_an_adapter_is_read_whole():
    message = pb.Adapter(
        name="a",
        tier=pb.ADAPTER_TIER_HOST,
        host_bytes=1,
        merged_bytes=2,
        pinned=True,
        last_use_time=timestamp_pb2.Timestamp(seconds=1_700_000_000),
        load_duration=duration_pb2.Duration(seconds=1, nanos=500_000_000),
        aliases=["live"],
        labels={"k": "v"},
        provenance={"trainer": "x"},
        virtual_tokens=7,
    )
    found = read(AdapterInfo, message)
    assert (found.tier, found.host_bytes, found.merged_bytes) == (AdapterTier.HOST, 1, 2)
    assert found.pinned
    assert found.last_use_time is not None
    assert found.last_use_time.timestamp() == 1_700_000_000
    assert found.load_seconds == 1.5
    assert found.aliases == ("live",)
    assert (found.labels, found.provenance) == ({"k": "v"}, {"trainer": "x"})
    assert found.virtual_tokens == 7
    bare = read(AdapterInfo, pb.Adapter())
    assert (bare.last_use_time, bare.load_seconds) == (None, None)


def test_the_calls_send_what_they_are_given(client: Client, server: FakeServer):
    client.register_adapter("a", "x", labels={"k": "v"})
    assert dict(server.calls[-1].request.labels) == {"k": "v"}
    client.list_adapters(labels={"k": "v"})
    assert dict(server.calls[-1].request.labels) == {"k": "v"}
    client.unload_adapter("a", drain=1.5)
    assert server.calls[-1].request.drain.ToMilliseconds() == 1500
    client.unload_adapter("a")
    assert not server.calls[-1].request.HasField("drain")
    client.set_alias("live", "a")
    assert not server.calls[-1].request.HasField("expected")
    client.set_alias("live", "a", expected="")
    assert server.calls[-1].request.HasField("expected")
    assert client.label_adapter("a", {"x": "y"}, remove=["k"]).labels == {"x": "y"}
    assert client.pin_adapter("a").pinned
    assert not client.unpin_adapter("a").pinned
    assert client.merge_adapter("a").merged_bytes == 5
    assert client.unmerge_adapter("a").merged_bytes == 0
    assert [v.version for v in client.list_versions("a")] == [1]
    client.delete_alias("live")
    client.restore_adapter("a")
    with pytest.raises(InvalidRequest):
        client.validate_adapter()
    with pytest.raises(InvalidRequest):
        client.unload_adapter("a", drain=float("nan"))


def test_a_judgement_is_read_whole(client: Client, server: FakeServer):
    finding = pb.AdapterFinding(reason="ADAPTER_UNSUPPORTED", field="r", message="too much")
    server.judgement = pb.ValidateAdapterResponse(findings=[finding])
    found = client.validate_adapter("x")
    assert not found.valid
    assert [(f.reason, f.field, f.message) for f in found.findings] == [
        ("ADAPTER_UNSUPPORTED", "r", "too much")
    ]
    spec = pb.AdapterSpec(digest="d", rank=3, device_bytes=9, provenance={"k": "v"})
    server.judgement = pb.ValidateAdapterResponse(spec=spec)
    found = client.validate_adapter(upload_id="u")
    assert found.spec is not None
    assert (found.spec.rank, found.spec.device_bytes) == (3, 9)
    assert found.spec.provenance == {"k": "v"}


def test_a_status_that_grpc_lost_is_asked_for_again():
    def fault(message: str) -> ServerFault:
        return ServerFault(ErrorDetails(grpc.StatusCode.INTERNAL, message))

    attempts = Attempts()
    assert attempts.pause(fault("Internal error from Core"), UploadProgress(1, 0)) is not None
    assert attempts.pause(fault("internal error"), UploadProgress(2, 0)) is None
