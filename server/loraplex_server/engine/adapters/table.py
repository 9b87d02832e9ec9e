"""The table of adapters that the engine sends to the front."""

from __future__ import annotations

from loraplex_server.engine.adapters.fetching import Fetching
from loraplex_server.engine.adapters.host_tier import HostAdapter, HostTier
from loraplex_server.engine.adapters.slots import AdapterSlots, Resident
from loraplex_server.engine.messages import AdapterStatus


def statuses(slots: AdapterSlots, host: HostTier, fetching: Fetching) -> list[AdapterStatus]:
    """Status of every adapter that is on the device, in host memory, being read or staged."""
    rows = [_on_device(resident, host) for resident in slots.residents.values()]
    coming = {ref.digest: ref.path for ref in fetching.coming}
    for held in host.adapters.values():
        if held.digest not in slots.residents:
            state = "loading" if coming.pop(held.digest, None) is not None else "host"
            rows.append(_in_host_memory(held, state, host))
    for digest, path in coming.items():
        if digest not in slots.residents:
            rows.append(AdapterStatus(digest, "loading", 0, 0, path))
    return rows


def _on_device(resident: Resident, host: HostTier) -> AdapterStatus:
    held = host.adapters.get(resident.digest)
    return AdapterStatus(
        digest=resident.digest,
        state="draining" if resident.draining else "resident",
        bytes=resident.nbytes,
        refs=resident.refs,
        path=resident.path,
        host_bytes=host.charge(held) if held else 0,
        merged_bytes=resident.merged_bytes,
        prefix_blocks=len(resident.blocks),
        pinned=resident.pinned,
        last_used=resident.last_used,
        load_seconds=resident.load_seconds,
    )


def _in_host_memory(held: HostAdapter, state: str, host: HostTier) -> AdapterStatus:
    return AdapterStatus(
        digest=held.digest,
        state=state,
        bytes=0,
        refs=0,
        path=held.ref.path,
        host_bytes=host.charge(held),
        last_used=held.last_used,
        load_seconds=held.read_seconds,
    )
