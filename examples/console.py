"""The web console on a server with two adapters: make console

    python examples/console.py [--port 8000]

Starts a server with the default model, trains on request, registers `examples/adapters/pirate` and
`json`, prints the address of the console, and serves until Ctrl-C. What is uploaded and trained
meanwhile is dropped at the end. The first start downloads and converts the model and compiles the
kernels.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from loraplex import Client, LoraplexError

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))

from served import Server, ServerError, exit_on_sigterm  # noqa: E402

ADAPTERS = ROOT / "examples" / "adapters"
NAMES = ("pirate", "json")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 if the server was ended by a signal, else 1."""
    args = parse(argv)
    exit_on_sigterm()
    work = ROOT / "var" / "demo"
    work.mkdir(parents=True, exist_ok=True)
    store = Path(tempfile.mkdtemp(prefix="console-", dir=work))
    settings = {
        "cache": args.cache,
        "store": store / "store",
        "import_root": ADAPTERS,
        "training_jobs_dir": store / "jobs",
        "gateway": f"127.0.0.1:{args.port}",
    }
    log, training = work / "console.log", {"LORAPLEX_TRAINING": "true"}
    server = Server(settings, log, timeout=args.timeout, environment=training)
    print("starting the server (the first time takes about a minute)", flush=True)
    try:
        with server:
            with Client(server.address) as client:
                for name in NAMES:
                    client.register_adapter(name, name, load=True)
            print(f"console: http://{server.http}/  (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        print()
    except (ServerError, LoraplexError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(store, ignore_errors=True)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, help="port for HTTP; 0 takes a free one")
    parser.add_argument("--cache", type=Path, default=ROOT / "var" / "cache")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds until it must serve")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
