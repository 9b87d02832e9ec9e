"""Receives uploads: an adapter's files in pieces, over streams that may break and be resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

from loraplex.v1 import adapter_pb2
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.format.foreign.notes import folder_notes
from loraplex_adapters.store import Allotment, VersionText
from loraplex_model.base.refusal import Problem, Reason, Refusal, Subject

from loraplex_server.access.principals import Principal
from loraplex_server.access.rules import labels_of_new, require_name
from loraplex_server.registry.registry import Registry
from loraplex_server.registry.terms import Registered, RegistrationTerms
from loraplex_server.rpc.calls.arriving import SILENCE_SECONDS, messages
from loraplex_server.rpc.calls.errors import invalid, require
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.messages import validate_adapters as validate
from loraplex_server.rpc.services.upload_room import UploadRoom

MAX_STREAMS: Final = 16
"""Most uploads that may send at the same time; each holds one chunk in memory."""

MAX_STREAMS_PER_PEER: Final = 8
"""Most uploads of one peer that may send at the same time: of a principal or, where callers are not
authenticated, of an address. All clients behind a proxy have one address, so this is half of
`MAX_STREAMS`."""

_DRAINING: Final = "the server is shutting down; what has arrived is kept"
_SILENCE: Final = f"nothing arrived for {SILENCE_SECONDS:g} s; what has arrived before is kept"

FILES: Final = {
    adapter_pb2.ADAPTER_FILE_CONFIG: CONFIG_FILE,
    adapter_pb2.ADAPTER_FILE_WEIGHTS: WEIGHTS_FILE,
}


@dataclass(frozen=True, slots=True)
class UploadOutcome:
    """An adapter that was uploaded, whether the version is new, and notes for the client."""

    adapter: Registered
    created: bool
    notes: Sequence[str]


class UploadReceiver:
    """Receives uploads. Each chunk is on disk before the next one is read from the stream."""

    def __init__(self, registry: Registry, gate: CallGate) -> None:
        self._registry = registry
        self._gate = gate
        self._streams: Counter[str] = Counter()
        self._room = UploadRoom(registry)

    async def receive(
        self,
        requests: AsyncIterator[adapter_pb2.UploadAdapterRequest],
        address: str,
        principal: Principal,
    ) -> UploadOutcome | None:
        """Receives one stream of a client at an address.

        If it completes an upload that is not staged, the adapter is registered.

        Returns None if the files were only staged.
        Raises Refusal. The bytes that had arrived are kept, and the upload can be resumed.
        """
        peer = principal.name or address
        running, own = self._streams.total(), self._streams[peer]
        if running >= MAX_STREAMS or own >= MAX_STREAMS_PER_PEER:
            text = f"{running} uploads are running, {own} of them from {peer}; try again later"
            raise Refusal(Reason.OVERLOADED, text)
        self._streams[peer] += 1
        try:
            async with aclosing(messages(requests, self._gate, _DRAINING, _SILENCE)) as arriving:
                return await self._receive(arriving, principal)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _receive(
        self, requests: AsyncIterator[adapter_pb2.UploadAdapterRequest], principal: Principal
    ) -> UploadOutcome | None:
        header = await self._header(requests)
        terms = None if header.stage_only else _terms(header, principal)
        size = header.weights_size  # what `store_bytes` counts
        await self._require_room(header, terms, size, principal)
        with self._room.sending(header.upload_id, size):
            await self._receive_files(header, requests, principal)
        if terms is None:
            return None
        allotment = await self._room.allotment(principal, header.upload_id)
        terms = replace(terms, allotment=allotment)
        owner = principal.owner
        adapter, created = await self._registry.finish_upload(header.upload_id, terms, owner)
        notes = folder_notes(header.other_files, has_template=bool(terms.text.chat_template))
        return UploadOutcome(adapter, created, [*notes, *adapter.record.notes])

    async def allotment(self, principal: Principal) -> Allotment | None:
        """What a principal may have in the store, with the bytes of its unfinished uploads."""
        return await self._room.allotment(principal)

    async def require_begin(self, principal: Principal) -> None:
        """Raises Refusal(QUOTA_EXCEEDED) if a principal can have no more in the store."""
        await self._room.require_any(principal)

    async def _require_room(
        self,
        header: adapter_pb2.UploadHeader,
        terms: RegistrationTerms | None,
        size: int,
        principal: Principal,
    ) -> None:
        """Raises Refusal(QUOTA_EXCEEDED) for files that could not be registered."""
        if terms is None:
            await self._room.require_any(principal, size, header.upload_id)
        else:
            labels = terms.labels or {}
            await self._room.require(principal, header.upload_id, terms.name, labels, size)

    async def _receive_files(
        self,
        header: adapter_pb2.UploadHeader,
        requests: AsyncIterator[adapter_pb2.UploadAdapterRequest],
        principal: Principal,
    ) -> None:
        """Receives the rest of both files. Raises Refusal."""
        store, lane = self._registry.store, self._registry.lanes.uploads
        wanted = {CONFIG_FILE: header.config_size, WEIGHTS_FILE: header.weights_size}
        owner = principal.owner
        there = await lane.run(store.uploads.state, header.upload_id, owner)
        sizes = {CONFIG_FILE: there.config_bytes, WEIGHTS_FILE: there.weights_bytes}
        async for request in requests:
            if request.WhichOneof("part") != "chunk":
                raise invalid([Problem("part", "every message after the first must be a chunk")])
            chunk = request.chunk
            require(validate.chunk(chunk))
            file = FILES[chunk.file]
            end = chunk.offset + len(chunk.data)
            if end > wanted[file]:
                text = f"{file} was announced with {wanted[file]} bytes; this piece ends at {end}"
                raise _offset(header.upload_id, file, text)
            sizes[file] = await lane.run(
                store.uploads.append, header.upload_id, file, chunk.offset, chunk.data, owner
            )
        for file, size in wanted.items():
            if sizes[file] != size:
                text = f"{sizes[file]} of the {size} bytes of {file} have arrived"
                raise _offset(header.upload_id, file, text)

    async def _header(
        self, requests: AsyncIterator[adapter_pb2.UploadAdapterRequest]
    ) -> adapter_pb2.UploadHeader:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise invalid([Problem("header", "the first message must be the header")])
        require(validate.header(first.header, self._registry.max_weights_bytes))
        return first.header


def _terms(header: adapter_pb2.UploadHeader, principal: Principal) -> RegistrationTerms:
    """What a header orders. Raises Refusal(PERMISSION_DENIED) before anything is sent."""
    require_name(principal, header.name)
    return RegistrationTerms(
        header.name,
        header.replace,
        labels_of_new(principal, header.labels),
        header.expected_digest,
        header.load,
        VersionText.of(header.chat_template, header.eos_token_ids),
        principal.seen,
        principal.copies,
        signature=header.signature,
    )


def _offset(upload_id: str, file: str, text: str) -> Refusal:
    subject = Subject("loraplex.v1.Upload", upload_id)
    return Refusal(Reason.UPLOAD_OFFSET, text, problems=[Problem(file, text)], subject=subject)
