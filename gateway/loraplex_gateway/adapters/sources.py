"""Where the files of an adapter are that a request names by a path or a URI."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from loraplex.sources import AdapterAddress, AddressInvalid, AllowList
from loraplex.uploads import CONFIG_FILE, WEIGHTS_FILE

from loraplex_gateway.errors import ApiError
from loraplex_gateway.settings import GatewaySettings, SettingsError

MAX_CONFIG_BYTES: Final = 1 << 20
"""Most bytes of a configuration; the server accepts as many."""

_MAX_PATH: Final = 4096


@dataclass(frozen=True, slots=True)
class ImportedPath:
    """A folder that the server reads: a path relative to its import root."""

    path: str


@dataclass(frozen=True, slots=True)
class SentFolder:
    """A folder that the gateway reads and sends."""

    folder: Path


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """An address that is fetched first."""

    address: AdapterAddress


AdapterSource: TypeAlias = ImportedPath | SentFolder | RemoteAddress


class Sources:
    """Reads what requests name as an adapter's source, within what the operator allows."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Raises SettingsError."""
        try:
            self.allowed = AllowList(settings.allow_sources)
        except AddressInvalid as error:
            raise SettingsError(f"allow_source: {error}") from None
        self._root = settings.adapter_root
        self._import_root = settings.import_root
        self._most_bytes = settings.max_upload_bytes

    def find(self, text: str, param: str) -> AdapterSource:
        """The source that `text` names; `param` is the request's field. Blocks.

        Raises ApiError: 400 for a text that is none, 403 for one that is not allowed, 404 if there
        is no such folder.
        """
        if not text or len(text) > _MAX_PATH or not text.isprintable():
            raise ApiError(400, f"{param} must be a path or a URI", param=param)
        if "://" in text:
            return self._of_uri(text, param)
        if os.path.isabs(text):
            return self._of_path(text, param)
        root = self._root
        if root is not None and _is_below(root, root / text) and (root / text).is_dir():
            return SentFolder(self._within([root], root / text, param))
        if (address := _hub_id(text)) is not None and address in self.allowed:
            return RemoteAddress(address)
        return ImportedPath(text)

    def _of_uri(self, text: str, param: str) -> AdapterSource:
        try:
            address = AdapterAddress.parse(text)
        except AddressInvalid as error:
            raise ApiError(400, f"{param}: {error}", param=param) from None
        if address.scheme == "file":
            if address in self.allowed:
                roots = [Path(folder) for folder in self.allowed.folders]
                return SentFolder(self._within(roots, Path(address.path), param))
            return self._of_path(address.path, param)
        if address not in self.allowed:
            raise _refused(f"{address} begins with no prefix that --allow-source gives", param)
        return RemoteAddress(address)

    def _of_path(self, text: str, param: str) -> AdapterSource:
        """An absolute path: below the gateway's folder, or below the server's import root."""
        if self._root is not None and _is_below(self._root, Path(text)):
            return SentFolder(self._within([self._root], Path(text), param))
        if self._import_root:
            inside = os.path.relpath(os.path.normpath(text), self._import_root)
            if inside != "." and inside != ".." and not inside.startswith("../"):
                return ImportedPath(inside)
        raise _refused("it is below neither --adapter-root nor --import-root", param)

    def _within(self, roots: Sequence[Path], folder: Path, param: str) -> Path:
        """The real path of a folder that is below one of the roots, with all that is read of it.

        What lies outside of the roots is refused before it is looked at, so no answer says what
        there is.
        """
        root = next((root for root in roots if _is_below(root, folder)), None)
        if root is None:
            raise _refused("it leads out of the folders that the operator allows", param)
        real = Path(os.path.realpath(folder))
        if not real.is_dir():
            raise ApiError(404, f"{param}: there is no such folder", param=param, code="not_found")
        for name, most in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, self._most_bytes)):
            if not _is_below(root, real / name):
                raise _refused(f"{name} is a link that leads out of the allowed folders", param)
            try:
                status = os.stat(real / name)
            except OSError:
                continue  # the client says what the folder has instead
            if not stat.S_ISREG(status.st_mode):
                raise ApiError(400, f"{param}: {name} is not a regular file", param=param)
            if status.st_size > most:
                raise ApiError(400, f"{param}: {name} has more than {most} bytes", param=param)
        return real


def _is_below(root: Path, path: Path) -> bool:
    """Whether the real path of `path` is below that of `root`."""
    return Path(os.path.realpath(root)) in Path(os.path.realpath(path)).parents


def _hub_id(text: str) -> AdapterAddress | None:
    """The address of "org/name[@revision]"; None for any other text."""
    try:
        return AdapterAddress.parse(f"hf://{text}")
    except AddressInvalid:
        return None


def _refused(text: str, param: str) -> ApiError:
    return ApiError(403, f"{param}: {text}", param=param, code="source_not_allowed")
