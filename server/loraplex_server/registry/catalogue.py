"""What the store has, as one value: current versions by name and versions by alias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loraplex_adapters.store import LabelSelector, Record, Store
from loraplex_model.base.refusal import Reason, Refusal


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Content of the store: current versions by name, versions by alias, and the change count."""

    names: Mapping[str, Record] = field(default_factory=dict)
    aliases: Mapping[str, Record] = field(default_factory=dict)
    count: int = -1

    def within(self, seen: LabelSelector) -> Catalogue:
        """The part whose versions `seen` selects."""
        if not seen.terms:
            return self
        names, aliases = (
            {name: record for name, record in found.items() if seen.matches(record.labels)}
            for found in (self.names, self.aliases)
        )
        return Catalogue(names, aliases, self.count)


def read_catalogue(store: Store) -> Catalogue:
    """Reads everything. Blocks; raises Refusal if the store fails."""
    # The count is read first: a change during the reading is then noticed the next time.
    count = store.change_counter()
    names = {record.name: record for record in store.current()}
    return Catalogue(names, dict(_pointed(store, names)), count)


def _pointed(store: Store, names: Mapping[str, Record]) -> Iterator[tuple[str, Record]]:
    """Every alias and its version, except aliases of deleted versions."""
    for alias in store.aliases():
        record = names.get(alias.name)
        if record is None or record.version != alias.version:
            try:
                record = store.get(alias.name, alias.version)
            except Refusal as error:
                if error.reason is not Reason.ADAPTER_NOT_FOUND:
                    raise
                continue
        yield alias.alias, record
