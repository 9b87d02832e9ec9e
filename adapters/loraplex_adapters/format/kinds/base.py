"""The contract of a kind of adapter: its options, its tensors, and their placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import Option


class Reading(Protocol):
    """The options of a configuration, as far as they determine the content of the weights file."""

    def place(self, file: Placement) -> list[ModuleSpec]:
        """Claims the file's tensors by module; adds a finding for every one that does not fit."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One value of `peft_type`.

    Attributes:
        summary: short description for the support matrix.
        options: every key that PEFT 0.21 writes for this kind, except those of all kinds.
        endings: ends of tensor names after a module's path, with the option that such a tensor
            needs; "" if it needs none.
        read: reads a configuration; returns None if the tensors cannot be placed by it.
        whole_names: whether tensor names have no module's path (virtual tokens).
        shared: whole names of tensors that all modules share, with the option that each needs, as
            for `endings`; they are placed at the site `SHARED`, with their names as endings.
    """

    peft_type: str
    summary: str
    options: Mapping[str, Option]
    endings: Mapping[str, str]
    read: Callable[[Reader], Reading | None]
    whole_names: bool = False
    shared: Mapping[str, str] = field(default_factory=dict)
