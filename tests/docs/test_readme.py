"""What the README tells a reader to type works, in that order."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from docs import commands

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_readme_shows_the_two_commands_that_need_nothing_else() -> None:
    shown = "\n".join(block.text for block in commands.blocks(README) if block.language == "sh")
    assert "make demo" in shown
    assert "make test" in shown


def test_blocks_that_are_not_run_are_few_and_explained() -> None:
    skipped = [block for block in commands.blocks(README) if block.not_run]
    assert len(skipped) <= 3
    assert all(len(block.not_run.split()) >= 2 for block in skipped)
    assert README.count("<!-- not run:") == len(skipped), "a marker that marks nothing"


@pytest.mark.timeout(600)
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    ports = {"50051": free_port(), "9464": free_port()}
    environment = {
        **os.environ,
        "LORAPLEX_PORT": str(ports["50051"]),
        "LORAPLEX_ADMIN_PORT": str(ports["9464"]),
        "LORAPLEX_STORE": str(tmp_path / "store"),
        "LORAPLEX_SERVER": f"127.0.0.1:{ports['50051']}",
    }
    done = commands.run(README, ROOT, tmp_path, ports, environment)
    log = tmp_path / "server.log"
    assert done.returncode == 0, (
        done.stdout[-4000:]
        + done.stderr[-4000:]
        + (log.read_text()[-4000:] if log.exists() else "")
    )


# The harness itself


def harness(document: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return commands.run(document, ROOT, tmp_path, {"50051": 4242}, os.environ)


def test_blocks_share_one_shell_and_run_in_order(tmp_path: Path) -> None:
    text = "```sh\nwhere=here\n```\ntext\n- item\n  ```sh\n  echo $where 50051 150051\n  ```\n"
    assert harness(text, tmp_path).stdout == "here 4242 150051\n"


def test_a_command_that_fails_names_its_line(tmp_path: Path) -> None:
    done = harness("# Title\n\n```sh\ntrue\n```\n\n```sh\nfalse\necho not reached\n```\n", tmp_path)
    assert done.returncode == 1
    assert "the block at line 8 failed" in done.stderr
    assert "not reached" not in done.stdout


def test_a_make_target_that_does_not_exist_fails(tmp_path: Path) -> None:
    assert harness("```sh\nmake no-such-target\n```\n", tmp_path).returncode != 0


def test_python_blocks_run_and_marked_and_other_blocks_do_not(tmp_path: Path) -> None:
    text = (
        "```python\nprint('it\\'s python')\n```\n"
        "<!-- not run: it would break -->\n```sh\nfalse\n```\n```text\nfalse\n```\n"
    )
    done = harness(text, tmp_path)
    assert (done.returncode, done.stdout) == (0, "it's python\n")
    assert [block.not_run for block in commands.blocks(text)] == ["", "it would break", ""]


@pytest.mark.parametrize("block", ["```sh\nloraplex-server serve --no-such-flag\n```\n"])
def test_a_server_that_does_not_start_fails(block: str, tmp_path: Path) -> None:
    done = harness(block, tmp_path)
    assert done.returncode != 0
    assert "the server did not start" in done.stderr
