from __future__ import annotations

from collections.abc import Iterator

import pytest
from client.fake_server import FakeServer
from loraplex import Client


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, timeout=30.0) as connected:
        yield connected
