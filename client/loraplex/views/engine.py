"""The batch of a server's engine as it is now, and the calls that watch it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from loraplex.aio_streams import AsyncRunningCall
from loraplex.errors import invalid
from loraplex.replies import read
from loraplex.requests import fill
from loraplex.streams import RunningCall
from loraplex.v1 import engine_pb2


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Numbers of requests for one adapter or mix.

    `adapter_id` is "name@version", or several joined by "+"; "" is the base model. The entry that
    is `hidden` counts all requests for adapters that the caller does not see.
    """

    adapter_id: str
    hidden: bool
    prefill: int
    decode: int
    waiting: int

    @property
    def running(self) -> int:
        """Number of requests that take part in steps."""
        return self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class EngineState:
    """The state of the engine at one time. Numbers of steps and tokens count since its start.

    `kv_blocks_cached` are blocks with computed prompts that no running request needs.
    """

    time: datetime
    steps: int
    generated_tokens: int
    prompt_tokens: int
    adapters: tuple[AdapterRows, ...]
    kv_blocks_used: int
    kv_blocks: int
    kv_blocks_cached: int
    resident_adapters: int
    adapter_bytes: int
    adapter_bytes_limit: int
    max_rows: int


class EngineLog:
    """Reads the states that a watch sends."""

    def receive(self, message: engine_pb2.WatchEngineResponse) -> EngineState:
        """Returns the state."""
        return read(EngineState, message)

    def end(self, cancelled: bool) -> None:
        """A watch may end at any time."""


class EngineWatch(RunningCall[EngineState]):
    """A running watch of the engine: an iterator over its states, of which a slow reader misses
    some."""

    def __init__(self, call: Any) -> None:
        super().__init__(call, EngineLog())


class AsyncEngineWatch(AsyncRunningCall[EngineState]):
    """Like `EngineWatch`, with `async for`."""

    def __init__(self, call: Any) -> None:
        super().__init__(call, EngineLog())


def watch_request(interval: float | None) -> engine_pb2.WatchEngineRequest:
    """Returns the request for a state every `interval` seconds. Raises InvalidRequest."""
    return fill(engine_pb2.WatchEngineRequest, interval=_duration(interval))


def _duration(seconds: float | None) -> dict[str, int] | None:
    if seconds is None:
        return None
    if not math.isfinite(seconds):
        raise invalid("interval", "must be a finite number of seconds")
    nanos = round(seconds * 1e9)
    return {"seconds": nanos // 10**9, "nanos": nanos % 10**9}
