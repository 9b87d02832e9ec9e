"""Inputs of users' kinds against real servers and command lines; `make test-field` runs them."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--field"):
        for item in items:
            if "field" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="field: runs with --field"))
