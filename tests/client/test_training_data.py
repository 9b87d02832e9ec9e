"""Files of examples and the events of jobs, through both clients and the command line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from client.fake_server import failure
from google.protobuf.timestamp_pb2 import Timestamp
from loraplex import (
    AsyncClient,
    Client,
    DataConflict,
    DataNotFound,
    InvalidRequest,
    JobState,
    ServerFault,
)
from loraplex.cli import app
from loraplex.v1 import training_pb2 as pb
from loraplex.v1 import training_pb2_grpc
from typer.testing import CliRunner, Result

TIME = Timestamp(seconds=1_700_000_000)
EVENTS = [
    pb.JobEvent(number=1, time=TIME, state="TRAINING_JOB_STATE_QUEUED"),
    pb.JobEvent(number=2, time=TIME, progress={"step": 1, "steps": 9, "loss": 0.5}),
    pb.JobEvent(number=3, time=TIME, evaluation={"step": 1, "loss": 0.25, "perplexity": 2.0}),
    pb.JobEvent(
        number=5, time=TIME, checkpoint={"step": 1, "adapter_id": "a-step-1@1", "digest": "d"}
    ),
    pb.JobEvent(number=6, time=TIME, message="a \x1b[2J warning"),
    pb.JobEvent(
        number=7,
        time=TIME,
        samples={"step": 0, "samples": [{"prompt": "p", "answer": "a", "expected": "e"}]},
    ),
]


@dataclass
class FakeShelf(training_pb2_grpc.TrainingServiceServicer):
    """Keeps files, and fails as told."""

    files: dict[str, bytes] = field(default_factory=dict)
    starts: list[pb.UploadDataStart] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    refuse: Any = None
    broken: bool = False
    target: str = ""

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        training_pb2_grpc.add_TrainingServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def describe(self, data_id: str) -> pb.DataFile:
        size = len(self.files[data_id])
        return pb.DataFile(data_id=data_id, filename="f", size_bytes=size, create_time=TIME)

    def find(self, data_id, context) -> None:
        if data_id not in self.files:
            failure(grpc.StatusCode.NOT_FOUND, "DATA_NOT_FOUND").abort(context)

    def UploadData(self, requests, context):
        self.starts.append(next(requests).start)
        chunks = [request.chunk for request in requests]
        if self.refuse is not None:
            self.refuse.abort(context)
        self.sizes = [len(chunk) for chunk in chunks]
        data_id = str(len(self.files))
        self.files[data_id] = b"".join(chunks)
        return pb.UploadDataResponse(file=self.describe(data_id))

    def GetData(self, request, context):
        self.find(request.data_id, context)
        return pb.GetDataResponse(file=self.describe(request.data_id))

    def ListData(self, request, context):
        ids = sorted((i for i in self.files if not request.page_token or i < request.page_token),
                     reverse=True)  # fmt: skip
        page = [self.describe(data_id) for data_id in ids[:1]]
        return pb.ListDataResponse(files=page, next_page_token=ids[0] if ids[1:] else "")

    def ReadData(self, request, context):
        self.find(request.data_id, context)
        for at in range(0, len(self.files[request.data_id]), 1000):
            yield pb.ReadDataResponse(chunk=self.files[request.data_id][at : at + 1000])
            if self.broken:
                failure(grpc.StatusCode.DATA_LOSS, "DATA_CORRUPT").abort(context)

    def DeleteData(self, request, context):
        self.find(request.data_id, context)
        del self.files[request.data_id]
        return pb.DeleteDataResponse()

    def ListJobEvents(self, request, context):
        self.requests.append(request)
        found = EVENTS[::-1] if request.newest_first else EVENTS
        after = int(request.page_token or 0)
        if after:
            found = [e for e in found if (e.number > after) != request.newest_first
                     and e.number != after]  # fmt: skip
        page = found[: min(request.page_size, 4)]
        more = len(page) < len(found)
        return pb.ListJobEventsResponse(
            events=page, next_page_token=str(page[-1].number) if more else ""
        )


@pytest.fixture
def shelf() -> Iterator[FakeShelf]:
    fake = FakeShelf()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def run(shelf: FakeShelf):
    runner = CliRunner(env={"LORAPLEX_SERVER": shelf.target})

    def invoke(*arguments: str) -> Result:
        return runner.invoke(app, ("train", *arguments), catch_exceptions=False)

    return invoke


@pytest.mark.parametrize("size", [0, 1, (1 << 18) + 1, 3_000_000])
async def test_bytes_and_files_arrive_whole_from_both_clients(
    shelf: FakeShelf, tmp_path: Path, size: int
) -> None:
    data = bytes(i % 251 for i in range(size))
    file = tmp_path / "set.jsonl"
    file.write_bytes(data)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, size, 1_000_000):
            yield data[at : at + 1_000_000]

    with Client(shelf.target) as client:
        made = client.training.upload_data(file, labels={"a": "b"}, request_id="r")
        assert b"".join(client.training.read_data(made.data_id)) == data
        client.training.upload_data(data, filename="named")
    async with AsyncClient(shelf.target) as client:
        await client.training.upload_data(file)
        made = await client.training.forward_data(pieces(), filename="passed on")
        assert b"".join([piece async for piece in client.training.read_data(made.data_id)]) == data
        assert made.size_bytes == size
    assert set(shelf.files.values()) == {data}
    assert len(shelf.files) == 4
    assert max([0, *shelf.sizes]) <= 1 << 20
    assert [start.filename for start in shelf.starts] == [
        "set.jsonl", "named", "set.jsonl", "passed on"
    ]  # fmt: skip
    assert (shelf.starts[0].request_id, dict(shelf.starts[0].labels)) == ("r", {"a": "b"})
    assert len({start.request_id for start in shelf.starts}) == 4  # for repetitions


async def test_files_are_described_listed_and_deleted(shelf: FakeShelf) -> None:
    shelf.files = {"0": b"a", "1": b"bb"}
    with Client(shelf.target) as client:
        assert [file.data_id for file in client.training.list_data()] == ["1", "0"]
        assert client.training.get_data("1").size_bytes == 2
        client.training.delete_data("1")
        for call in (
            lambda: client.training.get_data("1"),
            lambda: client.training.delete_data("1"),
            lambda: list(client.training.read_data("1")),
        ):
            with pytest.raises(DataNotFound):
                call()
        with pytest.raises(InvalidRequest):
            client.training.upload_data("/no/such/file")


async def test_what_the_server_refuses_is_raised_and_so_is_what_the_source_raises(
    shelf: FakeShelf,
) -> None:
    shelf.refuse = failure(grpc.StatusCode.ALREADY_EXISTS, "DATA_CONFLICT")

    async def breaking() -> AsyncIterator[bytes]:
        yield b"some"
        raise KeyError("gone")

    async def sound() -> AsyncIterator[bytes]:
        yield b"some"

    with Client(shelf.target) as client, pytest.raises(DataConflict):
        client.training.upload_data(b"x")
    async with AsyncClient(shelf.target) as client:
        with pytest.raises(DataConflict):
            await client.training.forward_data(sound())
        with pytest.raises(KeyError, match="gone"):
            await client.training.forward_data(breaking())
    assert not shelf.files


async def test_a_damaged_file_raises_before_its_end(shelf: FakeShelf) -> None:
    shelf.files, shelf.broken = {"0": b"x" * 5000}, True
    with Client(shelf.target) as client, pytest.raises(ServerFault) as caught:
        list(client.training.read_data("0"))
    assert caught.value.reason == "DATA_CORRUPT"


async def test_events_are_read_in_pages_in_either_direction(shelf: FakeShelf) -> None:
    with Client(shelf.target) as client:
        every = client.training.events("j")
        assert [event.number for event in every] == [1, 2, 3, 5, 6, 7]
        assert every[0].state is JobState.QUEUED
        assert (every[1].progress.loss, every[1].state) == (0.5, None)
        assert (every[2].evaluation.loss, every[3].checkpoint.adapter_id) == (0.25, "a-step-1@1")
        assert every[4].message == "a \x1b[2J warning"
        assert every[5].samples.samples[0].expected == "e"
        assert [e.number for e in client.training.events("j", limit=5)] == [1, 2, 3, 5, 6]
        last = client.training.events("j", limit=2, newest_first=True, after=6)
        assert [event.number for event in last] == [5, 3]
    async with AsyncClient(shelf.target) as client:
        assert await client.training.events("j", newest_first=True) == every[::-1]


def test_the_command_line_stores_lists_reads_and_deletes(run, shelf: FakeShelf, tmp_path: Path):
    file = tmp_path / "set.jsonl"
    file.write_bytes(b"\xff\0 bytes\n")
    assert run("data", "upload", str(file), "--label", "a=b").stdout == "0\n"
    assert run("data", "list").stdout.splitlines()[1].split("\t")[:3] == ["0", "f", "9"]
    assert json.loads(run("data", "get", "0", "--json").stdout)["size_bytes"] == 9
    assert run("data", "read", "0").stdout_bytes == b"\xff\0 bytes\n"
    assert run("data", "delete", "0").stdout == "0 deleted\n"
    assert run("data", "get", "0").exit_code == 3


def test_the_command_line_shows_events(run, shelf: FakeShelf):
    lines = run("events", "j").stdout.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "queued",
        "step 1 loss 0.5000",
        "evaluation at step 1: loss 0.2500",
        "registered a-step-1@1",
        "a \N{REPLACEMENT CHARACTER}[2J warning",
        "answers at step 0: 'a'",
    ]
    assert run("events", "j", "--limit", "2").stdout.splitlines() == lines[-2:]
    assert len(json.loads(run("events", "j", "--json").stdout)) == 6
