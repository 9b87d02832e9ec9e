"""A new directory that is there as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_model.base.durable import flush
from loraplex_model.base.refusal import Reason, Refusal

OURS = ("config.json", "adapter_config.json", "adapter.gguf")
"""What an earlier export holds one of. `force` replaces no other directory, unless it is empty."""


@contextmanager
def staged(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A path beside `out` for the context to make a directory of, which then becomes `out`.

    Everything in it is brought to the disk before its name is; an exception removes it. With
    `force` an earlier export at `out` is moved aside first, and removed in the end: a crash between
    the two renames leaves it beside `out`, under a name that begins with a dot.
    Raises Refusal: EXPORT_EXISTS (field "out"), EXPORT_FAILED where the disk does not do its
    part.
    """
    out = Path(os.path.abspath(out))
    _check_free(out, force)
    fresh = out.parent / f".{out.name}.{uuid.uuid4().hex}.new"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        _sync_tree(fresh)
        _publish(fresh, out, force)
    except OSError as error:
        message = f"{out} cannot be written: {error.strerror or error}"
        raise Refusal(Reason.EXPORT_FAILED, message, "out") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_free(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        message = f"{out} exists; choose another directory, or replace it with --force"
        raise Refusal(Reason.EXPORT_EXISTS, message, "out")
    if out.is_symlink() or not out.is_dir():
        raise Refusal(Reason.EXPORT_EXISTS, f"{out} is no directory, so it stays", "out")
    held = {entry.name for entry in out.iterdir()}
    if held and held.isdisjoint(OURS):
        message = f"{out} holds no earlier export, so it stays even with --force"
        raise Refusal(Reason.EXPORT_EXISTS, message, "out")


def _publish(fresh: Path, out: Path, force: bool) -> None:
    if force and out.exists():
        old = out.parent / f".{out.name}.{uuid.uuid4().hex}.old"
        out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            old.rename(out)
            raise
        flush(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        fresh.rename(out)  # fails where a directory with something in it has appeared
        flush(out.parent)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        flush(path)
    flush(directory)
