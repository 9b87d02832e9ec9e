"""A checked copy of an adapter, which a change of the index then puts into the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.files import Directory
from loraplex_adapters.format.spec import AdapterLimits, CheckedAdapter
from loraplex_adapters.store.files.blobs import Blobs

Approval: TypeAlias = Callable[[Path], tuple[str, ...]]
"""A further check of the copy of an adapter's files, such as that of its signature.

It raises Refusal, or returns notes for the adapter's owner.
"""


@dataclass(frozen=True, slots=True)
class Staged:
    """A checked copy, and what puts it into the store within a change of the index."""

    spec: CheckedAdapter
    place: Callable[[], bool]
    notes: tuple[str, ...]


@contextmanager
def staged(
    blobs: Blobs,
    source: Directory,
    base: BaseInfo,
    limits: AdapterLimits,
    expected_digest: str,
    approve: Approval | None,
) -> Iterator[Staged]:
    """A checked copy of an adapter, which is removed at the end unless it was placed.

    Raises Refusal: ADAPTER_INVALID (field "digest": the digest is not `expected_digest`, which is
    "" for any), as `inspect` does, and as `approve` does.
    """
    with blobs.staged(source, limits.max_weights_bytes) as copy:
        spec = inspect(copy, base, limits)
        if expected_digest not in ("", spec.digest):
            message = f"the digest is {spec.digest}, not {expected_digest}"
            raise Refusal(Reason.ADAPTER_INVALID, message, "digest")
        notes = approve(copy) if approve is not None else ()
        # Read here and not in the change of the index, which excludes all other changes.
        damaged = blobs.damaged(spec.digest)
        yield Staged(spec, partial(blobs.place, copy, spec.digest, damaged), notes)
