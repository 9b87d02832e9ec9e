"""Times of one generation: for the metrics, and for the spans of its call, if that is traced."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

from loraplex.v1 import generation_pb2
from loraplex_adapters.store import Record

from loraplex_server.engine.messages import Output
from loraplex_server.metrics import Metrics
from loraplex_server.telemetry.generation import (
    adapter_attributes,
    request_attributes,
    usage_attributes,
)
from loraplex_server.telemetry.trace import TRACE


class GenerationTimes:
    """Measures a generation from its call's arrival to its end.

    With tracing, each time between two of these moments is a span:

        arrival   submission   adapters there   first step   first token   end
           | prepare  | adapter load  |    queue     |   prefill  |  decode |
    """

    def __init__(
        self,
        metrics: Metrics,
        request: generation_pb2.GenerateRequest,
        base: str,
        streaming: bool,
    ) -> None:
        """`base` is the name of the base model. The times count from now."""
        self._metrics = metrics
        self._trace = TRACE.get()
        self._base = base
        self._arrived = self._last = time.monotonic()
        self._submitted: float | None = None
        self._started: float | None = None
        self._ended: float | None = None
        self._is_first = True
        self._cached = 0
        self._whole = self
        self._finishes: list[str] = []
        if self._trace is not None:
            self._trace.describe(request_attributes(request, base, streaming))

    def another(self) -> GenerationTimes:
        """Times of a further completion of the call. The spans are those of the first one."""
        other = copy.copy(self)
        other._trace = None
        return other

    def submit(self, adapters: Sequence[Record]) -> None:
        """The request is given to the engine, with these adapters."""
        if self._trace is not None:
            self._submitted = time.monotonic()
            self._trace.phase("prepare", self._arrived, self._submitted)
            self._trace.describe(adapter_attributes(adapters, self._base))

    def start(self, output: Output) -> None:
        """The request's first output has arrived: its prompt is computed."""
        self._metrics.series.queue_wait_seconds.observe(output.queue_seconds)
        if self._trace is None or self._submitted is None:
            return
        self._cached = output.cached_tokens
        self._started = time.monotonic()
        there = self._submitted + output.load_seconds
        first_step = self._submitted + output.queue_seconds
        if output.load_seconds:
            self._trace.phase("adapter load", self._submitted, there)
        self._trace.phase("queue", there, first_step)
        self._trace.phase("prefill", first_step, self._started)

    def tokens(self, count: int) -> None:
        """So many tokens are about to be sent."""
        if not count:
            return
        now = time.monotonic()
        series = self._metrics.series
        if self._is_first:
            series.time_to_first_token_seconds.observe(now - self._arrived)
            self._is_first = False
            if self._trace is not None:
                seconds = now - self._arrived
                self._trace.describe({"gen_ai.response.time_to_first_chunk": seconds})
        else:
            series.inter_token_latency_seconds.observe((now - self._last) / count)
        self._last = now

    def finish(self, reason: str) -> None:
        """The last output of a completion has arrived: it ends for this reason of its own."""
        self._whole._finishes.append(reason)
        self._whole._ended = time.monotonic()

    def end(self, prompt_tokens: int, generated_tokens: int) -> None:
        """The call has ended, however it did; `generated_tokens` of all its completions."""
        if self._trace is None or self._submitted is None:
            return
        ended = self._ended or time.monotonic()
        if self._started is None:
            self._trace.phase("queue", self._submitted, ended)
        else:
            self._trace.phase("decode", self._started, ended)
        usage = usage_attributes(prompt_tokens, self._cached, generated_tokens, self._finishes)
        self._trace.describe(usage)
