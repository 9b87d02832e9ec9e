#!/usr/bin/env python3
"""Runs the scenarios of the web console in Chromium: make test-console

    python scripts/console_tests.py [--real] [--screenshots] [--or-skip] [NAME]

The gateway is one with invented content, or with --real one with a server and the default model,
where scenarios that need a server that misbehaves are left out. NAME runs the scenarios whose names
contain it. --screenshots writes the pictures of the documentation into docs/images instead, those
of the view NAME or all.

Needs Node, and Chromium: the one that $CHROMIUM names (or a Chrome), else an installed one, else
Debian's, which scripts/fetch-chromium unpacks into var/tools. The packages of npm are installed
once. The last line of output is one JSON object: the number of `scenarios`, of those that `passed`,
and of findings of axe that are serious or critical. Where Node, Chromium or a package is missing
and cannot be fetched, the exit code is 1; with --or-skip it is 0, and `skipped` says what it is.
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


class Missing(Exception):
    """What the scenarios need is neither there nor can be fetched."""


def prepare() -> None:
    """Finds Chromium, and installs the packages if they are missing or old. Raises Missing."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise Missing(f"{program} is not installed; on Debian: apt-get install nodejs npm")
    os.environ["CHROMIUM"] = chromium()
    lock = HERE / "package-lock.json"
    if not INSTALLED.exists() or INSTALLED.stat().st_mtime < lock.stat().st_mtime:
        command = ["npm", "ci", "--no-audit", "--no-fund", "--no-progress"]
        if subprocess.run(command, cwd=HERE, check=False, stdout=sys.stderr).returncode:
            raise Missing("npm cannot install the packages of tests/console; see above")
        INSTALLED.touch()


def chromium() -> str:
    """The path of the browser, which is fetched if there is none. Raises Missing."""
    named = os.environ.get("CHROMIUM", "")
    if named:
        found = shutil.which(named)
        if found is None:
            sys.exit(f"error: there is no program {named}, which CHROMIUM names")
        return found
    if subprocess.run([str(ROOT / "scripts" / "fetch-chromium")], check=False).returncode:
        raise Missing("Chromium cannot be fetched; see above")
    tools = ROOT / "var" / "tools" / "bin"
    found = shutil.which("chromium", path=f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert found is not None
    return found


def check() -> None:
    """Checks the console's code. Ends the program if it is wrong."""
    biome = HERE / "node_modules" / ".bin" / "biome"
    command = [str(biome), "check", "--config-path=.", ".", str(STATIC)]
    if subprocess.run(command, cwd=HERE, check=False, stdout=sys.stderr).returncode:
        sys.exit(
            "error: the code of the console or of its scenarios is not as it should be; see above"
        )


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
    parser.add_argument(
        "--or-skip", action="store_true", help="end well where the programs cannot be fetched"
    )
    args = parser.parse_args()
    try:
        prepare()
    except Missing as missing:
        if not args.or_skip:
            sys.exit(f"error: {missing}")
        print(json.dumps({"scenarios": 0, "passed": 0, "axe_serious": 0, "skipped": str(missing)}))
        return 0
    check()
    program = "screenshots.mjs" if args.screenshots else "run.mjs"
    with real() if args.real else fake() as (url, *options):
        command = ["node", str(HERE / program), url, args.name, *options]
        return subprocess.run(command, cwd=HERE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
