"""The room that principals have in the store for uploads, beside those that are unfinished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from loraplex_adapters.store import Allotment, Holding

from loraplex_server.access.limits.allotting import allotment_of
from loraplex_server.access.principals import Principal
from loraplex_server.registry.registry import Registry


class UploadRoom:
    """Early refusals of uploads that could not be registered, before their bytes are sent.

    An upload counts with the bytes of weights that have arrived or, while it is sent, that were
    announced. Files of examples for training count as well.
    The methods raise Refusal(QUOTA_EXCEEDED). Principals without limits in the store cost nothing.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._sending: dict[object, tuple[str, int]] = {}

    async def allotment(
        self, principal: Principal, without: str = "", data_bytes: int | None = None
    ) -> Allotment | None:
        """What a principal may have, beside its unfinished uploads other than `without`.

        `data_bytes` are those of its files of examples; None asks for them.
        """
        if allotment_of(principal) is None:
            return None
        lane, uploads = self._registry.lanes.uploads, self._registry.store.uploads
        found = await lane.run(uploads.all, principal.owner)
        arriving = sum(
            max(self._announced(upload.id), upload.weights_bytes)
            for upload in found
            if upload.id != without
        )
        if data_bytes is None:
            data_bytes = self._registry.data_bytes(principal.name)
        return allotment_of(principal, arriving, data_bytes)

    async def require_any(
        self,
        principal: Principal,
        size: int = 1,
        without: str = "",
        data_bytes: int | None = None,
    ) -> None:
        """Refuses an upload of `size` bytes or more whose name is not known yet."""
        allotment = await self.allotment(principal, without, data_bytes)
        if allotment is not None:
            there = await self._registry.read(self._registry.store.allotments.held, allotment)
            allotment.require(there, Holding(there.adapters, there.nbytes + size))

    async def require(
        self,
        principal: Principal,
        upload_id: str,
        name: str,
        labels: Mapping[str, str],
        size: int,
    ) -> None:
        """Refuses an upload of `size` bytes that is to become a version of `name`."""
        allotment = await self.allotment(principal, upload_id)
        if allotment is not None:
            allowed = self._registry.store.allotments.require
            await self._registry.read(allowed, allotment, name, labels, size)

    @contextmanager
    def sending(self, upload_id: str, size: int) -> Iterator[None]:
        """Counts an upload with its announced size within the context."""
        stream = object()
        self._sending[stream] = upload_id, size
        try:
            yield
        finally:
            del self._sending[stream]

    def _announced(self, upload_id: str) -> int:
        return max((size for sent, size in self._sending.values() if sent == upload_id), default=0)
