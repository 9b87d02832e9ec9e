"""Runs the commands of a Markdown document the way a reader would: in order, in one shell.

Blocks fenced as `sh` are run by bash, blocks fenced as `python` by this Python; everything else is
text to read. A block that cannot be run here says so in the line before it, with the reason:

    <!-- not run: needs a Docker engine -->

Two words get a meaning of their own, so that the document can stay as a reader needs it:
`loraplex-server serve` (and `make serve`) starts in the background and is waited for; every other
`make` target is checked with `make --dry-run`, since `make test` would run itself. The default
ports are replaced by free ones, wherever the document writes them out.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*$", re.M | re.S
)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S[^\n]*?) -->\s*\Z")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: language, text, first line in the document, and why it is not run."""

    language: str
    text: str
    line: int
    not_run: str


def blocks(document: str) -> list[Block]:
    """Every fenced block in order."""
    found = []
    for match in _FENCE.finditer(document):
        indent = len(match["indent"])
        text = "".join(line[indent:] for line in match["body"].splitlines(keepends=True))
        why = _NOT_RUN.search(document[: match.start()])
        line = document.count("\n", 0, match.start()) + 2
        found.append(Block(match["language"], text, line, why["reason"] if why else ""))
    return found


_PRELUDE = r"""
set -euo pipefail
server_pid=
start_server() {
    "$@" >"$WORK/server.out" 2>"$WORK/server.log" &
    server_pid=$!
    for _ in $(seq 1 2000); do # the first start converts the model
        grep -qs '^ready:' "$WORK/server.out" && return 0
        kill -0 "$server_pid" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 20 "$WORK/server.log" >&2
    echo "the server did not start" >&2
    return 1
}
serve_or_run() {
    if [ "${2:-}" = serve ]; then start_server "$@"; else command "$@"; fi
}
loraplex-server() { serve_or_run "$SCRIPTS/loraplex-server" "$@"; }
.venv/bin/loraplex-server() { serve_or_run "$SCRIPTS/loraplex-server" "$@"; }
loraplex() { "$SCRIPTS/loraplex" "$@"; }
.venv/bin/loraplex() { "$SCRIPTS/loraplex" "$@"; }
make() {
    if [ "${1:-}" = serve ]; then start_server "$SCRIPTS/loraplex-server" serve
    else command make --dry-run "$@" >/dev/null; fi
}
at() { here=$1; echo "== line $here" >&2; }
finish() {
    status=$?
    [ "$status" = 0 ] || echo "the block at line $here failed with status $status" >&2
    if [ -n "$server_pid" ]; then
        kill -TERM "$server_pid" 2>/dev/null || true
        wait "$server_pid" || { echo "the server ended with status $?" >&2; status=1; }
    fi
    exit "$status"
}
here=0
trap finish EXIT
"""


def script(document: str, ports: Mapping[str, int]) -> str:
    """The document's blocks as one bash script. `ports` maps each default port to its stand-in."""
    parts = [_PRELUDE]
    for block in blocks(document):
        if block.not_run or block.language not in {"sh", "python"}:
            continue
        text = block.text
        for default, port in ports.items():
            text = re.sub(rf"\b{default}\b", str(port), text)
        parts.append(f"at {block.line}")
        if block.language == "python":
            text = f'"$PYTHON" -c {shlex.quote(text)}\n'
        parts.append(text)
    return "\n".join(parts)


def run(
    document: str,
    folder: Path,
    work: Path,
    ports: Mapping[str, int],
    environment: Mapping[str, str],
) -> subprocess.CompletedProcess[str]:
    """Runs the document's commands in `folder`. `work` takes the server's output."""
    file = work / "commands.sh"
    file.write_text(script(document, ports))
    return subprocess.run(
        ["bash", str(file)],
        cwd=folder,
        env={
            **environment,
            "WORK": str(work),
            "PYTHON": sys.executable,
            "SCRIPTS": str(Path(sys.executable).parent),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
