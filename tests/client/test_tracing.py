"""The client passes its caller's trace on, if there is one, and never a second one."""

from __future__ import annotations

import pytest
from loraplex.channel import CallDefaults, trace_metadata
from opentelemetry import context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState


@pytest.fixture
def parent() -> SpanContext:
    return SpanContext(
        0x0AF7651916CD43DD8448EB211C80319C,
        0xB7AD6B7169203331,
        is_remote=False,
        trace_flags=TraceFlags(1),
        trace_state=TraceState([("vendor", "value")]),
    )


def test_without_a_span_nothing_is_sent() -> None:
    assert trace_metadata() == ()


def test_the_current_span_and_its_state_are_sent(parent: SpanContext) -> None:
    token = context.attach(trace.set_span_in_context(NonRecordingSpan(parent)))
    try:
        sent = CallDefaults(None, False, (("a", "b"),)).arguments(None)["metadata"]
    finally:
        context.detach(token)
    assert sent == (
        ("a", "b"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "vendor=value"),
    )
    assert trace_metadata() == ()


def test_a_trace_that_the_caller_names_is_the_only_one() -> None:
    given = (("traceparent", "mine"),)
    with TracerProvider().get_tracer("a").start_as_current_span("caller"):
        defaults = CallDefaults(None, False, given)
        assert defaults.arguments(None)["metadata"] == given
        assert defaults.probe(1.0)["metadata"] == given
        assert defaults.unbounded(None)["metadata"] == given
