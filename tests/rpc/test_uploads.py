"""Uploads: whole, broken, resumed, wrong; nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex import AdapterRejected, AsyncClient, InvalidRequest
from loraplex.uploads import Files, stream
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc
from loraplex_adapters.store.files.uploads import Uploads
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.rpc.calls.peers import peer_address, peer_host
from loraplex_server.rpc.services.uploads import MAX_STREAMS, MAX_STREAMS_PER_PEER
from rpc.harness import Running, ask, expected, refusal, running, until, write_adapter

PROMPT = [20, 21, 22]


async def start(up: Running) -> str:
    return (await up.adapters.StartUpload(pb.StartUploadRequest())).upload_id


async def there(up: Running, upload_id: str) -> tuple[int, int]:
    reply = await up.adapters.GetUpload(pb.GetUploadRequest(upload_id=upload_id))
    return reply.config_bytes, reply.weights_bytes


def pieces(
    files: Files, upload_id: str, size: int = 97, **header: Any
) -> list[pb.UploadAdapterRequest]:
    """The messages of a whole upload in small pieces."""
    head = {
        "upload_id": upload_id,
        "name": "alpha",
        "config_size": len(files.config),
        "weights_size": files.weights_size,
        "expected_digest": files.digest,
        **header,
    }
    messages = [pb.UploadAdapterRequest(header=pb.UploadHeader(**head))]
    weights = files.weights.read_bytes()
    for kind, data in ((pb.ADAPTER_FILE_CONFIG, files.config), (pb.ADAPTER_FILE_WEIGHTS, weights)):
        for offset in range(0, len(data), size):
            chunk = pb.UploadChunk(file=kind, offset=offset, data=data[offset : offset + size])
            messages.append(pb.UploadAdapterRequest(chunk=chunk))
    return messages


async def refused(up: Running, messages: list[pb.UploadAdapterRequest]) -> str:
    # Not with grpc.aio: it loses the status of a stream that ends while it writes.
    def send() -> None:
        with grpc.insecure_channel(str(up.server.address)) as channel:
            adapter_pb2_grpc.AdapterServiceStub(channel).UploadAdapter(iter(messages))

    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(send)
    return refusal(caught.value).reason  # type: ignore[arg-type]


async def test_an_uploaded_adapter_is_what_a_registered_one_is(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        files = Files.read(write_adapter(tmp_path / "mine", 1))
        upload_id = await start(up)
        messages = pieces(files, upload_id, load=True, labels={"team": "search"})
        reply = await up.adapters.UploadAdapter(iter(messages))
        assert reply.created
        assert reply.adapter.digest == files.digest
        assert reply.adapter.state == pb.ADAPTER_STATE_RESIDENT
        assert dict(reply.adapter.labels) == {"team": "search"}
        answer = await up.generation.Generate(ask(new=3, adapter="alpha"))
        assert list(answer.token_ids) == expected(PROMPT, 3, files.digest)
        write_adapter(tmp_path / "import" / "mine", 1)
        same = await up.adapters.RegisterAdapter(
            pb.RegisterAdapterRequest(name="alpha", path="mine")
        )
        assert not same.created
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await there(up, upload_id)
        assert refusal(caught.value).reason == "UPLOAD_NOT_FOUND"


async def test_a_broken_upload_goes_on_where_it_was_even_on_another_server(tmp_path: Path) -> None:
    files = Files.read(write_adapter(tmp_path / "mine", 1))
    async with running(tmp_path) as up:
        upload_id = await start(up)
        messages = pieces(files, upload_id)
        half = len(messages) // 2
        arrived = asyncio.Event()

        async def cut() -> AsyncIterator[pb.UploadAdapterRequest]:
            for message in messages[:half]:
                yield message
            arrived.set()
            await asyncio.Event().wait()

        call = up.adapters.UploadAdapter(cut())
        await arrived.wait()
        sent = sum(len(m.chunk.data) for m in messages[1:half])
        while sum(await there(up, upload_id)) < sent:  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.005)
        call.cancel()
        assert not (await up.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
    async with running(tmp_path) as up:
        config, weights = await there(up, upload_id)
        assert (config, config + weights) == (len(files.config), sent)
        # Sending again what is there is refused, and says so.
        assert await refused(up, messages) == "UPLOAD_OFFSET"
        reply = await up.adapters.UploadAdapter(iter([messages[0], *messages[half:]]))
        assert reply.adapter.digest == files.digest


async def test_files_can_be_staged_judged_and_registered_later(tmp_path: Path) -> None:
    async with running(tmp_path) as up, AsyncClient(str(up.server.address)) as client:
        good = write_adapter(tmp_path / "good", 1)
        upload_id = await client.stage_adapter(good)
        assert await client.list_adapters() == []
        found = await client.validate_adapter(upload_id=upload_id)
        assert found.valid
        assert found.spec is not None
        done = await client.upload_adapter("alpha", good, upload_id=upload_id)
        assert done.adapter.digest == found.spec.digest
        bad = write_adapter(tmp_path / "bad", 1, nonsense=1)
        upload_id = await client.stage_adapter(bad)
        found = await client.validate_adapter(upload_id=upload_id)
        assert [finding.field for finding in found.findings] == ["nonsense"]
        await client.abort_upload(upload_id)
        with pytest.raises(AdapterRejected):
            await client.upload_adapter("beta", bad)
        with pytest.raises(InvalidRequest):
            await client.upload_adapter("beta", tmp_path / "nothing")
        assert [adapter.name for adapter in await client.list_adapters()] == ["alpha"]


async def test_what_is_wrong_with_an_upload_is_typed_and_registers_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        files = Files.read(write_adapter(tmp_path / "mine", 1))
        upload_id = await start(up)
        whole = pieces(files, upload_id)
        header, first = whole[0], whole[1]
        assert await refused(up, []) == "FIELD_INVALID"
        assert await refused(up, [first]) == "FIELD_INVALID"
        assert await refused(up, [header, header]) == "FIELD_INVALID"
        assert await refused(up, [header, pb.UploadAdapterRequest()]) == "FIELD_INVALID"
        assert await refused(up, pieces(files, "0" * 32)) == "UPLOAD_NOT_FOUND"
        assert await refused(up, whole[:-1]) == "UPLOAD_OFFSET"
        assert await there(up, upload_id) != (0, 0)  # and kept
        short = pieces(files, await start(up), weights_size=files.weights_size - 1)
        assert await refused(up, short) == "UPLOAD_OFFSET"
        other = pieces(files, await start(up), expected_digest="sha256:" + "0" * 64)
        assert await refused(up, other) == "ADAPTER_INVALID"
        assert not (await up.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
        # The same bytes are registered once the sender knows what it wants.
        other[0].header.expected_digest = files.digest
        reply = await up.adapters.UploadAdapter(iter(other[:1]))
        assert reply.adapter.digest == files.digest


async def test_bytes_that_are_no_message_end_the_upload_as_malformed(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        call = up.channel.stream_unary("/loraplex.v1.AdapterService/UploadAdapter")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(iter([b"\xff\xff\xff"]))
        assert refusal(caught.value).reason == "REQUEST_MALFORMED"


async def test_a_full_disk_is_told_and_what_was_acknowledged_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as up:
        files = Files.read(write_adapter(tmp_path / "mine", 1))
        upload_id = await start(up)
        messages = pieces(files, upload_id)
        append = Uploads.append

        def full(
            uploads: Uploads, upload_id: str, file: str, offset: int, data: bytes, *owner: Any
        ) -> int:
            if offset >= 970 and file.endswith("safetensors"):
                raise Refusal(Reason.STORE_FULL, "no space is left in the adapter store")
            return append(uploads, upload_id, file, offset, data, *owner)

        monkeypatch.setattr(Uploads, "append", full)
        assert await refused(up, messages) == "STORE_FULL"
        monkeypatch.undo()
        assert await there(up, upload_id) == (len(files.config), 970)
        behind = [m for m in messages[1:] if m.chunk.file == pb.ADAPTER_FILE_WEIGHTS][10:]
        reply = await up.adapters.UploadAdapter(iter([messages[0], *behind]))
        assert reply.adapter.digest == files.digest


async def test_the_client_goes_on_by_itself_when_a_stream_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.uploads.CHUNK_BYTES", 256)
    async with running(tmp_path) as up, AsyncClient(str(up.server.address)) as client:
        folder = write_adapter(tmp_path / "mine", 1)
        append, calls = Uploads.append, []

        def flaky(uploads: Uploads, *arguments: Any) -> int:
            calls.append(arguments)
            if len(calls) in (2, 5):
                raise Refusal(Reason.STORE_UNAVAILABLE, "the disk stumbled")
            return append(uploads, *arguments)

        monkeypatch.setattr(Uploads, "append", flaky)
        seen: list[tuple[int, int]] = []
        done = await client.upload_adapter(
            "alpha", folder, progress=lambda sent, size: seen.append((sent, size))
        )
        assert done.created
        assert done.adapter.digest == Files.read(folder).digest
        assert seen[-1][0] == seen[-1][1] == Files.read(folder).size
        assert len(calls) > 5


async def test_a_draining_server_cuts_an_upload_short_and_keeps_it(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        files = Files.read(write_adapter(tmp_path / "mine", 1))
        upload_id = await start(up)
        begun = asyncio.Event()

        async def slow() -> AsyncIterator[pb.UploadAdapterRequest]:
            parts = stream(files, files.header(upload_id, name="alpha"), PROGRESS_NONE, None)
            yield next(parts)
            yield next(parts)
            begun.set()
            await asyncio.Event().wait()

        call = up.adapters.UploadAdapter(slow())
        await begun.wait()
        while not sum(await there(up, upload_id)):  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.005)
        up.server._gate.close()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert refusal(caught.value).reason == "DRAINING"


PROGRESS_NONE = pb.GetUploadResponse()


@pytest.mark.fault("uploads-blocked")
async def test_one_address_cannot_block_uploads_and_what_it_opened_is_listed_and_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = iter(["ipv4:10.0.0.1:1"] * 40 + ["ipv4:10.0.0.2:1"] * 4)
    monkeypatch.setattr("loraplex_server.rpc.services.adapters.peer_address", lambda _: next(peers))
    async with running(tmp_path) as up:
        calls = [asyncio.ensure_future(start(up)) for _ in range(40)]
        ended = await asyncio.gather(*calls, return_exceptions=True)
        opened = [upload_id for upload_id in ended if isinstance(upload_id, str)]
        refused = [e for e in ended if isinstance(e, grpc.aio.AioRpcError)]
        assert {refusal(error).reason for error in refused} == {"OVERLOADED"}
        assert 0 < len(opened) <= 16
        other = await start(up)
        listed = (await up.adapters.ListUploads(pb.ListUploadsRequest())).uploads
        by_peer = {upload.upload_id: upload.peer for upload in listed}
        assert by_peer.pop(other) == "ipv4:10.0.0.2:1"
        assert by_peer == dict.fromkeys(opened, "ipv4:10.0.0.1:1")
        assert all(u.expire_time.seconds - u.change_time.seconds <= 600 for u in listed)
        for upload_id in opened:
            await up.adapters.AbortUpload(pb.AbortUploadRequest(upload_id=upload_id))
        (left,) = (await up.adapters.ListUploads(pb.ListUploadsRequest())).uploads
        assert left.upload_id == other


@pytest.mark.fault("uploads-blocked")
async def test_silent_streams_of_one_address_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = "ipv4:10.0.0.1:1"
    monkeypatch.setattr("loraplex_server.rpc.services.adapters.peer_address", lambda _: who)
    async with running(tmp_path) as up:

        async def silent() -> AsyncIterator[pb.UploadAdapterRequest]:
            await asyncio.Event().wait()
            yield pb.UploadAdapterRequest()

        calls = [up.adapters.UploadAdapter(silent()) for _ in range(20)]
        ended = [asyncio.ensure_future(call.code()) for call in calls]
        await until(lambda: sum(one.done() for one in ended) == 20 - MAX_STREAMS_PER_PEER)
        assert MAX_STREAMS_PER_PEER < MAX_STREAMS
        who = "ipv4:10.0.0.2:1"
        files = Files.read(write_adapter(tmp_path / "mine", 1))
        reply = await up.adapters.UploadAdapter(iter(pieces(files, await start(up))))
        assert reply.created
        for call in calls:
            call.cancel()


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:53412", "10.0.0.7"),
        ("ipv6:%5B::1%5D:53412", "::/64"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:1", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "fe80::/64"),
        ("ipv6:[::ffff:10.0.0.7]:1", "10.0.0.7"),
        ("unix:/run/loraplex.sock", "local"),
        ("unix:", "local"),
        ("ipv4:nonsense", "unknown"),
        ("", "local"),
    ],
)
def test_a_peer_is_known_by_its_address(peer: str, address: str) -> None:
    assert peer_address(peer) == address


def test_records_have_the_whole_address_of_a_peer() -> None:
    assert peer_host("ipv6:[2001:db8:1:2:3:4:5:6]:1") == "2001:db8:1:2:3:4:5:6"
    assert peer_host("ipv6:[::ffff:10.0.0.7]:1") == "10.0.0.7"
    assert peer_host("ipv4:10.0.0.7:53412") == "10.0.0.7"
    assert peer_host("unix:/run/loraplex.sock") == "local"
