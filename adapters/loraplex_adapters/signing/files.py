"""SHA-256 of an adapter's two files, which a signature lists."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, opened

TEMPLATE_FILE: Final = "chat_template.jinja"
"""Name under which a signature lists the chat template that a version brings."""

_PIECE: Final = 1 << 20
_NO_LIMIT: Final = 1 << 62


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of each of the two files of an adapter, by name.

    Raises Refusal as opening an adapter does.
    """
    with opened(folder) as directory:
        digests = {CONFIG_FILE: hashlib.sha256(directory.read_config()).hexdigest()}
        with directory.open(WEIGHTS_FILE, _NO_LIMIT) as file:
            weights = hashlib.sha256()
            buffer = memoryview(bytearray(min(_PIECE, file.size)))
            for start in range(0, file.size, _PIECE):
                piece = buffer[: min(_PIECE, file.size - start)]
                file.read_into(piece, start)
                weights.update(piece)
        digests[WEIGHTS_FILE] = weights.hexdigest()
    return digests
