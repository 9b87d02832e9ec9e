"""The end of a server that cannot go on: why, and with which exit code."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from loraplex_server.engine.process.identity import BaseChanged
from loraplex_server.engine.process.supervisor import EngineLost
from loraplex_server.exits import ServerExit
from loraplex_server.runtime.watched import on_unexpected_end

CLOSE_SECONDS: Final = 20.0
"""Seconds that the parts of a failed server may take to close."""

log = logging.getLogger(__name__)


def unexpected_end(loop: asyncio.AbstractEventLoop) -> asyncio.Future[ServerExit]:
    """A future that is set when a watched task ends unexpectedly: to the exit code."""
    failing: asyncio.Future[ServerExit] = loop.create_future()

    def on_end(name: str, error: BaseException | None) -> None:
        code = _code(error)
        if code is ServerExit.INTERNAL:
            log.critical("the task %r ended unexpectedly", name, exc_info=error)
        else:
            log.critical("%s", error)
        log.critical("the server ends with exit code %d (%s)", code, code.name)
        if not failing.done():
            failing.set_result(code)

    on_unexpected_end(loop, on_end)
    return failing


def _code(error: BaseException | None) -> ServerExit:
    if isinstance(error, EngineLost):
        return ServerExit.ENGINE_LOST
    return ServerExit.BASE_CHANGED if isinstance(error, BaseChanged) else ServerExit.INTERNAL
