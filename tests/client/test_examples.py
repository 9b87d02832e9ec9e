"""The examples do what their docstrings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from client.fake_server import DIGEST, FakeServer
from loraplex import Client

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_quickstart_asks_the_base_and_every_adapter(server: FakeServer, client: Client):
    client.register_adapter("pirate", "dir")
    done = run("quickstart.py", server.target, "hi")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "--- base model\nbase says hi\n[stop, 3 tokens]\n"
        "--- pirate\npirate says hi\n[stop, 3 tokens]\n"
    )


def test_fanout_asks_all_of_them_and_names_their_weights(server: FakeServer, client: Client):
    client.register_adapter("pirate", "dir")
    client.register_adapter("poet", "dir")
    done = run("async_fanout.py", server.target, "hi")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "--- base model ",
        "base says hi",
        f"--- pirate {DIGEST}",
        "pirate says hi",
        f"--- poet {DIGEST}",
        "poet says hi",
    ]


@pytest.mark.parametrize("name", ["quickstart.py", "async_fanout.py"])
def test_without_a_server_an_example_says_so_in_a_line(name: str):
    done = run(name, "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Connection refused" in done.stderr
