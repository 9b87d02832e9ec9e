"""Files of examples as OpenAI's clients know them."""

from __future__ import annotations

import re
from typing import Any, Final

from loraplex import DataFile

from loraplex_gateway.errors import ApiError

PURPOSE: Final = "fine-tune"

_PREFIX: Final = "file-"
_ID: Final = re.compile(r"file-([0-9a-f]{12}-[0-9a-f]{8})", re.ASCII)


def file_object(file: DataFile) -> dict[str, Any]:
    """The description of a file. What it holds is checked when a job is created with it."""
    return {
        "id": file_id(file.data_id),
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.create_time.timestamp()) if file.create_time else 0,
        "filename": file.filename,
        "purpose": PURPOSE,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }


def file_id(data_id: str) -> str:
    """The id of a file over HTTP."""
    return _PREFIX + data_id


def data_id(file: str, param: str = "id") -> str:
    """The server's id of a file. Raises ApiError (404) for what cannot be the id of one."""
    found = _ID.fullmatch(file)
    if found is None:
        raise no_file(file, param)
    return found[1]


def no_file(file: str, param: str = "id") -> ApiError:
    """The error for a file that does not exist for the caller."""
    return ApiError(404, f"No such File object: {file[:100]}", param=param, code="file_not_found")
