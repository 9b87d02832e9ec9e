#!/usr/bin/env python3
"""Runs the scenarios of the web console in Chromium: make test-console

    python scripts/console_tests.py [--real] [--screenshots] [NAME]

The gateway is one with invented content, or with --real one with a server and the default model,
where scenarios that need a server that misbehaves are left out. NAME runs the scenarios whose names
contain it. --screenshots writes the pictures of the documentation into docs/images instead, those
of the view NAME or all.

Needs Node, and Chromium: the one that $CHROMIUM names (or a Chrome), else an installed one, else
Debian's, which scripts/fetch-chromium unpacks into var/tools. The packages of npm are installed
once. The last line of output is one JSON object: the number of `scenarios`, of those that `passed`,
and of findings of axe that are serious or critical.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "console"
STATIC = ROOT / "gateway" / "loraplex_gateway" / "console" / "static"
ADAPTERS = ROOT / "examples" / "adapters"
INSTALLED = HERE / "node_modules" / ".package-lock.json"

sys.path.append(str(ROOT / "bench"))


def prepare() -> None:
    """Finds Chromium, installs the packages if they are missing or old, and checks the code."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            sys.exit(f"error: {program} is not installed; on Debian: apt-get install nodejs npm")
    os.environ["CHROMIUM"] = chromium()
    lock = HERE / "package-lock.json"
    if not INSTALLED.exists() or INSTALLED.stat().st_mtime < lock.stat().st_mtime:
        finish(["npm", "ci", "--no-audit", "--no-fund", "--no-progress"])
        INSTALLED.touch()
    biome = HERE / "node_modules" / ".bin" / "biome"
    finish([str(biome), "check", "--config-path=.", ".", str(STATIC)])


def chromium() -> str:
    """The path of the browser; fetched if there is none. Ends the program if it cannot be."""
    named = os.environ.get("CHROMIUM", "")
    if named:
        found = shutil.which(named)
        if found is None:
            sys.exit(f"error: there is no program {named}, which CHROMIUM names")
        return found
    if subprocess.run([str(ROOT / "scripts" / "fetch-chromium")], check=False).returncode:
        sys.exit(1)  # the script has said why
    tools = ROOT / "var" / "tools" / "bin"
    found = shutil.which("chromium", path=f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert found is not None
    return found


def finish(command: list[str]) -> None:
    """Runs a command in the folder of the scenarios. Ends the program if it fails."""
    code = subprocess.run(command, cwd=HERE, check=False, stdout=sys.stderr).returncode
    if code:
        sys.exit(f"error: {' '.join(command[:2])} failed with exit code {code}; see above")


@contextlib.contextmanager
def fake() -> Iterator[list[str]]:
    """A gateway with invented content; yields the arguments of the scenarios' program."""
    command = [sys.executable, str(HERE / "fake_gateway.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as gateway:
        assert gateway.stdin is not None
        assert gateway.stdout is not None
        try:
            yield [json.loads(gateway.stdout.readline())["url"]]
        finally:
            gateway.stdin.close()  # which ends it


@contextlib.contextmanager
def real() -> Iterator[list[str]]:
    """A server with the default model and its gateway, with one adapter in two versions."""
    from loraplex import Client
    from served import Server

    with tempfile.TemporaryDirectory(prefix="console-") as folder:
        work = Path(folder)
        settings = {
            "cache": ROOT / "var" / "cache",
            "store": work / "store",
            "import_root": ADAPTERS,
            "training_jobs_dir": work / "jobs",
            "gateway": "127.0.0.1:0",
        }
        environment = {"LORAPLEX_TRAINING": "true"}
        with Server(settings, work / "log", environment=environment) as server:
            with Client(server.address) as client:
                client.register_adapter("json", "json")
                client.register_adapter("pirate", "pirate")
                changed = work / "pirate"
                shutil.copytree(ADAPTERS / "pirate", changed)
                with (changed / "adapter_config.json").open("a") as config:
                    config.write("\n")  # other bytes are another version
                client.upload_adapter("pirate", changed, replace=True)
                base = client.get_model().name
            files = f"--files={ADAPTERS / 'pirate'}"
            yield [f"http://{server.http}/", "--real", f"--base={base}", files]


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="", metavar="NAME")
    parser.add_argument("--real", action="store_true", help="use a server with the default model")
    parser.add_argument("--screenshots", action="store_true", help="write docs/images")
    args = parser.parse_args()
    prepare()
    program = "screenshots.mjs" if args.screenshots else "run.mjs"
    with real() if args.real else fake() as (url, *options):
        command = ["node", str(HERE / program), url, args.name, *options]
        return subprocess.run(command, cwd=HERE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
