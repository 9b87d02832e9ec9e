"""Files of examples: uploaded once, read back byte for byte, copied into jobs, bounded, private."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from loraplex.v1 import training_pb2 as pb
from loraplex_server.access.principals import PrincipalLimits
from rpc.harness import Refused, refusal, rest, until
from rpc.tenants import Tenant, answer_of, tenant, tenants
from rpc.training_jobs import State, Training, lines, order, settings, training

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHUNK = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trains(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Training]:
    folder = tmp_path_factory.mktemp("server")
    async with training(folder, training_data=4 << 20, training_files=50) as server:
        yield server


def messages(data: bytes, **start: Any) -> Iterator[pb.UploadDataRequest]:
    """The messages that upload a file."""
    yield pb.UploadDataRequest(start=start)
    for at in range(0, len(data), CHUNK):
        yield pb.UploadDataRequest(chunk=data[at : at + CHUNK])


async def upload(stub: Any, data: bytes, **start: Any) -> pb.DataFile:
    return (await stub.UploadData(messages(data, **start))).file


async def content(stub: Any, file: pb.DataFile) -> bytes:
    call = stub.ReadData(pb.ReadDataRequest(data_id=file.data_id))
    return b"".join([message.chunk async for message in call])


async def listed(stub: Any, **fields: Any) -> list[str]:
    return [file.data_id for file in (await stub.ListData(pb.ListDataRequest(**fields))).files]


async def refused(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


def fields(seen: Refused) -> set[str]:
    return {v.field for v in seen.detail(error_details_pb2.BadRequest).field_violations}


def files_of(trains: Training) -> Path:
    return trains.up.folder / "training" / "files"


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 4 << 20])
async def test_a_file_comes_back_byte_for_byte(trains: Training, size: int) -> None:
    data = os.urandom(size)
    file = await upload(trains.stub, data, filename="été 日本.jsonl", labels={"a": "b"})
    assert (file.filename, file.size_bytes) == ("été 日本.jsonl", size)
    assert file.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert dict(file.labels) == {"a": "b"}
    assert await content(trains.stub, file) == data
    request = pb.GetDataRequest(data_id=file.data_id)
    assert (await trains.stub.GetData(request)).file == file
    await trains.stub.DeleteData(pb.DeleteDataRequest(data_id=file.data_id))
    for call in (
        trains.stub.GetData(request),
        trains.stub.DeleteData(pb.DeleteDataRequest(data_id=file.data_id)),
        content(trains.stub, file),
    ):
        assert (await refused(call)).reason == "DATA_NOT_FOUND"


async def test_files_are_for_the_servers_user_only(trains: Training) -> None:
    file = await upload(trains.stub, b"x")
    folder = files_of(trains)
    for path in (folder, folder / file.data_id, *(folder / file.data_id).iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    assert {path.name for path in (folder / file.data_id).iterdir()} == {"data", "file.json"}


async def test_a_job_has_its_own_copy(trains: Training) -> None:
    file = await upload(trains.stub, lines("step 1", "hold"))
    evaluation = await upload(trains.stub, b'{"text": "e"}\n')
    job = await trains.create(
        name="copies",
        data=pb.TrainingData(data_id=file.data_id),
        eval_data=pb.TrainingData(data_id=evaluation.data_id),
    )
    await trains.holding(job, 1)
    await trains.stub.DeleteData(pb.DeleteDataRequest(data_id=file.data_id))
    assert (trains.folder(job) / "data.jsonl").read_bytes() == lines("step 1", "hold")
    assert (trains.folder(job) / "eval.jsonl").read_bytes() == b'{"text": "e"}\n'
    await trains.cancel(job)
    for given in (file.data_id, "0" * 12 + "-" + "0" * 8, "../x", ""):
        request = order(name="copies", data=pb.TrainingData(data_id=given))
        seen = await refused(trains.stub.CreateJob(request))
        assert (seen.reason, fields(seen)) == ("FIELD_INVALID", {"data.data_id"}), given


async def test_a_repeated_upload_stores_one_file(trains: Training) -> None:
    first = await upload(trains.stub, b"same" * 9, request_id="nightly")
    found = await asyncio.gather(
        *(upload(trains.stub, b"same" * 9, request_id="nightly") for _ in range(3))
    )
    assert {each.data_id for each in found} == {first.data_id}
    at_once = await asyncio.gather(
        *(upload(trains.stub, b"other", request_id="at once") for _ in range(4))
    )
    assert len({each.data_id for each in at_once}) == 1
    seen = await refused(upload(trains.stub, b"changed", request_id="nightly"))
    assert (seen.code, seen.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DATA_CONFLICT")
    assert seen.detail(error_details_pb2.ResourceInfo).resource_name == first.data_id
    again = await asyncio.gather(*(upload(trains.stub, b"same" * 9) for _ in range(2)))
    assert len({first.data_id, *(each.data_id for each in again)}) == 3


async def test_what_is_wrong_with_an_upload_is_said_and_leaves_nothing(trains: Training) -> None:
    before = set(os.listdir(files_of(trains)))
    start = pb.UploadDataRequest(start={})
    wrong: dict[str, tuple[list[pb.UploadDataRequest], str]] = {
        "no messages": ([], "start"),
        "no start": ([pb.UploadDataRequest(chunk=b"x")], "start"),
        "no bytes": ([start], "chunk"),
        "an empty chunk": ([start, pb.UploadDataRequest(chunk=b"")], "chunk"),
        "a large chunk": ([start, pb.UploadDataRequest(chunk=b"x" * (CHUNK + 1))], "chunk"),
        "two starts": ([start, start], "chunk"),
        "a name with a line break": ([pb.UploadDataRequest(start={"filename": "a\nb"})],
                                     "start.filename"),
        "a wrong label": ([pb.UploadDataRequest(start={"labels": {"A": "b"}})],
                          "start.labels[A]"),
        "a wrong id": ([pb.UploadDataRequest(start={"request_id": "\n"})], "start.request_id"),
    }  # fmt: skip
    for what, (sent, field) in wrong.items():
        seen = await refused(trains.stub.UploadData(iter(sent)))
        assert (seen.reason, fields(seen)) == ("FIELD_INVALID", {field}), what
    seen = await refused(upload(trains.stub, b"x" * ((4 << 20) + 1)))
    assert (seen.reason, fields(seen)) == ("FIELD_INVALID", {"chunk"})
    assert "training_data" in seen.message
    assert set(os.listdir(files_of(trains))) == before


async def test_of_an_upload_that_breaks_off_nothing_is_kept(trains: Training) -> None:
    before = set(os.listdir(files_of(trains)))
    call = trains.stub.UploadData()
    await call.write(pb.UploadDataRequest(start={"filename": "half"}))
    await call.write(pb.UploadDataRequest(chunk=b"half"))
    await until(lambda: len(os.listdir(files_of(trains))) > len(before))
    call.cancel()
    await until(lambda: set(os.listdir(files_of(trains))) == before)


async def test_files_are_listed_newest_first_page_by_page(trains: Training) -> None:
    made = [(await upload(trains.stub, b"%d" % i)).data_id for i in range(3)]
    assert (await listed(trains.stub))[:3] == made[::-1]
    reply = await trains.stub.ListData(pb.ListDataRequest(page_size=2))
    assert [file.data_id for file in reply.files] == made[:0:-1]
    assert (await listed(trains.stub, page_token=reply.next_page_token))[0] == made[0]
    seen = await refused(listed(trains.stub, page_size=1001, page_token="!"))
    assert fields(seen) == {"page_size", "page_token"}


@pytest.mark.fault("shortage-taken-for-damage")
async def test_a_shortage_of_descriptors_is_no_damage_of_a_file(
    trains: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await upload(trains.stub, b"{}\n")
    path, real = files_of(trains) / file.data_id / "data", os.open

    def fails(name: Any, *args: Any, **options: Any) -> int:
        if name == path:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(name, *args, **options)

    async def read() -> bytes:
        call = trains.stub.ReadData(pb.ReadDataRequest(data_id=file.data_id))
        return b"".join([message.chunk async for message in call])

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        seen = await refused(read())
    assert (seen.code, seen.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
    assert await read() == b"{}\n"
    await trains.stub.DeleteData(pb.DeleteDataRequest(data_id=file.data_id))


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "longer", "gone", "a link"])
async def test_a_damaged_file_is_never_taken_for_whole(trains: Training, damage: str) -> None:
    data = os.urandom(700_000)
    file = await upload(trains.stub, data)
    path = files_of(trains) / file.data_id / "data"
    if damage == "gone":
        path.unlink()
    elif damage == "a link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))
    else:
        change = {"other bytes": data[:-1] + b"\0", "shorter": data[:-9], "longer": data + b"x"}
        path.write_bytes(change[damage])
    call = trains.stub.ReadData(pb.ReadDataRequest(data_id=file.data_id))
    arrived: list[bytes] = []

    async def read() -> None:
        async for message in call:
            arrived.append(message.chunk)

    reasons = {"gone": "DATA_NOT_FOUND"}
    assert (await refused(read())).reason == reasons.get(damage, "DATA_CORRUPT")
    assert sum(map(len, arrived)) < len(data)
    request = order(name="damaged", data=pb.TrainingData(data_id=file.data_id))
    seen = await refused(trains.stub.CreateJob(request))
    assert seen.reason == ("FIELD_INVALID" if damage == "gone" else "DATA_CORRUPT")
    await trains.stub.DeleteData(pb.DeleteDataRequest(data_id=file.data_id))


async def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(
    trains: Training,
) -> None:
    data = os.urandom(4 << 20)
    file = await upload(trains.stub, data)
    call = trains.stub.ReadData(pb.ReadDataRequest(data_id=file.data_id))
    first = await call.read()
    await trains.stub.DeleteData(pb.DeleteDataRequest(data_id=file.data_id))
    pieces = [first, *(await rest(call))]
    assert b"".join(piece.chunk for piece in pieces) == data


async def test_numbers_and_bytes_of_all_files_are_bounded(tmp_path: Path) -> None:
    async with training(tmp_path, training_files=2, training_files_size=100) as trains:
        first = await upload(trains.stub, b"x" * 60, request_id="first")
        seen = await refused(upload(trains.stub, b"x" * 41))
        assert (seen.code, seen.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DATA_FULL")
        assert "training_files_size" in seen.message
        await upload(trains.stub, b"x" * 40)
        seen = await refused(upload(trains.stub, b"x"))
        assert (seen.reason, "(training_files)" in seen.message) == ("DATA_FULL", True)
        same = await upload(trains.stub, b"x" * 60, request_id="first")  # a repetition needs none
        assert same == first
        await trains.stub.DeleteData(pb.DeleteDataRequest(data_id=first.data_id))
        await upload(trains.stub, b"x" * 60)
        assert len(os.listdir(files_of(trains))) == 2


async def test_too_many_uploads_at_once_are_refused(trains: Training) -> None:
    calls = []
    for _ in range(8):
        call = trains.stub.UploadData()
        await call.write(pb.UploadDataRequest(start={}))
        calls.append(call)
    shelf = trains.up.server._training._shelf
    await until(lambda: len(shelf._arriving) == 8)
    assert (await refused(upload(trains.stub, b"x"))).reason == "OVERLOADED"
    for call in calls:
        call.cancel()
    await until(lambda: not shelf._arriving)
    await upload(trains.stub, b"x")


async def test_files_survive_a_restart_and_halves_do_not(tmp_path: Path) -> None:
    async with training(tmp_path) as trains:
        file = await upload(trains.stub, b"kept", request_id="once", labels={"a": "b"})
        gone = await upload(trains.stub, b"gone")
        await trains.stub.DeleteData(pb.DeleteDataRequest(data_id=gone.data_id))
    files = tmp_path / "training" / "files"
    (files / ".arriving-0123").mkdir()
    (files / ".arriving-0123" / "data").write_bytes(b"half")
    (files / ".leaving-0123").mkdir()
    (files / ("f" * 12 + "-" + "0" * 8)).mkdir()  # without a record: damaged, left for the operator
    async with training(tmp_path) as trains:
        request = pb.GetDataRequest(data_id=file.data_id)
        assert (await trains.stub.GetData(request)).file == file
        assert await content(trains.stub, file) == b"kept"
        assert await upload(trains.stub, b"kept", request_id="once") == file
        assert await listed(trains.stub) == [file.data_id]
        assert not list(files.glob(".*"))


# principals


async def tenants_answer(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return answer_of(caught.value).reason


async def test_a_file_exists_for_who_uploaded_it(tmp_path: Path) -> None:
    async with tenants(tmp_path, **settings(tmp_path)) as shop:
        ours = await upload(shop.a.training, b"ours", request_id="nightly")
        theirs = await upload(shop.b.training, b"theirs", request_id="nightly")
        assert ours.data_id != theirs.data_id
        assert await listed(shop.a.training) == [ours.data_id]
        assert await listed(shop.b.training) == [theirs.data_id]
        assert await listed(shop.admin.training) == [theirs.data_id, ours.data_id]
        never = "0" * 12 + "-" + "0" * 8
        seen = []
        for data_id in (ours.data_id, never):
            for call in (
                shop.b.training.GetData(pb.GetDataRequest(data_id=data_id)),
                shop.b.training.DeleteData(pb.DeleteDataRequest(data_id=data_id)),
                content(shop.b.training, pb.DataFile(data_id=data_id)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                seen.append(answer_of(caught.value, data_id))
        assert {each.reason for each in seen} == {"DATA_NOT_FOUND"}
        assert seen[:3] == seen[3:]
        request = order(name="b-made", data=pb.TrainingData(data_id=ours.data_id))
        assert await tenants_answer(shop.b.training.CreateJob(request)) == "FIELD_INVALID"
        assert await content(shop.admin.training, ours) == b"ours"


def limited(name: str, store_bytes: int) -> Any:
    return tenant(name, limits=PrincipalLimits(store_bytes=store_bytes))


async def test_files_count_among_the_bytes_that_a_principal_may_have(tmp_path: Path) -> None:
    async with tenants(tmp_path, limited("a", 5000), **settings(tmp_path)) as shop:
        size = (await shop.a.register("a-one")).size_bytes
        room = 5000 - size
        refused_reason = await tenants_answer(upload(shop.a.training, b"x" * (room + 1)))
        assert refused_reason == "QUOTA_EXCEEDED"
        file = await upload(shop.a.training, b"x" * room)
        assert await tenants_answer(upload(shop.a.training, b"x")) == "QUOTA_EXCEEDED"
        assert await tenants_answer(shop.a.register("a-two", 2)) == "QUOTA_EXCEEDED"
        await upload(shop.b.training, b"x" * 9000)  # who has no limit
        await delete(shop.a, file)
        await shop.a.register("a-two", 2)


async def delete(who: Tenant, file: pb.DataFile) -> None:
    await who.training.DeleteData(pb.DeleteDataRequest(data_id=file.data_id))


async def test_a_job_of_an_uploaded_file_is_its_owners(tmp_path: Path) -> None:
    async with tenants(tmp_path, **settings(tmp_path)) as shop:
        file = await upload(shop.a.training, lines("hold"))
        data = pb.TrainingData(data_id=file.data_id)
        reply = await shop.a.training.CreateJob(order(name="a-made", data=data))
        cancel = pb.CancelJobRequest(job_id=reply.job.job_id)
        done = (await shop.a.training.CancelJob(cancel)).job
        assert done.state == State.TRAINING_JOB_STATE_CANCELLED
