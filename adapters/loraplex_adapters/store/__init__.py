"""The adapter store: files by content; names, versions, aliases and labels in an index.

Owns the directory `--store` and its index, and everything that changes them. It checks adapters
with `format` before it stores them and never changes stored bytes. It has no notion of tensors,
devices or requests.
"""

from loraplex_adapters.store.disk import require_store
from loraplex_adapters.store.files.uploads import OpenUpload, Upload, UploadBounds
from loraplex_adapters.store.garbage import Collected
from loraplex_adapters.store.index.allotment import Allotment, Holding
from loraplex_adapters.store.index.rebases import Rebase
from loraplex_adapters.store.index.records import Alias, Page, Quarantine, Record
from loraplex_adapters.store.index.selector import EVERYTHING, NOTHING, LabelSelector
from loraplex_adapters.store.index.texts import VersionText
from loraplex_adapters.store.staging import Approval
from loraplex_adapters.store.store import Store
from loraplex_adapters.store.survey import Surveyed, Verified, survey_at

__all__ = [
    "EVERYTHING",
    "NOTHING",
    "Alias",
    "Allotment",
    "Approval",
    "Collected",
    "Holding",
    "LabelSelector",
    "OpenUpload",
    "Page",
    "Quarantine",
    "Rebase",
    "Record",
    "Store",
    "Surveyed",
    "Upload",
    "UploadBounds",
    "Verified",
    "VersionText",
    "require_store",
    "survey_at",
]
