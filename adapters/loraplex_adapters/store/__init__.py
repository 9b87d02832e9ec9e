"""The adapter store: blobs by content, names and versions in an index."""

from loraplex_adapters.store.index import Page, Record
from loraplex_adapters.store.store import Store

__all__ = ["Page", "Record", "Store"]
