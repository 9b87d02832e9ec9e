"""Addresses of adapters, and which of them an operator allows.

hf://org/name[@revision][:subfolder]    a repository of a Hugging Face hub
s3://bucket/prefix                      an S3 bucket, or a service with its interface
gs://bucket/prefix                      a bucket of Google Cloud Storage
file:///absolute/path                   a folder
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

SCHEMES: Final = ("hf", "s3", "gs", "file")
MAX_ADDRESS: Final = 1024

_OTHER_NAMES: Final = {"huggingface": "hf", "gcs": "gs", "s3a": "s3"}
_HUB: Final = re.compile(
    r"(?P<owner>[A-Za-z0-9][\w.-]{0,95})/(?P<name>[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[\w./-]{1,128}))?(?::(?P<folder>[^@:]+))?",
    re.ASCII,
)
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]", re.ASCII)
_SPECIAL: Final = frozenset("\\?#%*[]{}|<>^`\"'")
"""Characters that libraries give a meaning of their own: queries, escapes, patterns."""


class AddressInvalid(ValueError):
    """A text that is no address of an adapter; the message says why."""


@dataclass(frozen=True, slots=True)
class AdapterAddress:
    """Where an adapter is.

    Attributes:
        scheme: one of `SCHEMES`.
        place: "org/name" of a hub, a bucket, or "" for a folder.
        path: folder within the place, without slashes at its ends; of a folder, its absolute path.
        revision: branch, tag or commit of a hub's repository; "" for its default.
    """

    scheme: str
    place: str
    path: str
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> AdapterAddress:
        """Reads an address. Raises AddressInvalid."""
        scheme, separator, rest = text.partition("://")
        scheme = _OTHER_NAMES.get(scheme.lower(), scheme.lower())
        if not separator or scheme not in SCHEMES:
            known = ", ".join(f"{each}://" for each in SCHEMES)
            raise AddressInvalid(f"an address begins with one of {known}")
        _require_plain(text, rest)
        if scheme == "hf":
            return cls._of_hub(rest)
        if scheme == "file":
            if not rest.startswith("/"):
                raise AddressInvalid("file:// is followed by an absolute path: file:///PATH")
            return cls(scheme, "", "/" + _folders(rest.lstrip("/"), "path"))
        bucket, _, path = rest.partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise AddressInvalid(f"{scheme}:// is followed by the name of a bucket")
        return cls(scheme, bucket, _folders(path, "path") if path.strip("/") else "")

    @classmethod
    def _of_hub(cls, rest: str) -> AdapterAddress:
        found = _HUB.fullmatch(rest.rstrip("/"))
        if found is None:
            raise AddressInvalid("a hub's address is hf://ORG/NAME[@REVISION][:SUBFOLDER]")
        revision, folder = found["revision"] or "", found["folder"] or ""
        for part in (found["owner"], found["name"]):
            _folders(part, "name")
        if revision:
            _folders(revision, "revision")
        path = _folders(folder, "subfolder") if folder else ""
        return cls("hf", f"{found['owner']}/{found['name']}", path, revision)

    def __str__(self) -> str:
        if self.scheme == "hf":
            revision = f"@{self.revision}" if self.revision else ""
            return f"hf://{self.place}{revision}" + (f":{self.path}" if self.path else "")
        if self.scheme == "file":
            return f"file://{self.path}"
        return f"{self.scheme}://{self.place}" + (f"/{self.path}" if self.path else "")

    @property
    def last(self) -> str:
        """The last part of the address, which can name the adapter."""
        path = self.path or self.place
        return path.rsplit("/", 1)[-1]


class AllowList:
    """The prefixes with which addresses must begin; without any, no address is allowed.

    A prefix ends where a part of an address ends: `s3://bucket` allows `s3://bucket/a` and not
    `s3://bucket-of-others/a`; `hf://org` allows all repositories of `org`.
    """

    def __init__(self, prefixes: Iterable[str]) -> None:
        """Raises AddressInvalid for a prefix that no address begins with."""
        self._prefixes = tuple(map(_prefix, prefixes))

    def __bool__(self) -> bool:
        return bool(self._prefixes)

    def __contains__(self, address: AdapterAddress) -> bool:
        text = str(address)
        return any(
            text == prefix
            or (text.startswith(prefix) and (prefix.endswith("/") or text[len(prefix)] in "/@:"))
            for prefix in self._prefixes
        )

    @property
    def folders(self) -> tuple[str, ...]:
        """The absolute paths of the prefixes that are folders."""
        return tuple(p.removeprefix("file://") for p in self._prefixes if p.startswith("file://"))

    def __str__(self) -> str:
        """The prefixes with spaces between them, none of which has one."""
        return " ".join(self._prefixes)


def _prefix(text: str) -> str:
    """A prefix in the form in which addresses are written."""
    scheme, separator, rest = text.partition("://")
    scheme = _OTHER_NAMES.get(scheme.lower(), scheme.lower())
    if not separator or scheme not in SCHEMES:
        raise AddressInvalid(f"{text!r}: a prefix begins with one of {', '.join(SCHEMES)} and ://")
    rest = rest.rstrip("/")
    if not rest:
        return f"{scheme}://"
    _require_plain(text, rest)
    if scheme == "hf" and "/" not in rest:
        AdapterAddress.parse(f"hf://{rest}/any")
        return f"hf://{rest}/"
    return str(AdapterAddress.parse(f"{scheme}://{rest}"))


def _require_plain(text: str, rest: str) -> None:
    """Raises AddressInvalid for characters and parts that could mean something else."""
    if len(text) > MAX_ADDRESS:
        raise AddressInvalid(f"an address has at most {MAX_ADDRESS} characters")
    if not text.isprintable() or " " in text or _SPECIAL.intersection(text):
        raise AddressInvalid(
            "an address has printable characters only, and no spaces, queries, escapes or wildcards"
        )
    if "@" in rest.partition("/")[0]:
        raise AddressInvalid("an address has no credentials; they belong into the environment")


def _folders(path: str, what: str) -> str:
    """A path in plain form, without slashes at its ends. Raises AddressInvalid."""
    parts = path.strip("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise AddressInvalid(f"the {what} is not in plain form: it has an empty part, . or ..")
    return "/".join(parts)
