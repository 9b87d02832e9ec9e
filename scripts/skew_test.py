"""Runs a server of an earlier commit beside this one, on one store, with clients of both.

    python scripts/skew_test.py                    # against DEFAULT
    python scripts/skew_test.py --before v0.1.0    # a tag, a branch or a commit of this repository

The earlier commit is checked out into a temporary directory and runs with the packages of this
environment. Both servers use the oracle engine of their own tests, so no model is needed. Prints a
line for every check, and exits with 1 if one fails. The protos are compared with `buf breaking`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "56a0fed"
PACKAGES = ("client", "model", "adapters", "training", "server", "tests")

CONFIG = """
import json, sys
from pathlib import Path
from server.test_process import write_config
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
(folder / "import").mkdir(parents=True, exist_ok=True)
print(write_config(folder, **{k: Path(v) if k == "store" else v for k, v in settings.items()}))
"""
ADAPTER = """
import sys
from pathlib import Path
from rpc.harness import write_adapter
write_adapter(Path(sys.argv[1]), int(sys.argv[2]))
"""
POSTGRESQL = """
import sys
from adapters import postgres
print(postgres.new_database() or "", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Side:
    """A checkout: its programs, run with its own packages."""

    name: str
    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Python finds this checkout's packages."""
        paths = os.pathsep.join(str(self.root / package) for package in PACKAGES)
        return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def python(self, *arguments: object) -> str:
        """What Python prints with these arguments. Raises CalledProcessError."""
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            done.check_returncode()
        return done.stdout

    def client(self, server: str, *arguments: object) -> str:
        """What this checkout's command line prints for a call to a server."""
        return self.python("-m", "loraplex", "--server", server, *arguments)

    @contextlib.contextmanager
    def serving(self, folder: Path, **settings: str) -> Iterator[str]:
        """A server of this checkout; yields its address, and ends it with SIGTERM."""
        url = settings.pop("store_url", "")  # a settings file would show it
        file = self.python("-c", CONFIG, folder / self.name, json.dumps(settings)).strip()
        process = subprocess.Popen(
            [sys.executable, "-m", "loraplex_server.cli", "serve", "--config", file],
            env={**self.environment, "LORAPLEX_STORE_URL": url},
            stdout=subprocess.PIPE,
            stderr=(folder / f"{self.name}.log").open("a"),
            text=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            found = re.match(r"ready: grpc (\S+) ", line)
            if found is None:
                process.wait(60)
                said = (folder / f"{self.name}.log").read_text()[-1000:]
                raise RuntimeError(f"the {self.name} server does not start: {said}")
            yield found[1]
            process.terminate()
            if process.wait(60) != 0:
                raise RuntimeError(f"the {self.name} server ended with {process.returncode}")
        finally:
            process.kill()
            process.wait()


class Checks:
    """Runs checks by name, and counts those that fail."""

    def __init__(self) -> None:
        self.failed = 0

    def run(self, name: str, work: Callable[[], object], wanted: object = None) -> None:
        """Runs `work`; if `wanted` is given, its result must be that."""
        try:
            found = work()
            good = wanted is None or found == wanted
            note = "" if good else f": {found!r}, not {wanted!r}"
        except (subprocess.CalledProcessError, RuntimeError, ValueError, KeyError) as error:
            good, note = False, f": {error}"
        self.failed += not good
        print(f"{'ok' if good else 'FAILED'}  {name}{note}", flush=True)


def names(side: Side, server: str) -> list[str]:
    """Names of the adapters that a client of this side sees at a server."""
    listed = json.loads(side.client(server, "adapters", "list", "--json"))
    rows = listed["adapters"] if isinstance(listed, dict) else listed
    return sorted(row["name"] for row in rows)


def answer(side: Side, server: str, *arguments: str) -> str:
    """A greedy answer."""
    given = ("--temperature", "0", "--max-new-tokens", "6", *arguments)
    return side.client(server, "generate", "the quick", *given)


def life(check: Checks, side: Side, server: str, other: str, name: str, source: Path) -> None:
    """An adapter's life by a client of `side` at `server`, seen by another server too."""
    what = f"{side.name} client, {name}"
    check.run(f"{what}: upload", lambda: side.client(server, "adapters", "upload", name, source))
    check.run(f"{what}: label", lambda: side.client(server, "adapters", "label", name, "team=ops"))
    check.run(f"{what}: alias", lambda: side.client(server, "adapters", "alias", f"{name}-x", name))
    here = answer(side, server, "--adapter", name)
    check.run(
        f"{what}: the other server serves its alias",
        lambda: answer(side, other, "--adapter", f"{name}-x"),
        here,
    )
    check.run(f"{what}: delete", lambda: side.client(other, "adapters", "delete", name))
    check.run(f"{what}: gone at both", lambda: name in names(side, server), False)
    check.run(f"{what}: restore", lambda: side.client(server, "adapters", "restore", name))
    check.run(f"{what}: served again", lambda: answer(side, other, "--adapter", name), here)


def on_one_store(check: Checks, old: Side, new: Side, folder: Path, url: str) -> None:
    """Both servers on one store, then the old one alone again, and a backup by the new one."""
    settings = {"store": str(folder / "store"), "store_url": url}
    sources = []
    for seed in range(4):
        sources.append(folder / f"source-{seed}")
        new.python("-c", ADAPTER, sources[-1], seed)
    with old.serving(folder, **settings) as before, new.serving(folder, **settings) as after:
        pairs = (
            (old, before, after, "old-at-old"),
            (new, after, before, "new-at-new"),
            (old, after, before, "old-at-new"),
            (new, before, after, "new-at-old"),
        )
        for number, (side, server, other, name) in enumerate(pairs):
            life(check, side, server, other, name, sources[number])
        everything = sorted(name for *_, name in pairs)
        for side in (old, new):
            for server, whose in ((before, "old"), (after, "new")):
                seen = f"{side.name} client sees all at the {whose} server"
                check.run(seen, lambda s=side, a=server: names(s, a), everything)
    with old.serving(folder, **settings) as before:
        check.run("the old server alone again", lambda: names(old, before), everything)
        check.run("it serves", lambda: bool(answer(old, before, "--adapter", "new-at-new")), True)
    program = ("-m", "loraplex_server.cli", "store")
    where = ("--store", settings["store"])
    variables = {"LORAPLEX_STORE_URL": url} if url else {}
    with _variables(variables):
        alone = "--no-training"  # the default directory of jobs may be somebody's
        backup = (*program, "backup", folder / "backup", alone, *where)
        check.run("backup", lambda: new.python(*backup))
        check.run("verify", lambda: new.python(*program, "verify", *where))
    again = ("--store", folder / "recovered")
    recover = (*program, "recover", folder / "backup", alone, *again)
    check.run("recover", lambda: new.python(*recover))
    listed = (*program, "ls", "--json", *again)
    check.run(
        "the old program reads what was recovered",
        lambda: sorted(row["name"] for row in json.loads(old.python(*listed))),
        everything,
    )


@contextlib.contextmanager
def _variables(added: dict[str, str]) -> Iterator[None]:
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def postgresql(new: Side) -> Iterator[str]:
    """URL of an empty database of a server that ends with this context; "" without one."""
    process = subprocess.Popen(
        [sys.executable, "-c", POSTGRESQL],
        env=new.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A checkout of a commit, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="loraplex-skew-") as top:
        place = Path(top) / "old"
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=DEFAULT, help=f"the earlier commit ({DEFAULT})")
    parser.add_argument("--no-postgresql", action="store_true", help="test SQLite only")
    arguments = parser.parse_args()
    check = Checks()
    with checked_out(arguments.before) as place, tempfile.TemporaryDirectory() as folder:
        old, new = Side("old", place), Side("new", ROOT)
        buf = [str(Path(sys.executable).parent / "buf"), "breaking", "--against", place / "proto"]
        compared = "protos: nothing that the earlier commit uses was changed"
        check.run(compared, lambda: subprocess.run(buf, cwd=ROOT / "proto", check=True))
        print(f"SQLite, {arguments.before} and this version")
        on_one_store(check, old, new, Path(folder) / "sqlite", "")
        if not arguments.no_postgresql:
            with postgresql(new) as url:
                print(
                    f"PostgreSQL, {arguments.before} and this version" if url else "no PostgreSQL"
                )
                if url:
                    on_one_store(check, old, new, Path(folder) / "postgresql", url)
    print(f"{check.failed} failed" if check.failed else "all passed")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
