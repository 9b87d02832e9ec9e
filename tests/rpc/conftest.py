"""Engine processes must find the oracle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import outbound

TESTS = str(Path(__file__).resolve().parents[1])


@pytest.fixture(scope="session", autouse=True)
def _engine_finds_the_oracle() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module", autouse=True)
def _nobody_is_reached() -> Iterator[None]:
    """The front process connects to no other machine in any of these tests."""
    with outbound.watched() as found:
        yield
    assert found == []
