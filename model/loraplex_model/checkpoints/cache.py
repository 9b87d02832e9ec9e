"""Built models on disk, keyed by the content of the files from which they were built.

    sources/<digest of names, sizes and times>   the content digest of those files
    entries/<content digest>/                    the built files, and entry.json

Hashing gigabytes takes longer than loading them, so the content digest is looked up by a manifest
(path, size, modification time of every source file) and computed only for a new manifest. Touching
or moving a model costs one hashing; changing it builds a new entry. An entry appears by a rename,
complete and flushed to disk, and is never changed afterwards. A lock per entry lets one of several
starting processes build while the others wait; the system frees the lock when its process ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from loraplex_model.base.durable import flush, locked, write_atomically
from loraplex_model.base.refusal import Reason, Refusal, model_invalid

FORMAT = 2
"""Version of the stored form, increased with each change, so that older entries are rebuilt."""

ENTRY = "entry.json"

_log = logging.getLogger(__name__)

T = TypeVar("T")

Build = Callable[[Path], None]
"""Fills an empty directory."""


def entry_for(root: Path, files: Sequence[Path], build: Build, *, verify: bool = False) -> Path:
    """The directory that `build` has filled from `files`, now or earlier.

    A damaged entry is removed and built again, with a warning. Damage means a missing file or a
    wrong size; with `verify` also a wrong digest, which takes reading all files.

    Raises:
        Refusal: CACHE_FAILED if the cache cannot be written; and everything that `build` raises.
    """
    try:
        (root / "sources").mkdir(parents=True, exist_ok=True)
        (root / "entries").mkdir(exist_ok=True)
        key = _content_key(root, files)
        entry = root / "entries" / key
        if is_whole(entry, digests=verify):
            return entry
        with locked(root / "entries" / f"{key}.lock", mode=0o666):
            if is_whole(entry, digests=verify):
                return entry
            if entry.exists():
                _log.warning("the cached model %s is damaged; building it again", entry)
                shutil.rmtree(entry)
            _build(entry, build)
        return entry
    except OSError as error:
        raise Refusal(
            Reason.CACHE_FAILED,
            f"the model cache {root} cannot be written ({error}); free some space, make it "
            "writable, or choose another folder with --cache",
        ) from error


def is_whole(entry: Path, *, digests: bool = False) -> bool:
    """Whether an entry has all of its files, with the right sizes and, if asked for, digests."""
    try:
        record = json.loads((entry / ENTRY).read_text("utf-8"))
        for name, (size, digest) in record["files"].items():
            path = entry / name
            if path.stat().st_size != size:
                return False
            if digests and _file_digest(path) != digest:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _content_key(root: Path, files: Sequence[Path]) -> str:
    stats = [(str(file), *_of_source(_size_and_time, file)) for file in files]
    manifest = json.dumps([FORMAT, stats]).encode()
    known = root / "sources" / hashlib.sha256(manifest).hexdigest()
    with contextlib.suppress(OSError):
        key = known.read_text("ascii").strip()
        if len(key) == 64 and key.isalnum():
            return key
    content = [(file.name, _of_source(_file_digest, file)) for file in files]
    key = hashlib.sha256(json.dumps([FORMAT, content]).encode()).hexdigest()
    write_atomically(known, key.encode())
    return key


def _of_source(read: Callable[[Path], T], file: Path) -> T:
    """Reads a source file; unlike errors of the cache, its OSError becomes MODEL_INVALID."""
    try:
        return read(file)
    except OSError as error:
        raise model_invalid(f"{file} cannot be read: {error}") from error


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _build(entry: Path, build: Build) -> None:
    prefix = f".building-{entry.name}-"
    for abandoned in entry.parent.glob(prefix + "*"):  # by a dead process, since we hold the lock
        shutil.rmtree(abandoned, ignore_errors=True)
    fresh = entry.parent / (prefix + uuid.uuid4().hex)
    fresh.mkdir()
    try:
        build(fresh)
        built = sorted(path for path in fresh.iterdir() if path.is_file())
        record = {path.name: (path.stat().st_size, _file_digest(path)) for path in built}
        for path in built:
            flush(path)
        entry_record = json.dumps({"format": FORMAT, "files": record})
        write_atomically(fresh / ENTRY, entry_record.encode())
        flush(fresh)
        fresh.rename(entry)
        flush(entry.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
