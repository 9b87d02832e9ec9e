"""Calls on behalf of a principal, without credentials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from loraplex_adapters.store import LabelSelector
from loraplex_server.access.principals import EVERYBODY, Principal, PrincipalLimits, set_caller
from loraplex_server.access.roles import ALL_ROLES
from loraplex_server.rpc.calls import call


@dataclass
class Acting:
    """Makes the server take calls that begin now for those of `principal`."""

    principal: Principal = field(default=EVERYBODY)

    @contextmanager
    def as_(self, principal: Principal) -> Iterator[None]:
        before, self.principal = self.principal, principal
        try:
            yield
        finally:
            self.principal = before


def acting(patch: pytest.MonkeyPatch) -> Acting:
    """Replaces how the server finds out who calls."""
    who = Acting()
    patch.setattr(call, "set_caller", lambda _: set_caller(who.principal))
    return who


def limited(
    name: str = "search",
    *,
    weight: float = 1.0,
    seen: str = "",
    prefix: str = "",
    **limits: Any,
) -> Principal:
    """A principal with all roles."""
    return Principal(
        name,
        roles=ALL_ROLES,
        adapters=LabelSelector.parse(seen),
        name_prefix=prefix,
        imports="",
        cache_group=name,
        weight=weight,
        limits=PrincipalLimits(**limits),
    )
