"""The metrics endpoint: HTTP on the admin port, in threads of its own.

It answers while the event loop is blocked. Connections are bounded in number and in time: when
there are too many, the oldest is closed, first those that have not sent their request.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from loraplex_server.telemetry import residency

MAX_HTTP_CONNECTIONS: Final = 16
HTTP_SECONDS: Final = 10.0
"""Seconds after which a connection is closed, whatever it does."""

ROUTING_PATH: Final = "/metrics/routing"
"""Path of a short page, with the families that inference gateways read many times a second."""

ROUTING_FAMILIES: Final = (
    "loraplex_queue_depth",
    "loraplex_queued_tokens",
    "loraplex_running_requests",
    "loraplex_kv_usage_ratio",
    "loraplex_kv_cache_info",
    residency.NAME,
)

_POLL_SECONDS: Final = 0.5
_RETRY_SECONDS: Final = 0.2
"""Pause after a connection could not be accepted, for lack of descriptors for example."""

log = logging.getLogger(__name__)


class MetricsServer:
    """Serves a registry over HTTP until `stop`.

    Attributes:
        thread: the thread that accepts connections; it ends only after `stop`.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Binds the port; port 0 picks a free one. Raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self._server = _BoundedServer(family, (str(address[0]), port))
        self._server.set_app(_application(registry))
        self.port = self._server.server_port
        self.thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="metrics", daemon=True
        )
        self.thread.start()

    @property
    def open_connections(self) -> int:
        """Number of connections."""
        return len(self._server.connections)

    def stop(self) -> None:
        """Stops listening and closes all connections. Blocks."""
        self._server.shutdown()
        self.thread.join()
        self._server.server_close()
        self._server.close_older(0.0)


def _application(registry: CollectorRegistry) -> Callable[..., Any]:
    """Answers `ROUTING_PATH` with few families, and every other path with all of them."""
    whole = make_wsgi_app(registry)
    routing = make_wsgi_app(registry.restricted_registry(ROUTING_FAMILIES))

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ.get("PATH_INFO") != ROUTING_PATH:
            return whole(environ, start_response)
        return routing({**environ, "QUERY_STRING": ""}, start_response)

    return application


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    since: float
    asked: bool = False
    """The request has been read."""


class _BoundedServer(ThreadingWSGIServer):
    """A thread for each of at most MAX_HTTP_CONNECTIONS connections."""

    request_queue_size = 512

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int]) -> None:
        self.address_family = family
        self.connections: dict[socket.socket, _Connection] = {}
        """The connections that are not being closed, oldest first."""
        self._lock = threading.Lock()
        self.threads_left = threading.Semaphore(MAX_HTTP_CONNECTIONS)
        super().__init__(address, _RequestHandler)

    def asked(self, request: socket.socket) -> bool:
        """Notes that a request has been read. Returns False if its connection is being closed."""
        with self._lock:
            connection = self.connections.get(request)
            if connection is not None:
                connection.asked = True
            return connection is not None

    def close_older(self, seconds: float) -> None:
        """Closes all connections older than `seconds`."""
        now = time.monotonic()
        with self._lock:
            for connection in list(self.connections.values()):
                if now - connection.since >= seconds:
                    self._close(connection)

    def service_actions(self) -> None:
        self.close_older(HTTP_SECONDS)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            log.warning("a connection to the admin port is not accepted: %s", error.strerror)
            time.sleep(_RETRY_SECONDS)  # the socket stays readable
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self.connections) >= MAX_HTTP_CONNECTIONS:
                open_now = list(self.connections.values())
                self._close(next((c for c in open_now if not c.asked), open_now[0]))
            self.connections[request] = _Connection(request, time.monotonic())
        self.threads_left.acquire()  # soon free: the thread of a closed connection ends at once
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.threads_left.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.threads_left.release()

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request to the admin port failed", exc_info=True)

    def _close(self, connection: _Connection) -> None:
        """Ends the reads and writes of a connection's thread, which then closes the socket."""
        del self.connections[connection.socket]
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)


class _RequestHandler(WSGIRequestHandler):
    """One request of a connection, without a log line."""

    server: _BoundedServer

    def parse_request(self) -> bool:
        return super().parse_request() and self.server.asked(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""
