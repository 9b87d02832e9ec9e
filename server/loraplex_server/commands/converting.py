"""Conversion of an adapter's directory before `store import` reads it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.base.info import BaseInfo


@contextmanager
def converted(
    directory: Path,
    base: BaseInfo,
    limits: AdapterLimits,
    rank: int | None,
    alpha: float | None,
    *,
    convert: bool,
) -> Iterator[tuple[Path, Sequence[str]]]:
    """The directory to import, and a line for everything that was converted.

    Without `convert`, or if there is nothing to convert, that is `directory` itself. A converted
    copy is removed at the end. Raises Refusal: as converting and as reading an adapter does.
    """
    if not convert:
        yield directory, ()
        return
    from loraplex_adapters.convert.importers.rewrite import convert as rewrite

    with tempfile.TemporaryDirectory(prefix="loraplex-convert-") as place:
        target = Path(place, "adapter")
        most = limits.max_weights_bytes
        plan = rewrite(directory, target, base, rank=rank, alpha=alpha, max_bytes=most)
        yield (target, plan.lines) if plan.lines else (directory, ("nothing to convert",))
