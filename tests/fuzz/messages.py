"""Messages for every method of the server: random bytes, odd values, and valid ones made wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from loraplex.v1 import adapter_pb2, generation_pb2, model_pb2, training_pb2

FILES = (generation_pb2, adapter_pb2, training_pb2, model_pb2, health_pb2, reflection_pb2)

WORDS = (
    *("", "a", "fuzzed", "fuzzed@1", "fuzzed@999999999", "kept@0", "@", "@@", "a@sha256:"),
    *("fuzzed@sha256:" + "0" * 64, "sha256:" + "f" * 64, "..", "../../etc/passwd", "/etc", "."),
    *("fuzzed-0", "fuzzed-0/..", "\0", "a\0b", "\r\nx: y", "\u202e", "\U0001f600" * 40, "é" * 64),
    *("adapter_config.json", "adapter_model.safetensors", "{}", "[" * 5000, "%s%n", "{{ x }}"),
    *("user", "system", "assistant", "A" * 70, "A" * 20_000, "lora", "all-linear", "0" * 32),
    *("tool", "developer", '{"a": [1]}'),
)
GOOD = ("fuzzed", "fuzzed", "fuzzed-0", "a", "hello", "user", "lora", "adapter_config.json")
NUMBERS = (0, 1, -1, 2, 3, 5, 21, 399, 400, 1000, 2**15, 2**31 - 1, -(2**31), 2**32 - 1, 2**53 + 1)
NUMBERS += (2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-45, 1e38, -1e38, 1e308)
FLOATS += (math.inf, -math.inf, math.nan)
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (31, True),
    FieldDescriptor.CPPTYPE_INT64: (63, True),
    FieldDescriptor.CPPTYPE_UINT32: (32, False),
    FieldDescriptor.CPPTYPE_UINT64: (64, False),
}
DEEPEST = 6


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the server: its path, the type it takes, and whether it takes or sends many."""

    path: str
    takes: Descriptor
    takes_many: bool
    sends_many: bool


def methods() -> list[Method]:
    """Every method that the server offers."""
    found = []
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            for one in service.methods:
                found.append(
                    Method(
                        f"/{service.full_name}/{one.name}",
                        one.input_type,
                        one.client_streaming,
                        one.server_streaming,
                    )
                )
    return found


def odd(descriptor: Descriptor, chance: random.Random, depth: int = 0) -> Message:
    """A message whose fields have unusual values, or none; most of them are readable."""
    message: Message = message_factory.GetMessageClass(descriptor)()
    missing = chance.choice((0.3, 0.6, 0.9))  # messages with few fields are valid more often
    for field in descriptor.fields:
        if chance.random() < missing:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(getattr(message, field.name), field.message_type, chance)
        elif field.is_repeated:
            count = chance.choice((0, 1, 2, 3, 40, 300))
            values = getattr(message, field.name)
            if field.message_type is None:
                values.extend(_value(field, chance) for _ in range(count))
            elif depth < DEEPEST:
                nested = [odd(field.message_type, chance, depth + 1) for _ in range(min(count, 3))]
                values.extend(nested)
        elif field.message_type is None:
            setattr(message, field.name, _value(field, chance))
        elif depth < DEEPEST:
            getattr(message, field.name).CopyFrom(odd(field.message_type, chance, depth + 1))
    return message


def _fill_map(values: Any, entry: Descriptor, chance: random.Random) -> None:
    key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
    for _ in range(chance.choice((1, 2, 40))):
        if value.message_type is None:
            values[_value(key, chance)] = _value(value, chance)
        else:
            values[_value(key, chance)].CopyFrom(odd(value.message_type, chance, DEEPEST))


def _value(field: FieldDescriptor, chance: random.Random) -> Any:
    kind = field.cpp_type
    if kind in _BITS:
        bits, signed = _BITS[kind]
        number = chance.choice((*NUMBERS, chance.getrandbits(9), chance.getrandbits(bits)))
        number = abs(number) if not signed else number
        return max(-(1 << bits) if signed else 0, min(number, (1 << bits) - 1))
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return chance.choice((*FLOATS, chance.random()))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return chance.choice((0, 1, 2, 3, 77, -1, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 100, 5000)))
    return chance.choice(GOOD if chance.random() < 0.5 else WORDS)


def mangled(data: bytes, chance: random.Random) -> bytes:
    """An encoded message with bytes changed, cut, doubled or put in."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        length = chance.choice((1, 1, 2, 8, 40))
        piece = chance.choice(
            (
                chance.randbytes(length),
                b"",
                bytes(changed[at : at + length]) * 2,
                b"\xff" * 9 + b"\x01",  # the largest number, or length
                b"\x0a\x7f" * length,  # nested messages that are longer than what follows
                b"\x0b" * length,  # groups that begin and do not end
                b"\x0a\x02\xc3\x28",  # a text that is not UTF-8
            )
        )
        changed[at : at + chance.choice((0, length))] = piece
    return bytes(changed)


def nested(depth: int, field: int = 1) -> bytes:
    """A message within a message, deeper than readers allow."""
    data = b""
    for _ in range(depth):
        data = bytes([field << 3 | 2]) + _varint(len(data)) + data
    return data


def _varint(number: int) -> bytes:
    data = b""
    while number > 0x7F:
        data += bytes([number & 0x7F | 0x80])
        number >>= 7
    return data + bytes([number])


def proper(chance: random.Random) -> tuple[str, bytes]:
    """The path and the bytes of a valid call about the adapter "fuzzed"."""
    request = generation_pb2.GenerateRequest(
        adapter_id=chance.choice(("", "fuzzed")),
        token_ids=generation_pb2.TokenIds(ids=[20, 21, 22]),
        stop={"max_new_tokens": 4},
    )
    generation, adapters = "/loraplex.v1.GenerationService/", "/loraplex.v1.AdapterService/"
    calls: tuple[tuple[str, Message], ...] = (
        (generation + "Generate", request),
        (generation + "GenerateStream", generation_pb2.GenerateStreamRequest(request=request)),
        (adapters + "LoadAdapter", adapter_pb2.LoadAdapterRequest(adapter_id="fuzzed")),
        (adapters + "UnloadAdapter", adapter_pb2.UnloadAdapterRequest(adapter_id="fuzzed")),
        (adapters + "ListAdapters", adapter_pb2.ListAdaptersRequest()),
    )
    path, message = chance.choice(calls)
    return path, message.SerializeToString()


def hostile(method: Method, chance: random.Random) -> bytes:
    """The bytes of one message for a method."""
    kinds: Sequence[Callable[[], bytes]] = (
        lambda: chance.randbytes(chance.choice((0, 1, 3, 20, 300, 20_000))),
        lambda: nested(chance.choice((90, 101, 400)), chance.randint(1, 15)),
        lambda: odd(method.takes, chance).SerializeToString(),
        lambda: odd(method.takes, chance).SerializeToString(),
        lambda: mangled(odd(method.takes, chance).SerializeToString(), chance),
    )
    return chance.choice(kinds)()
