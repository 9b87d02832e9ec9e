"""The kernels compiled with sanitizers, for `make test-sanitized` (scripts/sanitized.py)."""

from __future__ import annotations

import os

from loraplex_model.ops import build

FLAGS = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
"""Every read or write outside of an object, and all undefined behaviour, ends the process."""


def isa() -> str:
    """The instruction set under test: LORAPLEX_ISA, or the best of this machine."""
    return os.environ.get("LORAPLEX_ISA") or build.supported_isas()[0]


def use() -> None:
    """Lets this process use the sanitized kernels wherever it asks for kernels of the same set."""
    build._loaded[isa(), ()] = build.load(isa(), FLAGS)
