"""The trace of a call, as the code that serves calls sees it. By default there is none.

    interceptor      begins a span for each call, and ends it with the call's status
    services         describe the call, and add its phases as child spans

`otlp` makes and exports the spans; nothing of OpenTelemetry is imported unless the server has an
endpoint to export to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Final, Protocol, TypeAlias

from loraplex_server.exits import ServerExit
from loraplex_server.runtime.failures import StartFailure, needed

Value: TypeAlias = str | bool | int | float | Sequence[str]
"""Value of an attribute. It must hold no prompt, answer, key or salt."""


class CallTrace(Protocol):
    """The span of one call. Times are seconds of `time.monotonic()`."""

    @property
    def trace_id(self) -> str:
        """Id of the trace, as 32 hexadecimal digits."""

    def describe(self, attributes: Mapping[str, Value]) -> None:
        """Adds attributes to the call's span."""

    def phase(
        self, name: str, begun: float, ended: float, attributes: Mapping[str, Value] | None = None
    ) -> None:
        """Adds a phase of the call that has ended, as a child span."""

    def end(self, code: str, reason: str, attributes: Mapping[str, Value]) -> None:
        """Ends the span with the name of the call's gRPC code and, if it failed, its reason."""


class Tracing(Protocol):
    """Makes traces of calls and exports them."""

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> CallTrace | None:
        """Begins the span of a call of `method` ("/package.Service/Method").

        It continues the trace that the call's metadata name in `traceparent`, if that is well
        formed. Returns None if this call is not to be traced.
        """

    async def close(self) -> None:
        """Exports what is left and ends the export."""


class _NoTracing:
    """Traces no call."""

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        return None

    async def close(self) -> None:
        pass


NO_TRACING: Final[Tracing] = _NoTracing()

TRACE: Final[ContextVar[CallTrace | None]] = ContextVar("loraplex_trace", default=None)
"""The trace of the call that the current task serves; None if the call has none."""


def open_tracing(endpoint: str, version: str, count: Callable[[str, int], None]) -> Tracing:
    """Tracing that exports to `endpoint`; none if that is empty. Raises StartFailure.

    `count` is called, in any thread, with "exported" or "failed" and the number of spans.
    """
    if not endpoint:
        return NO_TRACING
    try:
        from loraplex_server.telemetry.otlp import OtlpTracing
    except ImportError as error:
        text = (
            f"otlp_endpoint needs the package {error.name}: install loraplex[otel], or unset "
            "otlp_endpoint"
        )
        raise StartFailure(ServerExit.BAD_CONFIG, text) from error
    # Files that variables such as OTEL_EXPORTER_OTLP_CERTIFICATE name are read now.
    with needed(ServerExit.BAD_CONFIG, "cannot read"):
        return OtlpTracing(endpoint, version, count)
