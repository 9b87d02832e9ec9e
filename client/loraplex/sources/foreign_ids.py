"""Names for adapters that other programs name freely, such as "org/name@main" or "/mnt/Lora_A".

A server's names are lower-case labels. An adapter with another id is registered under a name that
is made of that id, and carries the id as a label, by which it is found.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Final

MODEL_ID_LABEL: Final = "loraplex.dev/model-id"
"""Label of an adapter whose id in requests is not its name."""

SOURCE_LABEL: Final = "loraplex.dev/source"
"""Label that says where an adapter's files came from."""

MAX_MODEL_ID: Final = 256
"""Most characters of an id, since a label has at most as many."""

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_OTHERS: Final = re.compile(r"[^a-z0-9]+")
_READABLE: Final = 46
_HEX: Final = 16


def is_name(text: str) -> bool:
    """Whether a server takes `text` as a name."""
    return _NAME.fullmatch(text) is not None


def name_of(model_id: str) -> tuple[str, Mapping[str, str]]:
    """The name to register an adapter as, and the labels by which it is found by `model_id`.

    A legal name is kept and needs no label. Any other id always gets the same name: its letters and
    digits, and 16 hex digits of its SHA-256. Raises ValueError for an id that is empty, has more
    than 256 characters, or has one that is not printable.
    """
    if not model_id:
        raise ValueError("it is empty")
    if len(model_id) > MAX_MODEL_ID:
        raise ValueError(f"it has more than {MAX_MODEL_ID} characters")
    if not model_id.isprintable():
        raise ValueError("it has characters that are not printable")
    if is_name(model_id):
        return model_id, {}
    plain = unicodedata.normalize("NFKD", model_id.casefold())
    readable = _OTHERS.sub("-", plain).strip("-")[:_READABLE].strip("-")
    digits = hashlib.sha256(model_id.encode("utf-8", "surrogatepass")).hexdigest()[:_HEX]
    name = f"{readable}-{digits}" if readable else f"model-{digits}"
    return name, {MODEL_ID_LABEL: model_id}
