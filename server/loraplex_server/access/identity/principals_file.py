"""The file of principals: its form, and everything that can be wrong with it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, Final

from loraplex_adapters.store import LabelSelector
from loraplex_model.base.durable import read_regular
from loraplex_model.base.refusal import Refusal
from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, ValidationError

from loraplex_server.access.identity.refused import described, unreadable, unusable
from loraplex_server.access.principals import Principal, PrincipalLimits
from loraplex_server.access.roles import Role
from loraplex_server.engine.batching.fair_queue import MAX_PRIORITY
from loraplex_server.fair_weights import MOST

ALL: Final = frozenset({"", "*"})
"""Values of `adapters` that select every adapter."""

_MAX_NAME: Final = 63
_MAX_IDENTITY: Final = 1024
_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_NAME_RULE: Final = (
    f"has 1 to {_MAX_NAME} characters of a-z, 0-9, -, _ and ., and begins with a letter or a digit"
)
_CHANGING: Final = frozenset({Role.REGISTER, Role.TRAIN})
"""Roles that make adapters."""


@dataclass(frozen=True, slots=True)
class KnownPrincipals:
    """The principals of a file.

    Attributes:
        by_name: every principal by its name.
        certificates: principals by the names of their client certificates.
        subjects: principals by the subjects (claim `sub`) of their tokens.
    """

    by_name: Mapping[str, Principal]
    certificates: Mapping[str, Principal]
    subjects: Mapping[str, Principal]


def read_principals(path: Path) -> KnownPrincipals:
    """The principals of a TOML file.

    Raises Refusal(CONFIG_INVALID), whose message has every fault of the file.
    """
    try:
        document = tomllib.loads(read_regular(path).decode())
    except OSError as error:
        raise unreadable(path, error) from error
    # Numbers of thousands of digits and deep tables raise other errors than TOMLDecodeError.
    except (ValueError, RecursionError) as error:
        raise unusable(path, [f"is not TOML: {error}"]) from error
    faults = [f"{key}: there is no such key" for key in document if key != "principals"]
    tables = document.get("principals")
    if not (isinstance(tables, dict) and tables):
        raise unusable(path, [*faults, "there is no table [principals.NAME]"])
    entries: dict[str, _Entry] = {}
    for name, table in tables.items():
        entry, wrong = _read(name, table)
        faults += wrong
        if entry is not None:
            entries[name] = entry
    principals = {name: entry.principal(name) for name, entry in entries.items()}
    certificates: dict[str, Principal] = {}
    subjects: dict[str, Principal] = {}
    for name, entry in entries.items():
        faults += _assign(certificates, principals[name], entry.certificates, "certificates")
        faults += _assign(subjects, principals[name], entry.subjects, "subjects")
    faults += _incoherent(principals)
    if faults:
        raise unusable(path, faults)
    return KnownPrincipals(
        MappingProxyType(principals), MappingProxyType(certificates), MappingProxyType(subjects)
    )


def check_principal_name(text: str) -> str:
    """Returns the name of a principal; raises ValueError with the rule for such names."""
    well_formed = text[:1] in _LETTERS and set(text) <= _LETTERS | set("-_.")
    if not (text and well_formed and len(text) <= _MAX_NAME):
        raise ValueError(_NAME_RULE)
    return text


def _group(text: str) -> str:
    return check_principal_name(text) if text else text


def _prefix(text: str) -> str:
    if text and not (text[0] in _LETTERS and set(text) <= _LETTERS | {"-"}):
        raise ValueError("is how names of adapters begin: a-z, 0-9 and -, and no - at first")
    return text


def _selector(text: str) -> str:
    if text not in ALL:
        try:
            LabelSelector.parse(text)
        except Refusal as refusal:
            raise ValueError(f"is no label selector: {refusal.message}") from None
    return text


def _directory(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not text.isprintable():
        raise ValueError("is a directory below the import root, relative to it and without ..")
    return text


def _identity(text: str) -> str:
    if not text or len(text) > _MAX_IDENTITY or not text.isprintable():
        raise ValueError(f"has 1 to {_MAX_IDENTITY} characters, all of them printable")
    return text


_Count = Annotated[int, Field(gt=0, le=1 << 53)]
_Identities = list[Annotated[str, AfterValidator(_identity)]]


class _Limits(BaseModel):
    """The table `limits` of a principal."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    concurrent_requests: _Count | None = None
    queue_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    adapters: _Count | None = None
    store_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    max_priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None


