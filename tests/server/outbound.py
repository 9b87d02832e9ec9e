"""Notices every attempt to reach another machine: of this process, and of others."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

SOURCE: Final = Path(__file__).with_name("outbound.c")

_watched: list[list[str]] = []
_hooked: list[bool] = []


def compiled(folder: Path) -> Path | None:
    """Compiles the library that reports attempts; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "outbound.so"
    flags = ["-x", "c", "-shared", "-fPIC", "-O1", "-w", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return library


def environment(library: Path, report: Path) -> dict[str, str]:
    """Variables with which a process and its children report attempts to the file `report`."""
    return {"LD_PRELOAD": str(library), "LORAPLEX_TEST_OUTBOUND": str(report)}


def attempts(report: Path) -> list[str]:
    """What was reported."""
    return report.read_text().splitlines() if report.exists() else []


@contextmanager
def watched() -> Iterator[list[str]]:
    """Attempts of this process's Python code within the context, in order."""
    if not _hooked:  # a hook cannot be removed again
        _hooked.append(True)
        sys.addaudithook(_hook)
    found: list[str] = []
    _watched.append(found)
    try:
        yield found
    finally:
        _watched.remove(found)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if isinstance(address, tuple) and not _is_here(str(address[0])):
            _report(f"{event} {address[0]}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
        name = host.decode() if isinstance(host, bytes) else host
        if name and not _is_here(name):
            _report(f"{event} {name}")


def _report(what: str) -> None:
    for found in _watched:
        found.append(what)
    raise PermissionError(f"a test reached out: {what} ({os.getpid()})")


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
