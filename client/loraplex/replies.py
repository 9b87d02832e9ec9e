"""Turns the server's messages into the values of `results`."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import NoneType
from typing import Any, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints

from google.protobuf.duration_pb2 import Duration

from loraplex import results
from loraplex.errors import cancelled_here, cut_short
from loraplex.v1 import adapter_pb2, generation_pb2

T = TypeVar("T")
M_contra = TypeVar("M_contra", contravariant=True)
T_co = TypeVar("T_co", covariant=True)


def read(kind: Callable[..., T], message: Any, **given: Any) -> T:
    """Returns a dataclass made of a message's fields of the same names, and of `given`.

    A field of the dataclass may have another name in the message, in its metadata as `sent_as`. It
    is None if its type allows that and the message does not set it.
    """
    for name, (source, reader) in _readers(kind).items():
        if name not in given:
            given[name] = reader(message, source)
    return kind(**given)


@functools.cache
def _readers(kind: Any) -> dict[str, tuple[str, Callable[[Any, str], Any]]]:
    """For each field of a dataclass, its name in the message and the function that reads it."""
    hints = get_type_hints(kind)
    return {
        field.name: (field.metadata.get("sent_as", field.name), _reader(hints[field.name]))
        for field in fields(kind)
    }


def _reader(hint: Any) -> Callable[[Any, str], Any]:
    """Returns a function that reads a message's field as a value of type `hint`."""
    origin, inner = get_origin(hint), get_args(hint)
    if NoneType in inner:
        present = _reader(inner[0])
        return lambda message, name: present(message, name) if message.HasField(name) else None
    if origin is tuple:
        nested = is_dataclass(inner[0])
        item = functools.partial(read, inner[0]) if nested else inner[0]
        return lambda message, name: tuple(map(item, getattr(message, name)))
    if origin is Mapping:
        return lambda message, name: dict(getattr(message, name))
    if is_dataclass(hint):
        return lambda message, name: read(cast(Any, hint), getattr(message, name))
    if hint is datetime:
        return lambda message, name: getattr(message, name).ToDatetime(tzinfo=UTC)
    if hint is float:
        return _number
    return functools.partial(_member, hint) if issubclass(hint, StrEnum) else getattr


def _number(message: Any, name: str) -> float:
    """Returns a number; the seconds of a duration."""
    found: Any = getattr(message, name)
    return found.ToTimedelta().total_seconds() if isinstance(found, Duration) else float(found)


def _member(kind: type[StrEnum], message: Any, name: str) -> StrEnum:
    """Returns the member of the same name; UNSPECIFIED for one that only newer servers know."""
    values = message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    known = values.get(getattr(message, name), values[0])
    return kind(known.name.removeprefix(prefix).lower())


class Receiver(Protocol[M_contra, T_co]):
    """Turns the messages of a running call into the items that its reader gets."""

    def receive(self, message: M_contra, /) -> T_co | None:
        """Takes the next message; returns its item, or None if it completes none."""

    def end(self, cancelled: bool) -> None:
        """Takes the end of the call; `cancelled` by this side or not. Raises LoraplexError."""


def health(status: int) -> results.HealthStatus:
    """Returns the status; the numbers of `grpc.health.v1` follow the order of `HealthStatus`."""
    states = tuple(results.HealthStatus)
    return states[status] if 0 <= status < len(states) else results.HealthStatus.UNKNOWN


class WatchLog:
    """Joins the parts of the table that a watch sends, and reads its changes."""

    def __init__(self) -> None:
        self._parts: list[results.AdapterInfo] = []
        self._resync = False

    def receive(
        self, message: adapter_pb2.WatchAdaptersResponse
    ) -> results.AdapterTable | results.AdapterEvent | None:
        """Returns the table with its last part, or a change; None for anything else."""
        match message.WhichOneof("event"):
            case "table":
                self._parts += (read(results.AdapterInfo, a) for a in message.table.adapters)
                if not message.table.complete:
                    return None
                aliases = {a.alias: f"{a.name}@{a.version}" for a in message.table.aliases}
                table = results.AdapterTable(tuple(self._parts), aliases, self._resync)
                self._parts, self._resync = [], False
                return table
            case "change":
                return read(results.AdapterEvent, message.change)
            case "resync":
                self._parts, self._resync = [], True
        return None

    def end(self, cancelled: bool) -> None:
        """A watch may end at any time."""


class Transcript:
    """Collects what a stream sends: its head, the deltas of its completions and their ends."""

    def __init__(self, completions: int = 1) -> None:
        """`completions` is the number that the request asked for; 0 stands for 1."""
        self.started: results.Started | None = None
        self.finishes: dict[int, results.Finished] = {}
        self._completions = max(1, completions)
        self._deltas: defaultdict[int, list[results.Delta]] = defaultdict(list)

    @property
    def finished(self) -> results.Finished | None:
        """The end of the first completion; None until all have ended."""
        return self.finishes[0] if self._is_whole else None

    @property
    def _is_whole(self) -> bool:
        return all(index in self.finishes for index in range(self._completions))

    def receive(
        self, message: generation_pb2.GenerateStreamResponse
    ) -> results.Delta | results.Finished | None:
        """Takes the next message; returns what it holds, or None if that is the head."""
        match message.WhichOneof("event"):
            case "started":
                self.started = read(results.Started, message.started)
            case "delta":
                delta = read(results.Delta, message.delta)
                self._deltas[delta.index].append(delta)
                return delta
            case "finished":
                adapters = self.started.adapters if self.started else ()
                finished = read(results.Finished, message.finished, adapters=adapters)
                self.finishes[finished.index] = finished
                return finished
        return None

    def end(self, cancelled: bool) -> None:
        """Raises Cancelled if this side cancelled, ServerFault if the last message is missing."""
        if cancelled:
            raise cancelled_here()
        self._whole()

    def completion(self) -> results.Completion:
        """Returns the whole stream as one value. Raises ServerFault before the end."""
        started = self._whole()
        first, *others = (self._part(index) for index in range(self._completions))
        return results.Completion(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            usage=first.usage,
            adapters=started.adapters,
            request_id=started.request_id,
            logprobs=first.logprobs,
            prompt_logprobs=started.prompt_logprobs,
            matched_stop=first.matched_stop,
            alternatives=tuple(others),
            prompt_token_ids=started.prompt_token_ids,
        )

    def _part(self, index: int) -> results.Alternative:
        """One of the completions."""
        deltas, finished = self._deltas[index], self.finishes[index]
        return results.Alternative(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
            matched_stop=finished.matched_stop,
        )

    def _whole(self) -> results.Started:
        if self.started is None or not self._is_whole:
            raise cut_short()
        return self.started