class _Entry(BaseModel):
    """The table of a principal."""

    model_config = ConfigDict(extra="forbid", strict=True)

    roles: list[Annotated[Role, Field(strict=False)]]
    adapters: Annotated[str, AfterValidator(_selector)] | None = None
    base: bool = True
    name_prefix: Annotated[str, Field(max_length=_MAX_NAME - 1), AfterValidator(_prefix)] = ""
    imports: Annotated[str, AfterValidator(_directory)] | None = None
    cache_group: Annotated[str, AfterValidator(_group)] = ""
    own_copies: bool = False
    weight: Annotated[float, Field(ge=1 / MOST, le=MOST, allow_inf_nan=False)] = 1.0
    certificates: _Identities = []
    subjects: _Identities = []
    limits: _Limits = _Limits()

    def principal(self, name: str) -> Principal:
        """The principal of this name."""
        adapters, imports = self.adapters, self.imports
        if adapters is not None:
            adapters = "" if adapters in ALL else adapters
        return Principal(
            name=name,
            roles=frozenset(self.roles),
            adapters=None if adapters is None else LabelSelector.parse(adapters),
            base=self.base,
            name_prefix=self.name_prefix,
            imports=None if imports is None else "/".join(PurePosixPath(imports).parts),
            cache_group=self.cache_group or name,
            own_copies=self.own_copies,
            weight=float(self.weight),
            limits=PrincipalLimits(**dict(self.limits)),
        )


def _read(name: str, table: Any) -> tuple[_Entry | None, list[str]]:
    """The table of a principal, None if it cannot be read, and everything wrong with it."""
    try:
        check_principal_name(name)
        wrong, place = [], f"principals.{name}"
    except ValueError as error:
        wrong, place = [f"principals.{name!r}: the name of a principal {error}"], "principals.…"
    try:
        return _Entry.model_validate(table), wrong
    except ValidationError as error:
        return None, [*wrong, *described(error, place)]


def _assign(
    owners: dict[str, Principal], principal: Principal, names: list[str], key: str
) -> Iterator[str]:
    """Makes a principal the owner of names; yields a fault for each that has another owner."""
    for name in names:
        owner = owners.setdefault(name, principal)
        if owner.name != principal.name:
            yield f"principals.{principal.name}.{key}: {name!r} belongs to {owner.name} already"


def _incoherent(principals: Mapping[str, Principal]) -> Iterator[str]:
    """Yields what is wrong with the names that principals may give to adapters.

    Otherwise a principal could learn which adapters of others exist, by registering their names.
    """
    making = [p for p in principals.values() if p.roles & _CHANGING and not p.sees_all]
    for principal in making:
        place = f"principals.{principal.name}"
        if principal.adapters is None:
            yield (
                f"{place}.adapters: is missing; with the role register or train it has to say "
                "which adapters the principal sees"
            )
        if not principal.name_prefix:
            yield (
                f"{place}.name_prefix: is missing; a principal with the role register or train "
                'that does not see all adapters (adapters = "*") needs one'
            )
    ordered = sorted((p for p in making if p.name_prefix), key=lambda p: p.name_prefix)
    for index, short in enumerate(ordered):
        for long in ordered[index + 1 :]:  # those that begin alike follow directly
            if not long.name_prefix.startswith(short.name_prefix):
                break
            if short.adapters != long.adapters:  # otherwise both see the same adapters
                yield (
                    f"principals.{long.name}.name_prefix: {long.name_prefix!r} begins with "
                    f"{short.name_prefix!r}, which is the name_prefix of {short.name}"
                )
