"""Connections to PostgreSQL that fail instead of waiting for ever.

A network or a proxy that drops packets leaves connections half open: the operating system reports
no error, and a query may wait for ever. Three limits act together: keepalives and
`tcp_user_timeout` find a peer that is gone, `statement_timeout` ends a query that the server does
not finish, and the client itself gives up a reply that does not come, which also covers a proxy
that answers keepalives but forwards nothing.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import sqlalchemy as sa

CONNECT_SECONDS = 5
REPLY_SECONDS = 5.0
"""Seconds that the reply to one statement may take, unless `allow` grants more."""

_TCP = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}


def engine(url: sa.URL, statement_seconds: float) -> sa.Engine:
    """An engine whose connections have time limits; parameters in the URL take precedence.

    `statement_seconds` limits one statement on the server. Raises ModuleNotFoundError without a
    driver.
    """
    made = sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_timeout=CONNECT_SECONDS,
        connect_args={name: value for name, value in _TCP.items() if name not in url.query},
    )
    if made.dialect.driver == "psycopg":
        limited = _limited_connection()

        def connect(_dialect: Any, _record: Any, arguments: list[Any], options: Any) -> Any:
            connection = limited.connect(*arguments, **options)
            milliseconds = round(statement_seconds * 1000)
            connection.execute(f"SET statement_timeout = {milliseconds}")
            connection.commit()
            return connection

        def returned(connection: Any, *_: object) -> None:
            _allow(connection, REPLY_SECONDS)

        sa.event.listen(made, "do_connect", connect)
        sa.event.listen(made, "reset", returned)
    return made


def allow(connection: sa.Connection, seconds: float) -> None:
    """Sets the seconds that a reply may take until the connection is back in its pool."""
    _allow(connection.connection.driver_connection, seconds)


def _allow(connection: Any, seconds: float) -> None:
    if hasattr(connection, "reply_seconds"):  # another driver, chosen in the URL, has no limit
        connection.reply_seconds = seconds


def _limited_connection() -> Any:
    """The driver's class of connections, with a limit on the time of a reply."""
    import psycopg

    class LimitedConnection(psycopg.Connection[Any]):
        """Closes itself if a reply does not come within `reply_seconds`."""

        reply_seconds = REPLY_SECONDS

        def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:
            return super().wait(self._limited(gen), *arguments, **options)

        def _limited(self, waiting: Any) -> Generator[Any, Any, Any]:
            """Passes on what the driver waits for; the driver comes back every tenth of a second.

            See psycopg's `waiting` for the protocol.
            """
            deadline = time.monotonic() + self.reply_seconds
            try:
                state = next(waiting)
                while True:
                    ready = yield state
                    if not ready and time.monotonic() > deadline:
                        self.close()  # what would arrive later belongs to no statement
                        raise psycopg.OperationalError("the database did not answer in time")
                    state = waiting.send(ready)
            except StopIteration as end:
                return end.value

    return LimitedConnection
