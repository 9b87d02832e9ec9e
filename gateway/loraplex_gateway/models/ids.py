"""Which adapter a model id names.

    id                          means
    base's name, served names   the bare base model
    "name", alias               the adapter's current version, or the alias's
    "name@3", "name@sha256:..." that version, those bytes
    "base:..."                  what follows the colon
    anything else               the adapter with this text as its label `loraplex.dev/model-id`

Ids of the last kind come from programs that name adapters by paths or by hub ids. They are looked
for before a text is read as "base:...".
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from typing import Final

from loraplex import (
    AsyncClient,
    LoraplexError,
    ModelDescription,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from loraplex.sources.foreign_ids import name_of

from loraplex_gateway import errors

FOREIGN_ID: Final = "loraplex.dev/model-id"
"""Label of an adapter whose id in requests is not its name."""

MAX_FOREIGN_ID: Final = 256

_LEGAL: Final = re.compile(
    r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:@(?:[1-9][0-9]{0,9}|sha256:[0-9a-f]{64}))?", re.ASCII
)
_SECONDS: Final = 2.0
"""How long the answer for a foreign id is used again."""

_BASE_SECONDS: Final = 10.0
"""How long the description of the base is used again. A server may be replaced by another."""

_REMEMBERED: Final = 4096


def is_legal(text: str) -> bool:
    """Whether the server takes a text as an adapter's id."""
    return _LEGAL.fullmatch(text) is not None


class ModelIds:
    """Finds adapters by the ids of requests, for one caller at a time."""

    def __init__(self, served_names: tuple[str, ...]) -> None:
        self._served = served_names
        self._base: ModelDescription | None = None
        self._base_until = 0.0
        self._foreign: OrderedDict[tuple[bytes, str], tuple[float, str]] = OrderedDict()

    async def base(self, client: AsyncClient) -> ModelDescription:
        """The base model, as the server described it at most 10 seconds ago. Raises LoraplexError.

        Every caller whom the server knows may ask for it.
        """
        if self._base is None or time.monotonic() > self._base_until:
            self._base = await client.get_model()
            self._base_until = time.monotonic() + _BASE_SECONDS
        return self._base

    def forget(self) -> None:
        """Asks for everything again; for a server that was replaced, and after changes."""
        self._base = None
        self._foreign.clear()

    async def base_id(self, client: AsyncClient) -> str:
        """The id under which the base is listed."""
        return self._served[0] if self._served else (await self.base(client)).name

    async def adapter(self, client: AsyncClient, model: str, key: str = "") -> str:
        """The adapter's id for the server; "" for the base.

        `key` is the caller's, since callers see different adapters. Raises ApiError (404) for an id
        that no adapter can have; whether one has it, the server says when it is asked for it.
        """
        base = (await self.base(client)).name
        if model in self._served or model == base:
            return ""
        if is_legal(model):
            return model
        found = await self._labelled(client, model, key)
        if found:
            return found
        for name in (*self._served, base):
            if name and model.startswith(f"{name}:"):
                rest = model[len(name) + 1 :]
                return await self._after_colon(client, model, rest, key)
        raise errors.not_found(model)

    async def require(self, client: AsyncClient, model: str, adapter: str) -> None:
        """Raises ApiError (404) if there is no such adapter for the caller; "" is the base.

        For calls that do not name it to the server. Who must not look at adapters is not told.
        """
        if not adapter:
            return
        try:
            await client.get_adapter(adapter)
        except NotFound:
            raise errors.not_found(model) from None
        except Unauthenticated:
            raise
        except PermissionDenied:
            return

    async def _after_colon(self, client: AsyncClient, model: str, rest: str, key: str) -> str:
        """The adapter that the part of an id after the base's name means."""
        found = rest if is_legal(rest) else await self._labelled(client, rest, key)
        if not found:
            raise errors.not_found(model)
        return found

    async def _labelled(self, client: AsyncClient, model: str, key: str) -> str:
        """The name of the adapter with a foreign id; "" if the caller sees none."""
        if not model or len(model) > MAX_FOREIGN_ID:
            return ""
        place = hashlib.sha256(key.encode()).digest(), model
        known = self._foreign.get(place)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        try:
            adapters = await client.list_adapters(labels={FOREIGN_ID: model})
        except Unauthenticated:
            raise
        except PermissionDenied:
            return ""  # who must not list adapters knows none by such an id
        except LoraplexError as error:
            if errors.of(error).status == 400:
                return ""  # no label can have this text
            raise
        # Several callers can give their adapters the same id; the one that was registered by the
        # id comes first, so that nobody's label hides it.
        names = [adapter.name for adapter in adapters]
        generated, _ = name_of(model) if model.isprintable() else ("", {})
        found = generated if generated in names else "".join(names[:1])
        if found:  # what is missing may be there a moment later
            self._foreign[place] = time.monotonic() + _SECONDS, found
            self._foreign.move_to_end(place)
            while len(self._foreign) > _REMEMBERED:
                self._foreign.popitem(last=False)
        return found
