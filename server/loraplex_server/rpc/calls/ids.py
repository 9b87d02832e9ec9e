"""The grammars of ids in requests: names, adapter ids and request ids."""

from __future__ import annotations

import re
from typing import Final

from loraplex_server.rpc.calls.bounds import MAX_REQUEST_ID

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_PIN: Final = re.compile(r"[1-9][0-9]{0,9}|sha256:[0-9a-f]{64}", re.ASCII)


def is_name(text: str) -> bool:
    """Whether `text` may be an adapter's name: a lower-case RFC 1123 label."""
    return _NAME.fullmatch(text) is not None


def is_adapter_id(text: str) -> bool:
    """Whether `text` is `name`, `name@<version>` or `name@sha256:<64 hex digits>`."""
    name, at, pin = text.partition("@")
    return is_name(name) and (not at or _PIN.fullmatch(pin) is not None)


def is_request_id(text: str) -> bool:
    """Whether `text` is a request id: 1 to 128 printable ASCII characters."""
    return 0 < len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()
