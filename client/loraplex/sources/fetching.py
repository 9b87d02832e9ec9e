"""Fetches one adapter into a local folder: only its own files, bounded, all of them or none."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex.errors import LoraplexError
from loraplex.sources import remote
from loraplex.sources.addresses import AdapterAddress
from loraplex.sources.remote import PullFailed, RemoteFile, RemoteFolder
from loraplex.uploads import CONFIG_FILE, WEIGHTS_FILE, Files

MAX_BYTES: Final = 4 << 30
"""Most bytes of an adapter's weights, unless more are allowed."""

_SMALL: Final = 1 << 20
_OPTIONAL: Final = ("chat_template.jinja", "model.sig")
"""Files that an adapter may bring besides its two: a chat template, and a signature."""
_PIECE: Final = 1 << 20
_HIDDEN: Final = ".pull-"


@dataclass(frozen=True, slots=True)
class Pulled:
    """What was fetched.

    Attributes:
        folder: the local folder with the adapter's files.
        digest: the adapter's digest, as servers compute it.
        source: the address; of a hub, with the commit in place of a branch or a tag.
        changed: False if the folder had these bytes already.
    """

    folder: Path
    digest: str
    source: str
    changed: bool


def pull(
    address: AdapterAddress,
    into: Path,
    name: str,
    *,
    max_bytes: int = MAX_BYTES,
    replace: bool = False,
) -> Pulled:
    """Fetches the adapter at `address` into the folder `into`/`name`.

    The folder appears when it is complete: the files are fetched into a hidden folder beside it,
    which then takes its name. A folder that is there already is kept if it has the same bytes, and
    takes the new ones only with `replace`. Raises PullFailed.
    """
    source = remote.opened(address)
    files = _chosen(source, max_bytes)
    place = into / name
    with _beside(into) as fetched:
        for file in files:
            _fetch(source, file, fetched / file.name)
        digest = _digest(fetched, address)
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise PullFailed(f"{place} is in the way: it is no folder")
        if place.is_dir():
            if _same(place, fetched):
                return Pulled(place, digest, source.shown, changed=False)
            if not replace:
                raise PullFailed(f"{place} has other files; replace it, or choose another name")
        _flush(fetched)
        try:
            _take_place(fetched, place)
        except OSError as error:
            raise _local(error) from None
    return Pulled(place, digest, source.shown, changed=True)


def _chosen(source: RemoteFolder, max_bytes: int) -> list[RemoteFile]:
    """The files to fetch. Raises PullFailed if one is missing, too large or no plain file."""
    found: Mapping[str, RemoteFile] = {file.name: file for file in source.files()}
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in found]
    if missing:
        there = ", ".join(sorted(found)[:5]) or "nothing"
        raise PullFailed(f"{source.shown} has no {missing[0]}; it has {there}")
    chosen = [found[name] for name in (CONFIG_FILE, WEIGHTS_FILE, *_OPTIONAL) if name in found]
    for file in chosen:
        limit = max_bytes if file.name == WEIGHTS_FILE else _SMALL
        if file.size > limit:
            raise PullFailed(f"{file.name} has {file.size} bytes; at most {limit} are fetched")
    return chosen


def _fetch(source: RemoteFolder, file: RemoteFile, to: Path) -> None:
    """Fetches a file of exactly the size, and the hash, that the listing said."""
    digest, count = hashlib.sha256(), 0
    with source.reading(file) as pieces, to.open("xb") as written:
        while piece := pieces.read(_PIECE):
            count += len(piece)
            if count > file.size:
                break
            digest.update(piece)
            try:
                written.write(piece)
            except OSError as error:
                raise _local(error) from None
    if count != file.size or (file.sha256 and digest.hexdigest() != file.sha256):
        raise PullFailed(f"{file.name} is not what was listed: it changed, or it was cut off")
    if not source.unchanged(file):
        raise PullFailed(f"{file.name} changed while it was fetched; try again")


def _digest(folder: Path, address: AdapterAddress) -> str:
    """The digest of the fetched adapter. Raises PullFailed if the files cannot be an adapter."""
    try:
        return Files.read(folder).digest
    except LoraplexError as error:
        text = error.message.replace(str(folder), str(address))
        raise PullFailed(text) from None


def _same(place: Path, fetched: Path) -> bool:
    """Whether a folder has exactly the files that were fetched."""
    names = sorted(os.listdir(fetched))
    if sorted(os.listdir(place)) != names:
        return False
    return all(_hash(place / name) == _hash(fetched / name) for name in names)


def _hash(file: Path) -> str:
    if file.is_symlink() or not file.is_file():
        return ""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _beside(into: Path) -> Iterator[Path]:
    """A hidden folder in `into`, removed at the end unless it was renamed. Raises PullFailed."""
    try:
        into.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=into))
        made.chmod(0o755)
    except OSError as error:
        raise _local(error) from None
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Writes the files to the disk, so that no power cut leaves a named folder without bytes."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(fetched: Path, place: Path) -> None:
    """Gives the fetched folder its name; a folder of this name is moved away first and removed."""
    if place.is_dir():
        old = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=place.parent))
        try:
            place.rename(old)
            try:
                fetched.rename(place)
            except OSError:
                old.rename(place)
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        fetched.rename(place)
    descriptor = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local(error: OSError) -> PullFailed:
    return PullFailed(f"{error.filename or 'the local folder'}: {error.strerror}")
