"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest
from engine import driving

PACES = ["lock-step", "ahead"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs tests that use `pace` at both paces, and those marked `lock_step` at one."""
    if "pace" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("lock_step") is None
        metafunc.parametrize("pace", PACES if both else PACES[:1], indirect=True)


@pytest.fixture
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engines of a test compute pass after pass, or launch one pass ahead."""
    monkeypatch.setattr(driving.Engine, "is_ahead", request.param == "ahead")
    return str(request.param)
