"""Tasks whose examples are generated from a seed, without a data file or anybody's real words.

    python -m examples.tasks contacts --count 240 --seed 1 --out train.jsonl
    python -m examples.tasks contacts --count 60 --held-out --out held_out.jsonl

Held-out rows never occur in training data, whatever the seeds: their combinations of words are
reserved, and half of them contain words that training data never has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from . import contacts, routing


class Rows(Protocol):
    """Makes `count` different rows of {"prompt", "completion"}. Equal seeds give equal rows."""

    def __call__(self, count: int, seed: int, held_out: bool = False) -> list[dict[str, str]]: ...


TASKS: Final[Mapping[str, Rows]] = {"contacts": contacts.rows, "routing": routing.rows}


def write(task: str, path: Path, count: int, seed: int, held_out: bool = False) -> Path:
    """Writes rows of a task as JSONL. Equal arguments give equal bytes."""
    rows = TASKS[task](count, seed, held_out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return path
