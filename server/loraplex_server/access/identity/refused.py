"""Refusals of credentials, which tell a caller nothing, and of files, which tell an operator all.

A caller learns only that its credential is not valid. Why, is in `BadCredential`, the cause of the
refusal: for the log and the audit log.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loraplex_model.base.refusal import Problem, Reason, Refusal
from pydantic import ValidationError
from pydantic_core import ErrorDetails

_MISSING: Final = (
    "this call needs a credential: the metadata `authorization` with `Bearer` and a key or a token"
)
_INVALID: Final = "the credential is not valid: it is unknown, has expired or was revoked"


class BadCredential(Exception):
    """Why a credential is refused, in words for the operator, without any secret part of it."""


def missing() -> Refusal:
    """CREDENTIALS_MISSING."""
    return Refusal(Reason.CREDENTIALS_MISSING, _MISSING)


def invalid() -> Refusal:
    """CREDENTIALS_INVALID, with one text for all causes."""
    return Refusal(Reason.CREDENTIALS_INVALID, _INVALID)


def unusable(file: Path, faults: Sequence[str]) -> Refusal:
    """CONFIG_INVALID for a file of principals or credentials; the message has every fault."""
    message = f"{file}: {'; '.join(faults)}"
    return Refusal(
        Reason.CONFIG_INVALID, message, problems=[Problem(str(file), fault) for fault in faults]
    )


def unreadable(file: Path, error: OSError) -> Refusal:
    """CONFIG_INVALID for a file of principals or credentials that cannot be read."""
    return unusable(file, [f"cannot be read: {error.strerror or error}"])


def described(error: ValidationError, place: str = "") -> list[str]:
    """Each fault that pydantic found, with the path of its field, and without the value.

    `place` is the path of the values as a whole, such as "principals.search".
    """
    return [_described(fault, place) for fault in error.errors(include_url=False)]


def _described(fault: ErrorDetails, place: str) -> str:
    path = ".".join([*([place] if place else []), *map(str, fault["loc"])])
    match fault["type"]:
        case "extra_forbidden":
            text = "there is no such key"
        case "missing":
            text = "is missing"
        case _:
            text = fault["msg"].removeprefix("Value error, ")
    return f"{path}: {text}" if path else text
