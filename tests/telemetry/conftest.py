"""Engine processes must find the oracle."""

from __future__ import annotations

from rpc.conftest import _engine_finds_the_oracle

__all__ = ["_engine_finds_the_oracle"]
