"""The contract of a kind of adapter: what it reads, which tensors it may hold, where they go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import Option


class Plan(Protocol):
    """A configuration that was understood: what to expect of the weights file."""

    def place(self, file: Placement) -> list[ModuleSpec]:
        """Claims the file's tensors, module by module; what does not fit becomes a finding."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One value of `peft_type`.

    Attributes:
        summary: what it does, for the support matrix.
        options: every key that PEFT 0.21 writes for it, except those that all kinds have.
        endings: what may follow a module's path in the name of a tensor, and the option that such
            a tensor needs ("" where it needs none).
        read: the plan, or None where the configuration is too broken to hold the tensors against.
        whole_names: whether tensors are named without a module's path (virtual tokens).
    """

    peft_type: str
    summary: str
    options: Mapping[str, Option]
    endings: Mapping[str, str]
    read: Callable[[Reader], Plan | None]
    whole_names: bool = False
