"""Spans of calls, exported over OTLP and gRPC with OpenTelemetry's SDK.

The SDK collects ended spans in a bounded queue and sends them in a thread of its own. A collector
that is away or does not answer costs spans, never time of a call. The SDK also reads the variables
OTEL_EXPORTER_OTLP_* (headers, certificates, timeout), OTEL_TRACES_SAMPLER, OTEL_BSP_* and
OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from loraplex_server.telemetry.trace import CallTrace, Value

_HEADERS: Final = ("traceparent", "tracestate")
_FILES: Final = tuple(
    f"OTEL_EXPORTER_OTLP_{signal}{file}"
    for signal in ("", "TRACES_")
    for file in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")
)
"""Variables that name files of the exporter, which would go on without them."""

_LOOK_SECONDS: Final = 0.02

_SERVER_ERRORS: Final = frozenset(
    {
        "UNKNOWN",
        "DEADLINE_EXCEEDED",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
    }
)
"""Codes for which the span of a server has the status "error", by the conventions for RPCs."""

log = logging.getLogger(__name__)


class OtlpTracing:
    """Makes the spans of calls and exports them to a collector."""

    def __init__(self, endpoint: str, version: str, count: Callable[[str, int], None]) -> None:
        """`endpoint` is a URL: http without encryption, https with it. Raises OSError.

        `count` is called with "exported" or "failed" and a number of spans.
        """
        for name in _FILES:
            if file := os.environ.get(name):
                open(file, "rb").close()
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
        resource = Resource.create(
            {
                "service.name": "loraplex",
                "service.version": version,
                "service.instance.id": str(uuid.uuid4()),
            }
        )
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(_Counted(exporter, endpoint, count)))
        self._tracer = self._provider.get_tracer("loraplex", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> CallTrace | None:
        """See `Tracing`."""
        clock = _Clock()
        try:
            span = self._start(method.strip("/"), metadata, clock)
        except Exception:  # a sampler may be anybody's code; no fault of it may end a call
            log.exception("a call is not traced")
            return None
        return _OtlpTrace(self._tracer, span, clock) if span.is_recording() else None

    def _start(
        self, name: str, metadata: Iterable[tuple[str, str | bytes]], clock: _Clock
    ) -> trace.Span:
        carrier = {key: value for key, value in metadata if key in _HEADERS}
        service, _, method = name.rpartition("/")
        return self._tracer.start_span(
            name,
            self._propagator.extract(carrier, Context()),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
            start_time=clock.nanoseconds(time.monotonic()),
        )

    async def close(self) -> None:
        """See `Tracing`. Waits for as long as the collector keeps the export waiting."""
        # Not a thread of the loop's pool: the interpreter would wait for that at its exit.
        thread = threading.Thread(target=self._provider.shutdown, name="last export", daemon=True)
        thread.start()
        while thread.is_alive():  # noqa: ASYNC110 - a thread sets no event of the loop
            await asyncio.sleep(_LOOK_SECONDS)


class _Clock:
    """Turns times of `time.monotonic()` into nanoseconds of Unix time."""

    __slots__ = ("_offset",)

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, at: float) -> int:
        return self._offset + int(at * 1e9)


class _OtlpTrace:
    """See `CallTrace`."""

    __slots__ = ("_clock", "_context", "_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span, clock: _Clock) -> None:
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span, Context())
        self._clock = clock

    @property
    def trace_id(self) -> str:
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def describe(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(attributes)

    def phase(
        self, name: str, begun: float, ended: float, attributes: Mapping[str, Value] | None = None
    ) -> None:
        begins = self._clock.nanoseconds(begun)
        span = self._tracer.start_span(
            name, self._context, attributes=attributes, start_time=begins
        )
        span.end(max(begins, self._clock.nanoseconds(ended)))

    def end(self, code: str, reason: str, attributes: Mapping[str, Value]) -> None:
        span = self._span
        span.set_attributes(attributes)
        span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        if code != "OK":
            span.set_attribute("error.type", reason or code)
        if code in _SERVER_ERRORS:
            span.set_status(Status(StatusCode.ERROR, reason or code))
        span.end(self._clock.nanoseconds(time.monotonic()))


class _Counted(SpanExporter):
    """Counts the spans that another exporter exports, and logs when that begins to fail."""

    def __init__(
        self, exporter: SpanExporter, endpoint: str, count: Callable[[str, int], None]
    ) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._count = count
        self._is_failing = False
        # Says with what code an export has failed; without this, that it will be tried again, too.
        self._said = logging.getLogger("opentelemetry.exporter")
        self._said.setLevel(logging.ERROR)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See SpanExporter."""
        try:
            result = self._exporter.export(spans)
        except Exception:
            log.exception("spans could not be exported")
            result = SpanExportResult.FAILURE
        fails = result is not SpanExportResult.SUCCESS
        self._count("failed" if fails else "exported", len(spans))
        if fails != self._is_failing:
            self._is_failing = fails
            # The first failure has been logged with its cause; repeating it every few seconds
            # would hide other lines.
            self._said.setLevel(logging.CRITICAL if fails else logging.ERROR)
            log.warning(
                "spans cannot be exported to %s" if fails else "spans are exported to %s again",
                self._endpoint,
            )
        return result

    def shutdown(self) -> None:
        """See SpanExporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See SpanExporter."""
        return self._exporter.force_flush(timeout_millis)
