"""Takes host memory back from the engines of a server while memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraplex_server.engine.group.face import EngineMember
from loraplex_server.engine.process.client import EngineClient


class HostShedding:
    """Limits what the engines keep in host memory: adapters that no request needs now.

    `members` returns the engines.
    """

    def __init__(self, members: Callable[[], Sequence[EngineMember]]) -> None:
        self._members = members

    def limit_host_memory(self, fewer: int | None) -> None:
        """Evicts adapters from host memory until they take `fewer` bytes less than now.

        They stay below that until a later call. None lifts the limits of earlier calls. Several
        engines give back in proportion to what they hold.
        """
        clients = [member.client for member in self._members()]
        held = sum(map(_held, clients))
        for client in clients:
            if fewer is None:
                client.limit_host(None)
            else:
                share = _held(client) / held if held else 0.0
                client.limit_host(max(0, _held(client) - round(fewer * share)))


def _held(client: EngineClient) -> int:
    return 0 if client.stats is None else client.stats.host_bytes
