"""Reads a whole backup and reports everything that is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store.backup import rows
from loraplex_adapters.store.backup.attached.placing import check_object
from loraplex_adapters.store.backup.copying import check
from loraplex_adapters.store.backup.place import (
    Manifest,
    blob_in,
    disk_errors,
    invalid,
    read_file,
    read_manifest,
    require_directory,
)
from loraplex_adapters.store.index import schema


@dataclass(frozen=True, slots=True)
class Checked:
    """A backup that was read.

    Attributes:
        damaged: what is wrong with the files of an adapter, by digest.
        attached_damaged: what is wrong with an attached folder, by its name.
    """

    manifest: Manifest
    damaged: dict[str, str]
    attached_damaged: dict[str, str] = field(default_factory=dict)


def check_backup(place: Path) -> Checked:
    """Reads the backup in a directory, every adapter's files and attached folder included.

    Raises Refusal: BACKUP_INVALID if there is no whole backup, or if its index is damaged or of
    a newer version; BACKUP_FAILED if the disk fails.
    """
    manifest = read_manifest(place)
    _check_index(place, manifest)
    damaged = {}
    for folder in (place / "blobs", place / "blobs" / "sha256"):
        require_directory(folder)
    for digest, size in manifest.blobs.items():
        try:
            if check(blob_in(place, digest), digest) != size:
                raise invalid(f"{digest}: its size is not the manifest's")
        except Refusal as refusal:
            if refusal.reason is not Reason.BACKUP_INVALID:
                raise
            damaged[digest] = refusal.message
    return Checked(manifest, damaged, _check_attached(place, manifest))


def _check_attached(place: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with attached folders, by their names."""
    for parent in (place / "attached", place / "attached" / "sha256"):
        require_directory(parent)
    damaged = {}
    for name, files in manifest.attached.items():
        for file, (sha256, size) in files.items():
            try:
                check_object(place, sha256, size)
            except Refusal as refusal:
                damaged[name] = f"{name}/{file}: {refusal.message}"
    return damaged


def index_rows(place: Path, manifest: Manifest) -> Iterator[rows.Row]:
    """The rows of a backup's index. Raises Refusal: BACKUP_INVALID, BACKUP_FAILED."""
    with disk_errors():
        try:
            data = read_file(place / manifest.index)
        except FileNotFoundError:
            raise invalid(f"the index is missing: there is no {manifest.index}") from None
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise invalid(f"{manifest.index} is damaged: its content has changed")
    return rows.parse(data.splitlines(keepends=True))


def _check_index(place: Path, manifest: Manifest) -> None:
    """Raises Refusal(BACKUP_INVALID) unless the index can be loaded and fits the manifest."""
    if manifest.schema_version != schema.SCHEMA_VERSION:
        raise invalid(
            f"the index is of version {manifest.schema_version}, and this server reads version "
            f"{schema.SCHEMA_VERSION}; use the server that made the backup"
        )
    found = list(index_rows(place, manifest))
    rows.rehearse(found)
    named = {values.get("digest") for table, values in found if table == schema.versions.name}
    known = {values["key"]: values["value"] for table, values in found if table == "meta"}
    if named != set(manifest.blobs) | set(manifest.lost):
        raise invalid("the index names other adapters than the manifest")
    if known.get("store_id") != manifest.store_id:
        raise invalid("the index is of another store than the manifest")
