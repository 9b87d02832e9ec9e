"""An environment for each client, since their requirements exclude each other's and ours."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from clients.documents import Example

INSTALL_SECONDS = 900


class CannotInstall(Exception):
    """An environment cannot be made; the text is the end of what the installer printed."""


def prepared(example: Example, root: Path) -> Path:
    """The folder of a client's environment below `root`, made if it is not there yet.

    It is made again if the packages change. Raises CannotInstall.
    """
    folder = root / example.name
    wanted = json.dumps([example.language, *example.packages])
    mark = folder / "made"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if example.language == "js":
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        _run(["npm", "install", "--no-audit", "--no-fund", *example.packages], folder)
    elif example.packages:
        uv = str(Path(sys.executable).with_name("uv"))
        _run([uv, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")], folder)
        python = str(folder / "venv/bin/python")
        _run([uv, "pip", "install", "--quiet", "--python", python, *example.packages], folder)
    mark.write_text(digest)
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


def _run(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        words,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    if done.returncode:
        raise CannotInstall(f"{' '.join(words[:4])} ...: {done.stdout[-1500:]}")
