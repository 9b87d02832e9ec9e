"""No list of a request costs more than its bound: a longer one is refused by its length."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from loraplex.v1 import adapter_pb2, generation_pb2, model_pb2, training_pb2
from loraplex_server.rpc.calls import bounds
from loraplex_server.rpc.calls.bounds import ENTRIES, LENGTHS, TOTALS, beyond_bounds
from rpc.harness import Running, refusal, running

PROTO = Path(__file__).resolve().parents[2] / "proto"
FILES = (generation_pb2, adapter_pb2, training_pb2, model_pb2)
TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)

pytestmark = pytest.mark.fault("event-loop-held")


def requests() -> Iterator[Descriptor]:
    """The requests of all methods."""
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield method.input_type


def received_fields(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """All fields of a message and of the messages in it, each once."""
    if message.full_name in seen or not message.full_name.startswith("loraplex."):
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field
        if field.message_type is not None:
            yield from received_fields(field.message_type, seen)


FIELDS = [f for seen in [set[str]()] for m in requests() for f in received_fields(m, seen)]
LISTS = sorted(f.full_name for f in FIELDS if f.is_repeated)


def test_every_list_and_every_text_has_a_bound() -> None:
    assert sorted(ENTRIES) == LISTS
    assert sorted(LENGTHS) == sorted(f.full_name for f in FIELDS if f.type in TEXTS)


def comments() -> dict[str, str]:
    """The comment of every field of the API, by its full name."""
    found = descriptor_pb2.FileDescriptorSet()
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTO)]
    out = ["--include_source_info", "--descriptor_set_out=/dev/stdout"]
    found.ParseFromString(
        subprocess.run([*protoc, *out, *sources], check=True, stdout=subprocess.PIPE).stdout
    )
    texts = {}
    for file in found.file:
        for place in file.source_code_info.location:
            match list(place.path):
                case [4, message, 2, field]:
                    owner = file.message_type[message]
                    name = f"{file.package}.{owner.name}.{owner.field[field].name}"
                    texts[name] = " ".join(place.leading_comments.split())
    return texts


def test_the_bound_of_every_list_is_in_its_comment() -> None:
    texts = comments()
    for name, most in ENTRIES.items():
        assert f"at most {most}" in texts[name].lower(), (name, texts[name])


@pytest.mark.parametrize("inner", ["parts", "tool_calls"])
def test_lists_in_the_entries_of_a_list_have_a_bound_together(inner: str) -> None:
    def conversation(count: int) -> generation_pb2.ChatMessages:
        full, rest = divmod(count, 64)
        messages = [{inner: [{}] * 64}] * full + [{inner: [{}] * rest}]
        return generation_pb2.ChatMessages(messages=messages)

    (most,) = {totals[inner] for totals in TOTALS.values()}
    assert beyond_bounds(conversation(most)) == []
    (problem,) = beyond_bounds(conversation(most + 1))
    assert problem.field == "messages"
    assert str(most) in problem.message
    assert f"{most} in all messages together" in comments()[f"loraplex.v1.ChatMessage.{inner}"]


class Unread:
    """A list or map that has only a length: reading an entry fails."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"its {name} was used")

    __iter__ = __getitem__ = __contains__ = __getattr__  # type: ignore[assignment]


@pytest.mark.parametrize("name", LISTS)
def test_no_entry_of_a_list_that_is_too_long_is_looked_at(name: str) -> None:
    (field,) = [f for f in FIELDS if f.full_name == name]
    message = GetMessageClass(field.containing_type)()
    fill(getattr(message, field.name), field, ENTRIES[name])
    assert beyond_bounds(message) == []
    fill(getattr(message, field.name), field, ENTRIES[name] + 1)
    assert [problem.field for problem in beyond_bounds(message)] == [field.name]
    check = bounds._checks(field.containing_type)[field.number]
    assert check(Unread(ENTRIES[name] + 1)) == [("", f"must have at most {ENTRIES[name]} entries")]


def fill(values: Any, field: FieldDescriptor, count: int) -> None:
    """Gives a list or a map `count` entries."""
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        of_text = entry.fields_by_name["key"].type in TEXTS
        for i in range(count):
            key = f"{i}" if of_text else i
            value = values[key]  # creates a message
            if entry.fields_by_name["value"].message_type is None:
                values[key] = value
    elif entry is not None:
        for _ in range(count - len(values)):
            values.add()
    else:
        values.extend([("x" if field.type in TEXTS else 1)] * (count - len(values)))


def test_a_long_text_anywhere_is_named() -> None:
    request = generation_pb2.GenerateRequest(
        mix=[{"adapter_id": "a"}, {"adapter_id": "a" * 1000}],
        messages={"messages": [{"role": "x" * 1000}]},
        stop={"strings": ["x" * 65]},
    )
    fields = ["mix[1].adapter_id", "messages.messages[0].role", "stop.strings[0]"]
    assert [problem.field for problem in beyond_bounds(request)] == fields
    labels = {"k" * 1000: "", "k": "v" * 257}
    spec = training_pb2.CreateJobRequest(delivery={"labels": labels})
    found = {problem.field for problem in beyond_bounds(spec)}
    assert found == {"delivery.labels[k]", f"delivery.labels[{'k' * 64}]"}


@pytest_asyncio.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as server:
        yield server


HALF_A_MILLION = 500_000
LONG: list[tuple[str, Message, str]] = [
    (
        "GenerationService/Generate",
        generation_pb2.GenerateRequest(messages={"messages": [{"role": "user"}] * HALF_A_MILLION}),
        "messages.messages",
    ),
    (
        "AdapterService/LabelAdapter",
        adapter_pb2.LabelAdapterRequest(adapter_id="a", remove=["a"] * HALF_A_MILLION),
        "remove",
    ),
    (
        "TrainingService/ListJobs",
        training_pb2.ListJobsRequest(states=[1] * HALF_A_MILLION),
        "states",
    ),
]


@pytest.mark.parametrize(("method", "request_", "field"), LONG, ids=lambda value: str(value)[:30])
async def test_half_a_million_entries_are_refused_by_their_number(
    up: Running, method: str, request_: Message, field: str
) -> None:
    data = request_.SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await up.channel.unary_unary(f"/loraplex.v1.{method}")(data)
    seen = refusal(caught.value)
    assert seen.reason == "FIELD_INVALID"
    (violation,) = seen.detail(error_details_pb2.BadRequest).field_violations
    assert violation.field == field
    assert "at most" in violation.description
