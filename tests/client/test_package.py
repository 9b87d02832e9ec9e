"""The package is light to import, and its stubs are those of the protos."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import loraplex

ROOT = Path(__file__).resolve().parents[2]


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_importing_the_client_loads_nothing_heavy():
    loaded = modules_after("import loraplex")
    heavy = {"torch", "numpy", "transformers", "typer", "rich", "pydantic", "loraplex_server"}
    assert "grpc" in loaded
    assert loaded & heavy == set()


def test_the_command_line_loads_no_model_code():
    loaded = modules_after("import loraplex.cli")
    assert "typer" in loaded
    assert loaded & {"torch", "numpy", "transformers", "loraplex_server", "loraplex_model"} == set()


def test_everything_public_is_there():
    assert [name for name in loraplex.__all__ if not hasattr(loraplex, name)] == []
    assert list(loraplex.__all__) == sorted(loraplex.__all__, key=str)


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "proto/generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_committed_stubs_match_the_protos():
    done = generate("--check")
    assert (done.returncode, done.stdout) == (0, "")


def test_drifted_missing_and_stale_stubs_are_named(tmp_path: Path):
    shutil.copytree(ROOT / "client/loraplex/v1", tmp_path / "loraplex/v1")
    stubs = tmp_path / "loraplex/v1"
    (stubs / "adapter_pb2.py").write_text("# edited by hand\n")
    (stubs / "adapter_pb2.pyi").unlink()
    (stubs / "removed_pb2.py").write_text("")
    done = generate("--check", "--client", str(tmp_path))
    assert done.returncode == 1
    assert "differ from proto/: adapter_pb2.py, adapter_pb2.pyi, removed_pb2.py;" in done.stdout


def test_the_protos_pass_buf_lint():
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run(
        [str(buf), "lint"], cwd=ROOT / "proto", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
