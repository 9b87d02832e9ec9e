"""Adapter ids as clients write them: "name", "name@3" or "name@sha256:<hex>"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.digest import digest_hex

_NAME = re.compile(r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_RULE = "has 1 to 63 characters of a-z, 0-9 and -, and does not begin or end with -"
_VERSION = re.compile(r"\A[1-9][0-9]{0,8}\Z")


@dataclass(frozen=True, slots=True)
class AdapterId:
    """A parsed adapter id; at most one of `version` and `digest` is set."""

    name: str
    version: int | None = None
    digest: str | None = None


def check_name(name: str) -> str:
    """Returns `name` if it is valid; raises Refusal(FIELD_INVALID, field "name") otherwise."""
    if not _NAME.match(name):
        raise Refusal(Reason.FIELD_INVALID, f"an adapter name {_RULE}", "name")
    return name


def parse_id(adapter_id: str) -> AdapterId:
    """Parses an adapter id; raises Refusal(FIELD_INVALID, field "adapter_id")."""
    name, separator, rest = adapter_id.partition("@")
    try:
        check_name(name)
        if not separator:
            return AdapterId(name)
        if _VERSION.match(rest):
            return AdapterId(name, version=int(rest))
        digest_hex(rest)
        return AdapterId(name, digest=rest)
    except Refusal:
        forms = '"name", "name@<version>" or "name@sha256:<64 hex digits>"'
        message = f"an adapter id is {forms}, where the name {_RULE}"
        raise Refusal(Reason.FIELD_INVALID, message, "adapter_id") from None
