"""An OpenTelemetry collector in this process: it keeps the spans that it receives over OTLP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

Span = trace_pb2.Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it receives.

    Attributes:
        endpoint: URL to export to.
        spans: the spans received.
        requests: everything received, as the bytes that came.
        metadata: metadata of each export.
        resource: attributes of the last exporter.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Span] = []
        self.requests: list[bytes] = []
        self.metadata: list[dict[str, str]] = []
        self.resource: dict[str, Any] = {}
        self._changed = threading.Condition()

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            self.requests.append(request.SerializeToString())
            self.metadata.append(dict(context.invocation_metadata()))
            for resource_spans in request.resource_spans:
                self.resource = values(resource_spans.resource.attributes)
                for scope in resource_spans.scope_spans:
                    self.spans.extend(scope.spans)
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait(self, holds: Callable[[list[Span]], bool]) -> list[Span]:
        """Waits until the spans received are enough. Raises TimeoutError."""
        end = time.monotonic() + 60
        with self._changed:
            while not holds(self.spans):
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    raise TimeoutError(sorted(span.name for span in self.spans))
            return list(self.spans)

    def call(self, method: str, number: int = 1) -> list[Span]:
        """Waits for so many spans of calls of a method of our services."""

        def those(spans: list[Span]) -> list[Span]:
            return [span for span in spans if span.name.endswith("/" + method)]

        return those(self.wait(lambda spans: len(those(spans)) >= number))

    def children(self, parent: Span) -> dict[str, Span]:
        """The spans below another one, by name."""
        return {span.name: span for span in self.spans if span.parent_span_id == parent.span_id}


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as Python values."""
    return {each.key: _value(each.value) for each in attributes}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a port of its own."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()
