"""Folders of hubs, buckets and disks, read alike: a list of files, and the bytes of each."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from loraplex.sources.addresses import AdapterAddress

MAX_LISTED: Final = 1000
"""Most entries of a folder that are looked at."""

_EXTRA: Final = "pip install 'loraplex[pull]'"
_WITHOUT_LINKS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class PullFailed(Exception):
    """An adapter that could not be fetched; the message says why, without credentials."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as a listing describes it.

    Attributes:
        name: its name in the folder.
        size: bytes.
        sha256: hash of the bytes in hex; "" if the listing does not tell.
        mark: what changes with the bytes, such as an ETag.
    """

    name: str
    size: int
    sha256: str = ""
    mark: str = ""


class RemoteFolder(Protocol):
    """A folder to fetch from. Methods block and raise PullFailed."""

    @property
    def shown(self) -> str:
        """The address, with the commit that is read if there is one."""

    def files(self) -> Sequence[RemoteFile]:
        """The plain files directly in the folder."""

    @contextmanager
    def reading(self, file: RemoteFile) -> Iterator[BinaryIO]:
        """The bytes of a file from its beginning."""

    def unchanged(self, file: RemoteFile) -> bool:
        """Whether the file is still what was listed."""


def opened(address: AdapterAddress) -> RemoteFolder:
    """The folder at an address. Raises PullFailed: no such place, or a package is missing."""
    match address.scheme:
        case "hf":
            return _of_hub(address)
        case "s3":
            return StoredFolder(_filesystem("s3", "s3fs"), _key(address), str(address))
        case "gs":
            return StoredFolder(_filesystem("gs", "gcsfs"), _key(address), str(address))
    return LocalFolder(Path(address.path))


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """A folder of one of fsspec's file systems: of a hub or a bucket.

    Attributes:
        filesystem, path: the file system, and the folder's path in it.
        shown: the address.
        block_size: bytes that are asked for at once; 0 asks for a whole file.
        is_fixed: whether its files never change, as those of a commit.
    """

    filesystem: Any
    path: str
    shown: str
    block_size: int = 8 << 20
    is_fixed: bool = False

    def files(self) -> Sequence[RemoteFile]:
        with _asked(self.shown):
            entries = self.filesystem.ls(self.path, detail=True, refresh=True)
        plain = [each for each in entries[:MAX_LISTED] if each["type"] == "file"]
        return [_listed(each) for each in plain if each["name"].rstrip("/") != self.path]

    @contextmanager
    def reading(self, file: RemoteFile) -> Iterator[BinaryIO]:
        with (
            _asked(self.shown),
            self.filesystem.open(
                f"{self.path}/{file.name}", "rb", block_size=self.block_size
            ) as pieces,
        ):
            yield pieces

    def unchanged(self, file: RemoteFile) -> bool:
        if self.is_fixed:
            return True
        with _asked(self.shown):
            now = self.filesystem.info(f"{self.path}/{file.name}", refresh=True)
        return _listed(now) == file


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of this machine. Links in place of files are not followed."""

    path: Path

    @property
    def shown(self) -> str:
        return f"file://{self.path}"

    def files(self) -> Sequence[RemoteFile]:
        try:
            names = sorted(os.listdir(self.path))[:MAX_LISTED]
            found = {name: os.lstat(self.path / name) for name in names}
        except OSError as error:
            raise PullFailed(f"{self.shown}: {error.strerror}") from None
        for name, status in found.items():
            if stat.S_ISLNK(status.st_mode) and name.startswith("adapter_"):
                raise PullFailed(f"{self.shown}: {name} is a link; give a folder of plain files")
        return [_on_disk(n, s) for n, s in found.items() if stat.S_ISREG(s.st_mode)]

    @contextmanager
    def reading(self, file: RemoteFile) -> Iterator[BinaryIO]:
        try:
            descriptor = os.open(self.path / file.name, _WITHOUT_LINKS)
        except OSError as error:
            raise PullFailed(f"{file.name}: {error.strerror}") from None
        with os.fdopen(descriptor, "rb") as pieces:
            yield pieces

    def unchanged(self, file: RemoteFile) -> bool:
        try:
            return _on_disk(file.name, os.lstat(self.path / file.name)) == file
        except OSError:
            return False


def _of_hub(address: AdapterAddress) -> StoredFolder:
    """The folder at one commit of a hub's repository, so that its files belong together."""
    try:
        from huggingface_hub import HfApi, HfFileSystem
    except ImportError:
        raise _missing("huggingface-hub") from None
    endpoint = os.environ.get("HF_ENDPOINT") or None
    with _asked(str(address)):
        commit = HfApi(endpoint).repo_info(address.place, revision=address.revision or None).sha
    if not commit:
        raise PullFailed(f"{address}: the hub names no commit")
    place = f"{address.place}@{commit}"
    path = f"{place}/{address.path}" if address.path else place
    shown = str(AdapterAddress("hf", address.place, address.path, commit))
    hub = HfFileSystem(endpoint=endpoint, use_listings_cache=False, skip_instance_cache=True)
    return StoredFolder(hub, path, shown, block_size=0, is_fixed=True)


def _filesystem(protocol: str, package: str) -> Any:
    """The file system of a bucket, with the credentials and end points of the environment."""
    try:
        import fsspec  # type: ignore[import-untyped]

        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise _missing(package) from None


def _missing(package: str) -> PullFailed:
    return PullFailed(f"the package {package} is not installed: {_EXTRA}")


@contextmanager
def _asked(shown: str) -> Iterator[None]:
    """Turns what hubs' and buckets' libraries raise into PullFailed, without their texts.

    These texts may have signed URLs and headers in them.
    """
    try:
        yield
    except PullFailed:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 404 or isinstance(error, FileNotFoundError):
            text = "does not exist, or the credentials do not show it"
        elif status in (401, 403) or isinstance(error, PermissionError):
            text = "may not be read with the credentials that there are"
        else:
            text = f"cannot be read: {type(error).__name__}" + (f", {status}" if status else "")
        raise PullFailed(f"{shown} {text}") from None


def _key(address: AdapterAddress) -> str:
    return f"{address.place}/{address.path}" if address.path else address.place


def _listed(entry: dict[str, Any]) -> RemoteFile:
    large = entry.get("lfs") or {}
    hash_of: Callable[[str], Any] = large.get if isinstance(large, dict) else vars(large).get
    mark = next((str(entry[key]) for key in ("ETag", "etag", "blob_id") if entry.get(key)), "")
    return RemoteFile(
        name=entry["name"].rsplit("/", 1)[-1],
        size=int(entry["size"]),
        sha256=str(hash_of("sha256") or ""),
        mark=mark.strip('"'),
    )


def _on_disk(name: str, status: os.stat_result) -> RemoteFile:
    return RemoteFile(name, status.st_size, mark=f"{status.st_ino}:{status.st_mtime_ns}")
