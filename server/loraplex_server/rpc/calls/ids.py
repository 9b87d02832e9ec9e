"""The grammars of ids in requests: names, adapter ids and request ids."""

from __future__ import annotations

import re
from typing import Final

from loraplex_adapters.store.index.ids import did_you_mean, suggested_id, suggested_name

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


def name_fault(text: str) -> str:
    """Says what is wrong with a text that is no name, and offers a name; "" if it is one."""
    if is_name(text):
        return ""
    rule = "must have 1 to 63 characters of a-z, 0-9 and -, and not begin or end with -"
    return rule + did_you_mean(suggested_name(text))


def adapter_id_fault(text: str) -> str:
    """Says what is wrong with a text that is no adapter id, and offers one; "" if it is one."""
    if is_adapter_id(text):
        return ""
    rule = 'must be "name", "name@<version>" or "name@sha256:<64 hex digits>"'
    return rule + did_you_mean(suggested_id(text))


def is_request_id(text: str) -> bool:
    """Whether `text` is a request id: 1 to 128 printable ASCII characters."""
    return 0 < len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()
