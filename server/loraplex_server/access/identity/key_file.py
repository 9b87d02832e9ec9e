"""The file of keys, which `loraplex-server keys` writes and servers read again when it changes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from loraplex_model.base import durable
from loraplex_model.base.refusal import Reason, Refusal
from pydantic import BaseModel, ConfigDict, ValidationError

from loraplex_server.access.identity import keys
from loraplex_server.access.identity.keys import IssuedKey
from loraplex_server.access.identity.refused import described, unreadable, unusable

_FORBIDDEN: Final = stat.S_IWGRP | stat.S_IRWXO
"""Permissions that the file must not give: who can write it can give himself a key. A group may
read it, since files of secrets are mounted that way for servers that do not run as root."""

_PRIVATE: Final = 0o600


class _Document(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    keys: list[IssuedKey]


def read_keys(path: Path) -> Mapping[str, IssuedKey]:
    """The keys of a file by their ids. Raises FileNotFoundError, and Refusal(CONFIG_INVALID).

    The message of the refusal has every fault of the file, and no hash.
    """
    try:
        data = durable.read_regular(path)
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    if mode & _FORBIDDEN:
        told = f"others than its owner can change or read it (mode {mode:04o}); run chmod 600"
        raise unusable(path, [told])
    try:
        found = _Document.model_validate_json(data).keys
    except ValidationError as error:
        raise unusable(path, described(error)) from error
    known = {key.id: key for key in found}
    if len(known) < len(found):
        twice = sorted({key.id for key in found if known[key.id] is not key})
        raise unusable(path, [f"key {key_id} is there twice" for key_id in twice])
    return MappingProxyType(known)


class KeyFile:
    """A file of keys and the changes to it, which are atomic and never lost to each other."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist. If it is a link, the file that it leads to is changed."""
        self.path = Path(os.path.realpath(path))

    def read(self) -> Mapping[str, IssuedKey]:
        """All keys by id; none if there is no file. Raises Refusal(CONFIG_INVALID)."""
        try:
            return read_keys(self.path)
        except FileNotFoundError:
            return {}

    def add(
        self, principal: str, expires: datetime | None = None, note: str = ""
    ) -> tuple[IssuedKey, str]:
        """Makes a key; returns what is kept of it, and its text. Raises as `_change` does."""
        made: list[tuple[IssuedKey, str]] = []

        def work(known: Mapping[str, IssuedKey]) -> Iterable[IssuedKey]:
            now = datetime.now(UTC).replace(microsecond=0)
            made[:] = [keys.issue(principal, taken=known, now=now, expires=expires, note=note)]
            return [*known.values(), made[0][0]]

        self._change(work)
        return made[0]

    def revoke(self, key_id: str) -> IssuedKey:
        """Revokes a key for good; one that is revoked stays as it is.

        Raises Refusal(FIELD_INVALID) if there is no such key, and as `_change` does.
        """

        def work(known: Mapping[str, IssuedKey]) -> Iterable[IssuedKey]:
            if key_id not in known:
                # The text may be a key with a mistake in it, so it is not repeated.
                message = f"{self.path} has no key with this id"
                raise Refusal(Reason.FIELD_INVALID, message, "key_id")
            now = datetime.now(UTC).replace(microsecond=0)
            revoked = {"revoked": known[key_id].revoked or now}
            return {**known, key_id: known[key_id].model_copy(update=revoked)}.values()

        return self._change(work)[key_id]

    def prune(self, now: datetime, age: timedelta) -> list[IssuedKey]:
        """Removes the keys that expired or were revoked longer than `age` ago; returns them.

        Raises as `_change` does.
        """
        gone: list[IssuedKey] = []

        def work(known: Mapping[str, IssuedKey]) -> Iterable[IssuedKey]:
            gone[:] = [key for key in known.values() if _ended(key, now, age)]
            return [key for key in known.values() if not _ended(key, now, age)]

        self._change(work)
        return gone

    def _change(
        self, work: Callable[[Mapping[str, IssuedKey]], Iterable[IssuedKey]]
    ) -> Mapping[str, IssuedKey]:
        """Replaces the keys by those that `work` makes of them, while no other process does.

        Returns the new keys, which are on the disk. Raises Refusal(CONFIG_INVALID) if the file
        cannot be used, and lets OSError through if it cannot be written.
        """
        durable.make_directory(self.path.parent)
        lock = self.path.with_name(f"{self.path.name}.lock")
        with durable.locked(lock, _PRIVATE):
            self._require_owner()
            document = _Document(version=1, keys=list(work(self.read())))
            data = document.model_dump_json(indent=1).encode() + b"\n"
            durable.write_atomically(self.path, data, _PRIVATE)
            durable.flush(self.path.parent)
        return {key.id: key for key in document.keys}

    def _require_owner(self) -> None:
        """Refuses to replace the file of another user, whose server could not read it then."""
        try:
            owner = self.path.stat().st_uid
        except FileNotFoundError:
            return
        if owner != os.geteuid():
            raise unusable(
                self.path, [f"belongs to the user with id {owner}; run the command as that user"]
            )


def _ended(key: IssuedKey, now: datetime, age: timedelta) -> bool:
    end = key.revoked or key.expires
    return end is not None and now - end > age
