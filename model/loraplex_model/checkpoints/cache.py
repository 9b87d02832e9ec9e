"""Built models on disk, keyed by the content of the files from which they were built.

    sources/<digest of names, sizes and times>   the content digest of those files
    entries/<content digest>/                    the built files, and entry.json

Hashing gigabytes takes longer than loading them, so the content digest is looked up by a manifest
(path, size, modification time of every source file) and computed only for a new manifest. Touching
or moving a model costs one hashing; changing it builds a new entry. An entry appears by a rename,
complete and flushed to disk, and is never changed afterwards. Its record holds the SHA-256 of every
file, and the files are read and compared with it before they are used. A lock per entry lets one of
several starting processes build while the others wait; the system frees the lock when its process
ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from loraplex_model.base.durable import (
    flush,
    locked,
    make_directory,
    read_regular,
    write_atomically,
)
from loraplex_model.base.refusal import Reason, Refusal, model_invalid

FORMAT = 3
"""Version of the stored form and of the checks before it, increased with each change, so that older
entries are rebuilt. Entries of version 2 may hold a model that is refused now, or another head."""

ENTRY = "entry.json"

_log = logging.getLogger(__name__)

T = TypeVar("T")

Build = Callable[[Path], None]
"""Fills an empty directory."""


def entry_for(
    root: Path,
    files: Sequence[Path],
    build: Build,
    *,
    verify: bool = True,
    digests: Sequence[str] = (),
) -> Path:
    """The directory that `build` has filled from `files`, now or earlier.

    A damaged entry is removed and built again, with a warning. Damage means a missing or unreadable
    file, a file too many, a wrong size, another model's record; with `verify` also a wrong digest,
    which takes reading all files. A whole entry is used even if the cache cannot be written.

    Args:
        digests: SHA-256 of each file in hex, if they are known. Then the files need not be
            readable unless they are needed, and `build` itself checks that they have these digests.

    Raises:
        Refusal: CACHE_FAILED if an entry has to be built and the cache cannot be written;
            MODEL_INVALID if a file cannot be read, or if it has changed, since a damaged entry was
            built from it, without a change of its size and time; and everything that `build`
            raises.
    """
    try:
        key, is_remembered = _content_key(root, files, digests)
        if is_remembered and not (root / "entries" / key).exists():
            # Removed, or the memory is damaged: nothing else is known of this key.
            key, is_remembered = _remember(root, files), False
        entry = root / "entries" / key
        if is_whole(entry, digests=verify):
            return entry
        make_directory(entry.parent)
        with locked(entry.parent / f"{key}.lock", mode=0o666):
            if is_whole(entry, digests=verify):
                return entry
            if entry.exists():
                _log.warning("the cached model %s is damaged; building it again", entry)
            if is_remembered:
                _check_unchanged(key, files)
            _build(entry, build)
        return entry
    except OSError as error:
        raise Refusal(
            Reason.CACHE_FAILED,
            f"the model cache {root} cannot be written ({error}); free some space, make it "
            "writable, or choose another folder with --cache",
        ) from error


def known_entry(root: Path, files: Sequence[Path], digests: Sequence[str] = ()) -> Path | None:
    """The directory that `entry_for` would use without building it; None if there is none.

    No large file is read, and nothing is changed.
    """
    key = _key(files, digests) if digests else _read_key(_memory_of(root, files))
    if key is None or not is_whole(root / "entries" / key):
        return None
    return root / "entries" / key


def is_whole(entry: Path, *, digests: bool = False) -> bool:
    """Whether an entry has all of its files and no others, with the right sizes.

    With `digests` they are also read and their digests compared.
    """
    try:
        record = json.loads(read_regular(entry / ENTRY))
        files = {name: (size, digest) for name, (size, digest) in record["files"].items()}
        if record.get("key", entry.name) != entry.name or files.keys() != _content_of(entry):
            return False
        for name, (size, digest) in files.items():
            path = entry / name
            if path.stat().st_size != size or (digests and _file_digest(path) != digest):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _content_of(entry: Path) -> set[str]:
    """Names of an entry's files. Hidden files, which some file systems add, do not count."""
    names = {path.name for path in entry.iterdir() if not path.name.startswith(".")}
    return names - {ENTRY}


def _content_key(root: Path, files: Sequence[Path], digests: Sequence[str]) -> tuple[str, bool]:
    """The key of the files' content, and whether it was remembered by their times, not read."""
    if digests:
        return _key(files, digests), False
    if (remembered := _read_key(_memory_of(root, files))) is not None:
        return remembered, True
    return _remember(root, files), False


def _remember(root: Path, files: Sequence[Path]) -> str:
    """Reads the files; returns the key of their content, and keeps it under their times."""
    key, memory = _key(files, _digests_of(files)), _memory_of(root, files)
    with contextlib.suppress(OSError):  # then they are read again next time
        make_directory(memory.parent)
        write_atomically(memory, key.encode())
    return key


def _memory_of(root: Path, files: Sequence[Path]) -> Path:
    """The file that remembers the key of the files' content, found by their sizes and times."""
    stats = [(str(file), *_of_source(_size_and_time, file)) for file in files]
    manifest = json.dumps([FORMAT, stats]).encode()
    return root / "sources" / hashlib.sha256(manifest).hexdigest()


def _read_key(known: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        key = read_regular(known).decode("ascii").strip()
        if len(key) == 64 and key.isalnum():
            return key
    return None


def _key(files: Sequence[Path], digests: Sequence[str]) -> str:
    content = [(file.name, digest) for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps([FORMAT, content]).encode()).hexdigest()


def _digests_of(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, of several at a time, since a hash takes one core."""
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as threads:
        return list(threads.map(partial(_of_source, _file_digest), files))


def _check_unchanged(key: str, files: Sequence[Path]) -> None:
    """Raises `Refusal` (MODEL_INVALID) if the files no longer have the content of `key`.

    Their sizes and times are those under which `key` was remembered, so the files were damaged, or
    replaced by a program that restores times. Neither may silently become another base model.
    """
    if _key(files, _digests_of(files)) != key:
        raise model_invalid(
            f"the files of the model ({files[0].parent}) have changed although their sizes and "
            "times have not, so they are probably damaged: fetch the model again, or, if they were "
            "replaced on purpose, set their times to now (touch)"
        )


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
    """Fills a new directory and puts it in the place of a damaged entry, if there is one.

    A damaged entry stays until the new one is complete. Called with the entry's lock.
    """
    scratch = f".building-{entry.name}-"
    for abandoned in entry.parent.glob(scratch + "*"):  # by a dead process, since we hold the lock
        _remove(abandoned)
    fresh = entry.parent / (scratch + uuid.uuid4().hex)
    fresh.mkdir()
    try:
        build(fresh)
        built = sorted(path for path in fresh.iterdir() if path.is_file())
        files = {path.name: (path.stat().st_size, _file_digest(path)) for path in built}
        for path in built:
            flush(path)
        record = json.dumps({"format": FORMAT, "key": entry.name, "files": files})
        write_atomically(fresh / ENTRY, record.encode())
        flush(fresh)
        if entry.exists():
            entry.rename(damaged := entry.parent / (scratch + uuid.uuid4().hex))
            fresh.rename(entry)
            _remove(damaged)
        else:
            fresh.rename(entry)
        flush(entry.parent)
    except BaseException:
        _remove(fresh)
        raise


def _remove(path: Path) -> None:
    """Removes a folder, or a file in its place; what cannot be removed stays."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
