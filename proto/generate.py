"""Generate client/loraplex/v1 from proto/, or check that what is committed still matches.

    python proto/generate.py            # write the stubs
    python proto/generate.py --check    # exit 1 and name the files that differ

The stubs demand a gRPC and protobuf runtime no older than the generator, so the generator's version
is pinned in pyproject.toml and this script refuses another.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

PROTO = Path(__file__).resolve().parent
CLIENT = PROTO.parent / "client"
PACKAGE = Path("loraplex/v1")
GENERATOR = {"grpcio-tools": "1.85.1", "mypy-protobuf": "5.1.0"}


def generate(out: Path) -> None:
    """Write the stubs of every file under proto/ below `out`. Raises CalledProcessError."""
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    command = [
        sys.executable,
        *("-m", "grpc_tools.protoc", f"--plugin=protoc-gen-mypy_grpc={plugin}", "-I", str(PROTO)),
        *(f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")),
        f"--mypy_grpc_out=quiet:{out}",
        *sources,
    ]
    subprocess.run(command, check=True)


def stubs(root: Path) -> dict[str, bytes]:
    """The generated files below `root` by name."""
    return {path.name: path.read_bytes() for path in (root / PACKAGE).glob("*_pb2*.py*")}


def drift(committed: Path) -> list[str]:
    """Names of the stubs below `committed` that differ from fresh ones, miss or are left over."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = stubs(Path(scratch))
    there = stubs(committed)
    return sorted(
        name for name in fresh.keys() | there.keys() if fresh.get(name) != there.get(name)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--client", type=Path, default=CLIENT, help="where loraplex/v1 lies")
    arguments = parser.parse_args()
    for name, wanted in GENERATOR.items():
        if version(name) != wanted:
            print(f"{name} is {version(name)}; the stubs need {wanted}: install the dev extra")
            return 2
    if arguments.check:
        names = drift(arguments.client)
        if names:
            print(f"stubs differ from proto/: {', '.join(names)}; run: python proto/generate.py")
        return 1 if names else 0
    generate(arguments.client)
    return 0


if __name__ == "__main__":
    sys.exit(main())
