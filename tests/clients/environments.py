"""An environment for each client, since their requirements exclude each other's and ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from clients.documents import Example

INSTALL_SECONDS = 300
LARGE_INSTALL_SECONDS = 1200
"""Of an environment that is made only if it is asked for."""
AT_ONCE = 4
"""Environments made at once: installers mostly wait for the registry and for the disk."""

_WRONG: Final = re.compile(
    r"No solution found|Failed to build|npm (?:error|ERR!) code (?:E404|ETARGET|ERESOLVE)"
)
"""What installers print if the registry has answered and the packages are at fault."""


class CannotInstall(Exception):
    """An environment cannot be made here and now, for example because a registry is silent."""


class WrongPackages(Exception):
    """The packages that the document names do not exist, or exclude each other."""


class Environments:
    """The environments of some clients, made side by side in the background.

    Each is a folder below `root` and is made once; again if its packages or the Python change. Use
    it in a `with` statement, whose end stops what is still being installed.
    """

    def __init__(self, root: Path, examples: Sequence[Example]) -> None:
        self._root = root
        self._examples = examples
        self._index = _index()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._made: dict[str, Future[Path]] = {}

    def __enter__(self) -> Self:
        self._made = {each.name: self._pool.submit(self._make, each) for each in self._examples}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def of(self, example: Example) -> Path:
        """The folder of a client's environment, once it is made.

        Raises CannotInstall or WrongPackages.
        """
        return self._made[example.name].result()

    def _make(self, example: Example) -> Path:
        folder = self._root / example.name
        if example.variable:
            return _made_by_hand(example, folder)
        wanted = [example.language, *example.packages, sys.version]
        digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
        mark = folder / "made"
        if mark.exists() and mark.read_text() == digest:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        limit = LARGE_INSTALL_SECONDS if example.flagged else INSTALL_SECONDS
        if example.language == "js":
            (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
            quiet = ["--no-audit", "--no-fund", "--no-progress", "--fetch-timeout=60000"]
            self._run(["npm", "install", *quiet, *example.packages], folder, limit)
        else:
            uv = str(Path(sys.executable).with_name("uv"))
            self._run([uv, "venv", "--quiet", "--python", sys.executable, "venv"], folder, limit)
            python = ["--python", str(folder / "venv/bin/python")]
            words = [uv, "pip", "install", *self._index, *python, *example.packages]
            self._run(words, folder, limit)
        mark.write_text(digest)
        return folder

    def _run(self, words: Sequence[str], folder: Path, limit: float) -> None:
        log = folder / "install.log"
        deadline = time.monotonic() + limit
        with log.open("w") as output:
            try:
                process = subprocess.Popen(
                    words,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise CannotInstall(f"{words[0]} cannot be run: {error.strerror}") from None
            while process.poll() is None:
                if self._stopped.wait(0.1) or time.monotonic() > deadline:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise CannotInstall(f"{log} did not end within {limit} s")
        if process.returncode:
            said = log.read_text(errors="replace").strip()
            kind = WrongPackages if _WRONG.search(said) else CannotInstall
            raise kind(f"exit status {process.returncode} of {Path(words[0]).name}: {said[-1500:]}")


def _made_by_hand(example: Example, folder: Path) -> Path:
    python = Path(os.environ.get(example.variable, ""))
    if not os.access(python, os.X_OK) or not python.is_file():
        raise CannotInstall(f"{example.variable} names no Python with {example.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "venv").symlink_to(python.absolute().parents[1])
    return folder


def command(example: Example, folder: Path, script: Path) -> list[str]:
    """The command that runs a script of the example's language in its environment."""
    if example.language == "python":
        return [str(folder / "venv/bin/python"), str(script)]
    if example.language == "js":
        return ["node", str(script)]
    return ["bash", "-euo", "pipefail", str(script)]


def variables(folder: Path) -> dict[str, str]:
    """The variables of a client's processes: its own programs first, and nobody is told of it."""
    programs = [str(folder / "venv/bin"), str(folder / "node_modules/.bin")]
    path = os.pathsep.join([*programs, os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {
        **kept,
        "PATH": path,
        "OPENAI_API_KEY": "x",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / "hub"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
        "PROMPTFOO_CONFIG_DIR": str(folder / "promptfoo"),
        "PROMPTFOO_DISABLE_TELEMETRY": "1",
        "PROMPTFOO_DISABLE_UPDATE": "1",
        "NO_COLOR": "1",
    }


def _index() -> list[str]:
    """Options that make uv ask the index that pip is set to."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    found = (
        os.environ.get("PIP_INDEX_URL")
        or subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    )
    return ["--default-index", found] if found else []
