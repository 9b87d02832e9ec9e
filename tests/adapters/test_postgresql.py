"""A database that does not answer ends in an error within the time limits, and is found again."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from adapters.stores import url as new_url
from loraplex_adapters.store.index import postgresql
from loraplex_adapters.store.index.database import Database
from loraplex_model.base.refusal import Reason, Refusal

pytestmark = pytest.mark.fault("index-away")

psycopg = pytest.importorskip("psycopg")

_SOCKET = ".s.PGSQL.5432"


class Proxy:
    """Forwards connections to a server's socket; while frozen it accepts bytes and keeps them."""

    def __init__(self, folder: Path, target: Path) -> None:
        self._flowing = threading.Event()
        self._flowing.set()
        self._target = str(target / _SOCKET)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / _SOCKET))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def close(self) -> None:
        self.thaw()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait(60)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, Database]]:
    monkeypatch.setattr(postgresql, "REPLY_SECONDS", 0.5)
    monkeypatch.setitem(postgresql._TCP, "connect_timeout", 2)
    address = sa.make_url(new_url("postgresql"))
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        proxy = Proxy(Path(folder), Path(str(address.query["host"])))
        moved = address.update_query_dict({"host": folder})
        database = Database(Path("unused"), moved.render_as_string(hide_password=False))
        try:
            yield proxy, database
        finally:
            proxy.close()
            database.close()


def one(database: Database) -> int:
    with database.reading() as connection:
        return int(connection.execute(sa.text("SELECT 1")).scalar_one())


def test_a_half_open_connection_is_given_up_and_a_new_one_works(
    proxied: tuple[Proxy, Database],
) -> None:
    proxy, database = proxied
    assert one(database) == 1
    proxy.freeze()
    for _ in range(2):  # the pooled connection, then a new one
        refused: list[Refusal] = []

        def attempt(refused: list[Refusal] = refused) -> None:
            with pytest.raises(Refusal) as caught:
                one(database)
            refused.append(caught.value)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(20)
        assert refused, "a half-open connection is waited for without a limit"
        assert refused[0].reason is Reason.STORE_UNAVAILABLE
    proxy.thaw()
    assert one(database) == 1


def test_a_connection_is_given_up_in_the_middle_of_a_transaction(
    proxied: tuple[Proxy, Database],
) -> None:
    proxy, database = proxied

    def transaction() -> None:
        with database.reading() as connection:
            connection.execute(sa.text("SELECT 1"))
            proxy.freeze()
            connection.execute(sa.text("SELECT 2"))

    with pytest.raises(Refusal) as refused:
        transaction()
    assert refused.value.reason is Reason.STORE_UNAVAILABLE
    proxy.thaw()
    assert one(database) == 1


def test_a_change_may_wait_for_others_and_its_connection_is_then_limited_again(
    proxied: tuple[Proxy, Database],
) -> None:
    _, database = proxied
    with database.writing() as connection:
        connection.execute(sa.text("SELECT pg_sleep(1)"))
        limit = connection.execute(sa.text("SHOW statement_timeout")).scalar_one()
    assert limit == "40s"
    with pytest.raises(Refusal), database.reading() as connection:
        connection.execute(sa.text("SELECT pg_sleep(30)"))


def test_parameters_of_the_url_take_precedence_over_the_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, object] = {}

    class Connections:
        @staticmethod
        def connect(**options: object) -> None:
            given.update(options)
            raise psycopg.OperationalError("no server")

    monkeypatch.setattr(postgresql, "_limited_connection", lambda: Connections)
    url = "postgresql+psycopg://localhost/x?keepalives_idle=99"
    with pytest.raises(Refusal):
        one(Database(Path("unused"), url))
    assert given["keepalives_idle"] == "99"
    assert given["connect_timeout"] == postgresql.CONNECT_SECONDS
    assert given["tcp_user_timeout"]
