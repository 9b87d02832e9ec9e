"""The gateway's own series, which `/metrics` shows after the server's."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_gateway import errors
from loraplex_gateway.places import CallPlaces

_BUCKETS: Final = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class GatewayMetrics:
    """The series, in a registry of their own.

    Attributes:
        requests: ended requests by route, method and status; 499 if the client went away first.
        seconds: their duration by route, until the last byte was sent.
        running: requests that have not ended.
        streams: event streams that are being sent.
        refused: requests that were refused because of too many others.
    """

    def __init__(self, places: CallPlaces) -> None:
        """`places` are those that requests hold."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "loraplex_gateway_requests",
            "HTTP requests by route, method and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "loraplex_gateway_request_seconds",
            "Seconds until a request was answered completely, by route.",
            ("route",),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.running = Gauge(
            "loraplex_gateway_running_requests",
            "HTTP requests that are being answered.",
            registry=self.registry,
        )
        self.streams = Gauge(
            "loraplex_gateway_open_streams",
            "Event streams that are being sent.",
            registry=self.registry,
        )
        self.refused = Counter(
            "loraplex_gateway_refused_requests",
            "HTTP requests that were refused because of too many others.",
            registry=self.registry,
        )
        gauge = Gauge(
            "loraplex_gateway_places",
            "Places for calls of the server, by state: taken or free.",
            ("state",),
            registry=self.registry,
        )
        gauge.labels("taken").set_function(lambda: places.taken)
        gauge.labels("free").set_function(lambda: places.most - places.taken)

    def exposition(self) -> bytes:
        """The series in Prometheus's text format."""
        return generate_latest(self.registry)


class Observed:
    """Counts requests, and answers faults of the gateway without what the request contained.

    Starlette would pass a fault on to the HTTP server, which logs its text.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, began = self._metrics, time.monotonic()
        status, streaming = 0, False

        async def observed(message: Message) -> None:
            nonlocal status, streaming
            if message["type"] == "http.response.start":
                status = message["status"]
                if any(value.startswith(b"text/event-stream") for _, value in message["headers"]):
                    streaming = True
                    metrics.streams.inc()
            await send(message)

        metrics.running.inc()
        try:
            await self._app(scope, receive, observed)
        except Exception as error:
            failure = errors.fault(error, scope)
            if not status:
                await failure.response()(scope, receive, observed)
        finally:
            metrics.running.dec()
            if streaming:
                metrics.streams.dec()
            # The pattern, because a path itself may hold the name of somebody's adapter.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            metrics.requests.labels(route, method, str(status or 499)).inc()
            metrics.seconds.labels(route).observe(time.monotonic() - began)
