"""The caller's trace, passed on with each call if the caller uses OpenTelemetry."""

from __future__ import annotations

import sys

_HEADERS = ("traceparent", "tracestate")


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """The metadata `traceparent` and `tracestate` of the current span; empty if there is none.

    OpenTelemetry is a dependency of programs that have spans, not of this package. It is never
    imported here first: without it there is no current span.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple((key, carrier[key]) for key in _HEADERS if carrier.get(key))
