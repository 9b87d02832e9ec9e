"""The directory of a backup: its files, its manifest, and typed errors of its disk.

    <backup>/backup.json            the store that it is a backup of; written first
    <backup>/lock                   held while a backup is made
    <backup>/work/                  files in progress
    <backup>/blobs/sha256/<hex>/    adapter_config.json, adapter_model.safetensors
    <backup>/attached/sha256/<hex>  files of folders that the server keeps beside the store
    <backup>/index-<hex>.jsonl      the index; `<hex>` begins its own SHA-256
    <backup>/manifest.json          what the last whole backup consists of; written last

The manifest is replaced in one step, and what the old one names is removed only after that. So an
interrupted backup leaves the backup before it whole. Files that no manifest names are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loraplex_model.base.durable import is_disk_full
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.digest import digest_hex, is_digest
from loraplex_adapters.store.backup.attached.folder import Listed, listed_of

FORMAT: Final = 2
"""Version of a backup's form. A greater one is refused."""

_WITHOUT_FOLDERS: Final = 1
"""The form of backups without attached folders, and of `backup.json` in all backups."""

MARKER: Final = "backup.json"
MANIFEST: Final = "manifest.json"
LOCK: Final = "lock"
WORK: Final = "work"

_MAX_FILE: Final = 1 << 30
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a whole backup consists of.

    Attributes:
        store_id: id of the store.
        schema_version: version of the index's tables.
        created: time of the backup in ISO 8601, in UTC.
        index, index_sha256: name and SHA-256 of the file with the index.
        rows: number of rows by table.
        blobs: size in bytes of both files, by digest.
        lost: digests that the index names and whose files were missing or damaged in the store.
        attached: files of the attached folders.
        attached_lost: names of folders whose files were damaged.
    """

    store_id: str
    schema_version: int
    created: str
    index: str
    index_sha256: str
    rows: Mapping[str, int]
    blobs: Mapping[str, int]
    lost: tuple[str, ...] = ()
    attached: Listed = field(default_factory=dict)
    attached_lost: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The file's bytes: the fields, and their SHA-256.

        Earlier servers read a backup without attached folders, too.
        """
        body = {name: getattr(self, name) for name in type(self).__slots__}
        version = FORMAT
        if not (self.attached or self.attached_lost):
            version = _WITHOUT_FOLDERS
            del body["attached"], body["attached_lost"]
        fields = _canonical({"format": version, **body})
        return b'{"body":' + fields + b',"sha256":"' + _sha256(fields).encode() + b'"}\n'


def index_name(sha256: str) -> str:
    """Name of the file with the index whose SHA-256 is given."""
    return f"index-{sha256[:16]}.jsonl"


def blob_in(place: Path, digest: str) -> Path:
    """Where a backup has the files of an adapter. Raises Refusal(FIELD_INVALID)."""
    return place / "blobs" / "sha256" / digest_hex(digest)


def read_marker(place: Path) -> str | None:
    """Id of the store that a directory is a backup of; None if it is none.

    Raises Refusal: BACKUP_INVALID, BACKUP_FAILED.
    """
    try:
        found = _loads(MARKER, read_file(place / MARKER))
    except FileNotFoundError:
        return None
    store_id = found.get("store_id")
    if found.get("format") != _WITHOUT_FOLDERS or not isinstance(store_id, str):
        raise invalid(f"{MARKER} is damaged, or of a newer version")
    return store_id


def marker(store_id: str) -> bytes:
    """The bytes of the file that says which store a directory is a backup of."""
    return _canonical({"format": _WITHOUT_FOLDERS, "store_id": store_id}) + b"\n"


def read_manifest(place: Path) -> Manifest:
    """Reads and checks the manifest of a backup.

    Raises Refusal: BACKUP_INVALID if there is no whole backup, or if the manifest is damaged or of
    a newer version; BACKUP_FAILED if it cannot be read.
    """
    with disk_errors():
        if not place.is_dir():
            raise invalid(f"{place} is not a directory")
        marked = read_marker(place)
        if marked is None:
            raise invalid(f"{place} holds no backup: there is no {MARKER}")
        try:
            data = read_file(place / MANIFEST)
        except FileNotFoundError:
            raise invalid(f"{place} holds no whole backup: there is no {MANIFEST}") from None
    found = _loads(MANIFEST, data)
    body = found.get("body")
    if not isinstance(body, dict) or found.get("sha256") != _sha256(_canonical(body)):
        raise invalid(f"{MANIFEST} is damaged")
    version = body.pop("format", None)
    if version not in range(_WITHOUT_FOLDERS, FORMAT + 1):
        raise invalid(
            f"the backup has the form {version}, and this server reads up to {FORMAT}: it was made "
            "by a newer version of the server; use that one"
        )
    try:
        folders = listed_of(body.get("attached", {}))
        lost = {name: tuple(body.get(name, ())) for name in ("lost", "attached_lost")}
        manifest = Manifest(**{**body, **lost, "attached": folders})
        sound = all(map(is_digest, [*manifest.blobs, *manifest.lost]))
        if not sound or manifest.index != index_name(manifest.index_sha256):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise invalid(f"{MANIFEST} is damaged") from None
    if marked != manifest.store_id:
        raise invalid(f"{MARKER} is damaged, or of another store than {MANIFEST}")
    return manifest


def read_file(path: Path) -> bytes:
    """Content of a regular file that is no link.

    Raises FileNotFoundError, other kinds of OSError, and Refusal(BACKUP_INVALID) for anything else.
    """
    try:
        descriptor = os.open(path, _FILE)
    except OSError as error:
        if path.is_symlink():
            raise invalid(f"{path.name} is a symbolic link") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise invalid(f"{path.name} is not a regular file")
        if status.st_size > _MAX_FILE:
            raise invalid(f"{path.name} has more than {_MAX_FILE} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def require_directory(path: Path) -> None:
    """Raises Refusal(BACKUP_INVALID) if a link or a file is where a directory belongs."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise invalid(f"{path.name} is not a directory, or a symbolic link")


def invalid(message: str) -> Refusal:
    """The refusal of a backup that cannot be used."""
    return Refusal(Reason.BACKUP_INVALID, message)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns OSError into Refusal: DISK_FULL if the backup's disk is full, else BACKUP_FAILED."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            message = "the disk of the backup is full; the backup before this one is whole"
            raise Refusal(Reason.DISK_FULL, message) from error
        where = f"{error.filename}: " if error.filename else ""
        message = f"the backup cannot be read or written: {where}{error.strerror}"
        raise Refusal(Reason.BACKUP_FAILED, message) from error


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _loads(name: str, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise invalid(f"{name} is damaged") from None
    if not isinstance(found, dict):
        raise invalid(f"{name} is damaged")
    return found
