"""A hub is asked for a base model when the server starts, and never again.

The first engine process may fetch the model. Engines that are started again, and trainers, find its
files in the hub's cache, and must not ask: the server opens no connection of its own once it is
ready, and a model that changed at the hub meanwhile would be another base.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

OFFLINE: Final[Mapping[str, str]] = MappingProxyType({"HF_HUB_OFFLINE": "1"})
"""Variables with which a process finds what is in the hub's cache, and asks no hub."""
