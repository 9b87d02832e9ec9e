"""New directories that appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loraplex_model.base.durable import flush, make_directory
from loraplex_model.base.refusal import Reason, Refusal

OURS = ("config.json", "adapter_config.json", "adapter.gguf")
"""Files by which an earlier export is recognised: `force` replaces no other non-empty directory."""


@contextmanager
def staged(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a path next to `out`; the directory that the block creates there then becomes `out`.

    Its content is flushed to disk before it is renamed; an exception removes it. With `force` an
    earlier export at `out` is moved aside first and removed at the end; a crash between the two
    renames leaves it next to `out`, under a name that begins with a dot.
    Raises Refusal: EXPORT_EXISTS (field "out"), EXPORT_FAILED if the disk fails.
    """
    out = Path(os.path.abspath(out))
    _check_free(out, force)
    fresh = out.parent / f".{out.name}.{uuid.uuid4().hex}.new"
    try:
        make_directory(out.parent)
        yield fresh
        _sync_tree(fresh)
        _publish(fresh, out, force)
    except OSError as error:
        message = f"{out} cannot be written: {error.strerror or error}"
        raise Refusal(Reason.EXPORT_FAILED, message, "out") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes a JSON file as Hugging Face's libraries do: indented, with sorted keys."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: Mapping[str, object]) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _check_free(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        message = f"{out} exists; choose another directory, or replace it with --force"
        raise Refusal(Reason.EXPORT_EXISTS, message, "out")
    if out.is_symlink() or not out.is_dir():
        message = f"{out} exists and is not a directory; it is not replaced"
        raise Refusal(Reason.EXPORT_EXISTS, message, "out")
    held = {entry.name for entry in out.iterdir()}
    if held and held.isdisjoint(OURS):
        message = f"{out} does not contain an earlier export; it is not replaced, even with --force"
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
        fresh.rename(out)  # fails if a non-empty directory has appeared meanwhile
        flush(out.parent)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        flush(path)
    flush(directory)
