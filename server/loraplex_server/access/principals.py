"""Principals: the tenants, people and programs that call the server, and what each may do."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from loraplex_adapters.store import EVERYTHING, NOTHING, LabelSelector

from loraplex_server.access.roles import ALL_ROLES, Role


@dataclass(frozen=True, slots=True)
class PrincipalLimits:
    """What a principal may use of this server; None sets no limit.

    Attributes:
        requests_per_minute: generations that may begin.
        tokens_per_minute: prompt and generated tokens.
        concurrent_requests: generations that run or wait.
        queue_share: part of the server's places for requests, from 0 to 1.
        adapters: adapters that the principal's selector matches.
        store_bytes: bytes of the current versions of these adapters, and of the principal's files
            of examples for training.
        max_priority: highest priority of a request; a higher one counts as this.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    queue_share: float | None = None
    adapters: int | None = None
    store_bytes: int | None = None
    max_priority: int | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller and what it may do.

    Attributes:
        name: identifies it in logs, metrics and the audit log; "" if callers are not identified.
        roles: the groups of calls that it may make.
        adapters: selects the adapters that exist for it; None selects none.
        base: whether it may generate with the base model without an adapter.
        name_prefix: what the names and aliases that it registers must begin with.
        imports: directory below the import root that its paths are relative to and stay in; ""
            for the import root itself, None if it may not name files of the server.
        cache_group: principals with the same value may use each other's prefix cache.
        weight: its share of the engine while others wait, in proportion to theirs.
        limits: what it may use.
        own_copies: whether the engine loads adapters for the cache group alone, so that loads,
            evictions and use by others do not show in the times and states of its adapters.
    """

    name: str
    roles: frozenset[Role] = frozenset()
    adapters: LabelSelector | None = None
    base: bool = True
    name_prefix: str = ""
    imports: str | None = None
    cache_group: str = ""
    weight: float = 1.0
    limits: PrincipalLimits = field(default_factory=PrincipalLimits)
    own_copies: bool = False

    @property
    def seen(self) -> LabelSelector:
        """Selects the adapters that exist for it."""
        return NOTHING if self.adapters is None else self.adapters

    @property
    def sees_all(self) -> bool:
        """Whether all adapters exist for it."""
        return self.adapters is not None and not self.adapters.terms

    def sees(self, labels: Mapping[str, str]) -> bool:
        """Whether an adapter with these labels exists for it."""
        return self.adapters is not None and self.adapters.matches(labels)

    @property
    def owner(self) -> str | None:
        """Whose uploads and training jobs exist for it: its own; None stands for everybody's."""
        return None if self.sees_all else self.name

    @property
    def copies(self) -> str:
        """Whose copies of adapters the engine uses for it; "" for those that callers share."""
        return (self.cache_group or self.name) if self.own_copies else ""


EVERYBODY: Final = Principal(name="", roles=ALL_ROLES, adapters=EVERYTHING, imports="")
"""The caller of every call where callers are not authenticated."""

_CALLER: Final[ContextVar[Principal]] = ContextVar("loraplex_caller")

set_caller = _CALLER.set
"""Sets the caller of the current task; returns a token for `reset_caller`."""

reset_caller = _CALLER.reset
"""Undoes `set_caller`."""


def caller() -> Principal:
    """The principal whose call the current task serves.

    Raises LookupError outside of calls: nothing is allowed by default.
    """
    return _CALLER.get()
