"""Adapter ids as clients write them: "name", "name@3" or "name@sha256:<hex>"."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.digest import is_digest

_NAME = re.compile(r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_RULE = "has 1 to 63 characters of a-z, 0-9 and -, and does not begin or end with -"
_VERSION = re.compile(r"\A[1-9][0-9]{0,8}\Z")
_OTHERS = re.compile(r"[^a-z0-9]+")
_MAX_NAME = 63
_MAX_READ = 256
"""Characters of a refused text that are looked at for a suggestion."""


@dataclass(frozen=True, slots=True)
class AdapterId:
    """A parsed adapter id; at most one of `version` and `digest` is set."""

    name: str
    version: int | None = None
    digest: str | None = None


def is_name(text: str) -> bool:
    """Whether `text` is a valid name."""
    return _NAME.match(text) is not None


def check_name(name: str) -> str:
    """Returns `name` if it is valid; raises Refusal(FIELD_INVALID, field "name") otherwise.

    The message ends with a name that would be valid, if one can be made of the text.
    """
    if not is_name(name):
        message = f"an adapter name {_RULE}{did_you_mean(suggested_name(name))}"
        raise Refusal(Reason.FIELD_INVALID, message, "name")
    return name


def suggested_name(text: str) -> str:
    """Returns a valid name as similar to `text` as possible; "" if no letter or digit is left.

    "Org/Name_v1.2" becomes "org-name-v1-2". Accents are dropped.
    """
    plain = unicodedata.normalize("NFKD", text[:_MAX_READ].casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c)).lower()
    return _OTHERS.sub("-", plain).strip("-")[:_MAX_NAME].rstrip("-")


def suggested_id(text: str) -> str:
    """Returns a valid adapter id as similar to `text` as possible; "" if there is none.

    A version that is none, as in "name@latest", is left out; "name@v3" becomes "name@3".
    """
    before, _, rest = text[:_MAX_READ].partition("@")
    name = before if _NAME.match(before) else suggested_name(before)
    pin = rest.removeprefix("v")
    for form in (rest, pin, f"sha256:{pin}"):
        if name and form and _parsed(f"{name}@{form}"):
            return f"{name}@{form}"
    return name


def did_you_mean(suggestion: str) -> str:
    """The end of a refusal's message that offers a suggestion; "" if there is none."""
    return f'; did you mean "{suggestion}"?' if suggestion else ""


def parse_id(adapter_id: str) -> AdapterId:
    """Parses an adapter id; raises Refusal(FIELD_INVALID, field "adapter_id").

    The message ends with an id that would be valid, if one can be made of the text.
    """
    found = _parsed(adapter_id)
    if found is None:
        forms = '"name", "name@<version>" or "name@sha256:<64 hex digits>"'
        hint = did_you_mean(suggested_id(adapter_id))
        message = f"an adapter id is {forms}, where the name {_RULE}{hint}"
        raise Refusal(Reason.FIELD_INVALID, message, "adapter_id")
    return found


def _parsed(adapter_id: str) -> AdapterId | None:
    name, separator, rest = adapter_id.partition("@")
    if not _NAME.match(name):
        return None
    if not separator:
        return AdapterId(name)
    if _VERSION.match(rest):
        return AdapterId(name, version=int(rest))
    return AdapterId(name, digest=rest) if is_digest(rest) else None
