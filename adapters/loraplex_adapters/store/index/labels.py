"""Labels: short texts by key that operators attach to a version."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store.index.ids import did_you_mean

MAX_LABELS = 32
MAX_VALUE = 256

_KEY = re.compile(r"\A[a-z0-9][a-z0-9._/-]{0,62}\Z")
_OTHERS = re.compile(r"[^a-z0-9._/-]+")
_MAX_KEY = 63


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Returns a copy of `labels` if they are valid; raises Refusal(FIELD_INVALID, "labels")."""
    check_keys(labels)
    if any(len(value) > MAX_VALUE or not value.isprintable() for value in labels.values()):
        raise _invalid(f"a label value has at most {MAX_VALUE} characters, all of them printable")
    return dict(labels)


def check_keys(keys: Collection[str]) -> None:
    """Raises Refusal(FIELD_INVALID, field "labels") unless `keys` are valid label keys.

    There may be at most as many as a version has labels. They are counted before anything else, so
    that a list of any length costs nothing.
    """
    check_count(len(keys))
    if (wrong := next((key for key in keys if not _KEY.match(key)), None)) is not None:
        raise _invalid(
            "a label key has 1 to 63 characters of a-z, 0-9, ., _, / and -, and begins with a "
            f"letter or a digit{did_you_mean(suggested_key(wrong))}"
        )


def suggested_key(text: str) -> str:
    """Returns a valid label key as similar to `text` as possible; "" if there is none."""
    return _OTHERS.sub("-", text[:256].lower()).lstrip("._/-")[:_MAX_KEY].rstrip("-")


def check_count(count: int) -> None:
    """Raises Refusal(FIELD_INVALID, field "labels") if `count` is more than a version may have."""
    if count > MAX_LABELS:
        raise _invalid(f"a version has at most {MAX_LABELS} labels")


def _invalid(message: str) -> Refusal:
    return Refusal(Reason.FIELD_INVALID, message, "labels")
