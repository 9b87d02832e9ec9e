"""What the server keeps for fine-tuning over HTTP: labels of the job and of its adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loraplex_gateway.errors import ApiError
from loraplex_gateway.models.ids import FOREIGN_ID

MAX_METADATA: Final = 16
"""Most entries of a job's metadata."""

_OURS: Final = "loraplex.dev/"
_SUFFIX: Final = f"{_OURS}suffix"
_TRAINING_FILE: Final = f"{_OURS}training-file"
_VALIDATION_FILE: Final = f"{_OURS}validation-file"
_KEY: Final = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}", re.ASCII)
_MAX_VALUE: Final = 256


@dataclass(frozen=True, slots=True)
class JobLabels:
    """What a job's labels say. Jobs that were not created over HTTP have none of it.

    Attributes:
        model: the model id of the job's adapter.
        metadata: the client's own.
    """

    model: str = ""
    suffix: str = ""
    training_file: str = ""
    validation_file: str = ""
    metadata: Mapping[str, str] | None = None

    @classmethod
    def read(cls, labels: Mapping[str, str]) -> JobLabels:
        """Reads the labels of a job."""
        own = {key: text for key, text in labels.items() if not key.startswith(_OURS)}
        return cls(
            labels.get(FOREIGN_ID, ""),
            labels.get(_SUFFIX, ""),
            labels.get(_TRAINING_FILE, ""),
            labels.get(_VALIDATION_FILE, ""),
            own,
        )

    def written(self) -> dict[str, str]:
        """The labels of a new job. Raises ApiError (400) if the metadata cannot be labels."""
        found = {
            FOREIGN_ID: self.model,
            _SUFFIX: self.suffix,
            _TRAINING_FILE: self.training_file,
            _VALIDATION_FILE: self.validation_file,
        }
        ours = {key: text for key, text in found.items() if text}
        return {**_checked(self.metadata or {}), **ours}


def _checked(metadata: Mapping[str, str]) -> Mapping[str, str]:
    if len(metadata) > MAX_METADATA:
        raise _refused(f"has at most {MAX_METADATA} entries")
    for key, text in metadata.items():
        if not _KEY.fullmatch(key) or key.startswith(_OURS):
            form = "must match [a-z0-9][a-z0-9._/-]{0,62} and not begin with loraplex.dev/"
            raise _refused(f"becomes labels of the adapter; the key {key[:64]!r} {form}")
        if len(text) > _MAX_VALUE or not text.isprintable():
            form = f"must have at most {_MAX_VALUE} characters, all of them printable"
            raise _refused(f"becomes labels of the adapter; the value of {key!r} {form}")
    return metadata


def _refused(text: str) -> ApiError:
    return ApiError(400, f"metadata: {text}", param="metadata", code="invalid_value")
