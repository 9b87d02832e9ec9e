"""Runs the application: listens, says that it is ready, and ends well on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from loraplex_gateway.certificate import HttpCertificate
from loraplex_gateway.connections import BoundedConnection, allow_descriptors, limit_of
from loraplex_gateway.settings import GatewaySettings

BACKLOG: Final = 1024
KEEP_ALIVE_SECONDS: Final = 75
"""Seconds that a connection without a request stays open: longer than most proxies keep theirs."""

_TICKS: Final = 10
"""Calls of `on_tick` in a second."""

log = logging.getLogger(__name__)


class GatewayExit(IntEnum):
    """Exit code of `loraplex-gateway`. Death by signal n is 128 + n, as in a shell."""

    OK = 0
    BAD_SETTINGS = 2
    PORT_IN_USE = 3


class CannotListen(Exception):
    """The address cannot be listened on; the text says which, and why."""


def listen(settings: GatewaySettings) -> socket.socket:
    """A socket that listens on the address of the settings. Raises CannotListen."""
    where = address(settings.host, settings.port)
    try:
        family, _, _, _, place = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio turns off the delay of small packets only for sockets that name their protocol.
        # With it, each answer on a connection that stays open would come up to 40 ms late.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
            found.listen(BACKLOG)
        except BaseException:
            found.close()
            raise
    except OSError as error:
        raise CannotListen(f"cannot listen on {where}: {error.strerror or error}") from error
    return found


def address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around a host of IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def server_of(app: ASGIApp, settings: GatewaySettings) -> GatewayServer:
    """The server of the application. Raises SettingsError for files of TLS."""
    encryption = None
    if settings.certificate is not None and settings.private_key is not None:
        encryption = HttpCertificate(settings.certificate, settings.private_key).context
    config = uvicorn.Config(
        app,
        ssl_context_factory=None if encryption is None else lambda *_: encryption,
        access_log=False,  # a path may hold the name of another tenant's adapter
        log_config=None,
        server_header=False,
        date_header=False,
        http=BoundedConnection,
        ws="none",
        lifespan="on",
        limit_concurrency=limit_of(settings.max_connections),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(settings.drain_seconds),
        backlog=BACKLOG,
    )
    config.load()
    # A warning for each request that is malformed would let anybody fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return GatewayServer(config)


async def serve(
    app: ASGIApp, settings: GatewaySettings, listening: socket.socket, ready: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or SIGINT, and then until running requests have ended.

    They have `drain_seconds`; a second signal ends the process at once. `ready` is called with
    HOST:PORT once requests are answered. Raises SettingsError for files of TLS.
    """
    server = server_of(app, settings)
    allow_descriptors(settings.max_connections)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop, number)
    saying = asyncio.create_task(_say(server, address(*listening.getsockname()[:2]), ready))
    try:
        await server.serve(sockets=[listening])
    finally:
        saying.cancel()


async def _say(server: GatewayServer, where: str, ready: Callable[[str], None]) -> None:
    while not server.started:  # noqa: ASYNC110 - the server sets no event
        await asyncio.sleep(0.005)
    ready(where)


class GatewayServer(uvicorn.Server):
    """A server that closes late connections.

    Its signals are handled outside, so that a drained one exits with code 0.
    """

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, BoundedConnection):
                    connection.close_if_late(now)
        return await super().on_tick(counter)

    def stop(self, number: int) -> None:
        """Begins to drain; at the second signal the process ends."""
        if self.should_exit:
            sys.exit(128 + number)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
