#!/usr/bin/env python3
"""Writes the libraries of the web console: python scripts/vendor_console.py

`npm pack` fetches the packages named in `vendor.json` and checks their integrity. The files that
the console needs are copied into `static/vendor/`, with their licences and their SHA-256. Two
edits are made: the import of "preact" in its hooks names the file beside it, since browsers do not
know package names, and the lines that name source maps are left out.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "gateway" / "loraplex_gateway" / "console" / "static" / "vendor"
MANIFEST = VENDOR / "vendor.json"


def packed(name: str, version: str, integrity: str, folder: Path) -> tuple[tarfile.TarFile, str]:
    """The package's archive, and its integrity; ends the program if it is another one."""
    command = ["npm", "pack", "--json", f"{name}@{version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)[0]
    if integrity and report["integrity"] != integrity:
        sys.exit(f"{name} {version}: its integrity is not that of {MANIFEST.name}")
    return tarfile.open(folder / report["filename"]), report["integrity"]


def edited(data: bytes) -> bytes:
    """The file as browsers can load it."""
    text = data.decode().replace('from"preact"', 'from"./preact.mjs"')
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("//# sourceMappingURL=")]
    return "".join(kept).encode()


def main() -> None:
    """Copies the files and writes the manifest."""
    manifest = json.loads(MANIFEST.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for entry in manifest["packages"]:
            archive, entry["integrity"] = packed(
                entry["name"], entry["version"], entry.get("integrity", ""), Path(folder)
            )
            for target, file in entry["files"].items():
                member = archive.extractfile(f"package/{file['from']}")
                assert member is not None, "a file of the archive"
                data = edited(member.read())
                file["sha256"] = hashlib.sha256(data).hexdigest()
                (VENDOR / target).write_bytes(data)
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
