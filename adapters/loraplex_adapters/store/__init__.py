"""The adapter store: blobs by content; names, versions, aliases and labels in an index."""

from loraplex_adapters.store.garbage import Collected
from loraplex_adapters.store.records import Alias, Page, Record
from loraplex_adapters.store.store import Store, Verified
from loraplex_adapters.store.uploads import Upload, UploadBounds

__all__ = [
    "Alias",
    "Collected",
    "Page",
    "Record",
    "Store",
    "Upload",
    "UploadBounds",
    "Verified",
]
