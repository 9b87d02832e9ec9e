"""Backups of a store: a directory with the index as text and every adapter's files.

A backup is made while servers use the store, and works with both databases: what was backed up
from SQLite can be recovered into PostgreSQL, and the other way round. Folders that a server keeps
beside its store can be taken along.
"""

from loraplex_adapters.store.backup.attached.folder import (
    AttachedFile,
    AttachedFolder,
    Attachments,
)
from loraplex_adapters.store.backup.recover import Recovered, recover
from loraplex_adapters.store.backup.verify import Checked, check_backup
from loraplex_adapters.store.backup.write import BackedUp, back_up

__all__ = [
    "AttachedFile",
    "AttachedFolder",
    "Attachments",
    "BackedUp",
    "Checked",
    "Recovered",
    "back_up",
    "check_backup",
    "recover",
]
