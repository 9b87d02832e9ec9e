"""Fixtures of the families' tests."""

from __future__ import annotations

import pytest
from families.adapter_bases import Bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """The variants as bases of adapters, each made once."""
    return Bases(tmp_path_factory.mktemp("bases"))
