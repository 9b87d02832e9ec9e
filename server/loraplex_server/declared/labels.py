"""Labels of the adapters in a watched directory.

Labels decide which principals see an adapter, so whoever may only write files must not choose them.
The operator gives labels to all adapters of the directory, and may name keys that a folder's file
`loraplex-labels.json` sets, a JSON object of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from loraplex_adapters.store.index.labels import MAX_LABELS, check_labels
from loraplex_model.base.refusal import Refusal

from loraplex_server.registry.sources import Source

LABELS_FILE: Final = "loraplex-labels.json"
"""Name of the file in an adapter's folder."""

_MAX_BYTES: Final = 64 << 10
_MOST_FILES: Final = 1000
_OURS: Final = "loraplex.dev/"
"""Begins the keys of labels that the server sets itself."""


@dataclass(frozen=True, slots=True)
class DirectoryLabels:
    """The labels of a directory's adapters.

    Attributes:
        given: labels of all of them; a folder cannot change these.
        own: keys of the labels that a folder may have of its own.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    own: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raises ValueError for labels and keys that no adapter can have."""
        for name, labels in (
            ("adapter_directory_labels", self.given),
            ("adapter_directory_own_labels", dict.fromkeys(self.own, "")),
        ):
            try:
                check_labels(labels)
            except Refusal as refusal:
                raise ValueError(f"{name}: {refusal.message}") from None
            if ours := sorted(key for key in labels if key.startswith(_OURS)):
                raise ValueError(f"{name}: {ours[0]} is a label that the server sets itself")
        if both := sorted(self.own & self.given.keys()):
            text = "is set for all folders by adapter_directory_labels"
            raise ValueError(f"adapter_directory_own_labels: {both[0]} {text}")

    def read(self, source: Source) -> dict[str, str]:
        """The labels of the adapter in a folder. Raises ValueError for a file that is wrong, and
        Refusal if the folder cannot be read."""
        with source() as folder:
            if LABELS_FILE not in folder.names(_MOST_FILES):
                return dict(self.given)
            with folder.open(LABELS_FILE, _MAX_BYTES) as file:
                content = file.read(0, file.size)
        try:
            found = msgspec.json.decode(content, type=dict[str, str])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            text = f"{LABELS_FILE} must be a JSON object of texts, at most {MAX_LABELS}"
            raise ValueError(text) from None
        if foreign := sorted(found.keys() - self.own):
            text = "which adapter_directory_own_labels does not leave to folders"
            raise ValueError(f"{LABELS_FILE} sets the label {foreign[0][:64]!r}, {text}")
        try:
            return check_labels({**found, **self.given})
        except Refusal as refusal:
            raise ValueError(f"{LABELS_FILE}: {refusal.message}") from None


NO_LABELS: Final = DirectoryLabels()
"""For a directory whose adapters get no labels."""
