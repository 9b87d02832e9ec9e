"""Fixtures of the adapters' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Adapters of every kind on tiny bases: a `peft_kinds.Gallery`."""
    from adapters.peft_kinds import Gallery  # PEFT takes seconds to import

    return Gallery(tmp_path_factory.mktemp("kinds"))
