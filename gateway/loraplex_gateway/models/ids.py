"""Which adapter a model id names.

    id                          means
    base's name, served names   the bare base model
    "name", alias               the adapter's current version, or the alias's
    "name@3", "name@sha256:..." that version, those bytes
    "base:..."                  what follows the colon
    anything else               the adapter with this text as its label `loraplex.dev/model-id`

Ids of the last kind come from programs that name adapters by paths or by hub ids. What is both is
read as the label.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from typing import Final

from loraplex import AsyncClient, LoraplexError, ModelDescription

from loraplex_gateway import errors

FOREIGN_ID: Final = "loraplex.dev/model-id"
"""Label of an adapter whose id in requests is not its name."""

_LEGAL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:@(?:\d{1,9}|sha256:[0-9a-f]{64}))?")
_SECONDS: Final = 2.0
"""How long the answer for a foreign id is used again."""
_REMEMBERED: Final = 4096


def is_legal(text: str) -> bool:
    """Whether the server takes a text as an adapter's id."""
    return _LEGAL.fullmatch(text) is not None


class ModelIds:
    """Finds adapters by the ids of requests, for one caller at a time."""

    def __init__(self, served_names: tuple[str, ...]) -> None:
        self._served = served_names
        self._base: ModelDescription | None = None
        self._foreign: OrderedDict[tuple[bytes, str], tuple[float, str]] = OrderedDict()

    async def base(self, client: AsyncClient) -> ModelDescription:
        """The base model; asked for once, since a server has the same one until it ends."""
        if self._base is None:
            self._base = await client.get_model()
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

        `key` is the caller's, since callers see different adapters. Raises ApiError (404).
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
            if model.startswith(f"{name}:"):
                rest = model[len(name) + 1 :]
                return "" if not rest else await self.adapter(client, rest, key)
        raise errors.not_found(model)

    async def _labelled(self, client: AsyncClient, model: str, key: str) -> str:
        """The name of the adapter with a foreign id; "" if there is none."""
        if not model or len(model) > 256:
            return ""
        place = hashlib.sha256(key.encode()).digest(), model
        known = self._foreign.get(place)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        try:
            adapters = await client.list_adapters(labels={FOREIGN_ID: model})
        except LoraplexError as error:
            raise errors.of(error) from None
        found = adapters[0].name if adapters else ""
        if found:  # what is missing may be there a moment later
            self._foreign[place] = time.monotonic() + _SECONDS, found
            self._foreign.move_to_end(place)
            while len(self._foreign) > _REMEMBERED:
                self._foreign.popitem(last=False)
        return found
