"""Starts a server on free ports, runs a command against it, and stops the server.

    python scripts/with_server.py COMMAND [ARGUMENT ...]

The command finds the server in LORAPLEX_SERVER, and wherever an argument says `{server}`. The
variables LORAPLEX_* configure the server as usual. Exits with the command's status.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    """Returns the command's exit status, or 1 if the server did not start."""
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    server = subprocess.Popen(
        [Path(sys.executable).with_name("loraplex-server"), "serve"],
        env={"LORAPLEX_LOG_LEVEL": "warning", **os.environ, "LORAPLEX_PORT": "0", "LORAPLEX_ADMIN_PORT": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        ready = server.stdout.readline() if server.stdout else ""
        if not ready.startswith("ready: grpc "):
            print("the server did not start", file=sys.stderr)
            return 1
        print(ready, end="", flush=True)
        address = ready.split()[2]
        arguments = [argument.replace("{server}", address) for argument in command]
        return subprocess.run(
            arguments, env={**os.environ, "LORAPLEX_SERVER": address}, check=False
        ).returncode
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
