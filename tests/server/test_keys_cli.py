"""`loraplex-server keys`: what it prints, where, how it exits, and that it never shows a secret."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from access.access_files import PRINCIPALS
from loraplex_server.access.identity import keys
from loraplex_server.access.identity.key_file import KeyFile
from loraplex_server.commands.program import app
from typer.testing import CliRunner, Result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "principals.toml").write_text(PRINCIPALS)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Any:
    def invoke(command: str, *arguments: str, principals: str = "principals.toml") -> Result:
        where = ["--keys", str(folder / "keys.json")]
        if principals:
            where += ["--principals", str(folder / principals)]
        return CliRunner().invoke(app, ["keys", command, *arguments, *where])

    return invoke


def listed(run: Any) -> dict[str, dict[str, Any]]:
    shown = run("ls", "--json")
    assert shown.exit_code == 0, shown.output
    return {row["id"]: row for row in json.loads(shown.stdout)}


def test_a_key_is_printed_once_and_alone(run: Any, folder: Path) -> None:
    made = run("add", "search", "--note", "of the [red]importer[/red], é日本")
    assert made.exit_code == 0, made.output
    text = made.stdout.removesuffix("\n")
    parts = keys.split(text)
    assert parts is not None
    key_id, secret = parts
    assert secret not in made.stderr
    assert f"key {key_id} of search does not expire" in made.stderr
    assert keys.accept(text, KeyFile(folder / "keys.json").read(), datetime.now(UTC)).id == key_id
    (row,) = listed(run).values()
    assert (row["principal"], row["state"], row["expires"]) == ("search", "active", None)
    assert row["note"] == "of the [red]importer[/red], é日本"
    assert row["principal_exists"]
    shown = run("ls")
    assert "[red]importer[/red], é日本" in shown.stdout
    for output in (shown.output, json.dumps(row), run("revoke", key_id).output):
        assert secret not in output
        assert keys._hash(secret) not in output


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("90d", timedelta(days=90)),
        ("2w", timedelta(weeks=2)),
        ("1h", timedelta(hours=1)),
        ("30m", timedelta(minutes=30)),
        ("45s", timedelta(seconds=45)),
        ("2127-01-01", datetime(2127, 1, 1, tzinfo=UTC)),
        ("2127-01-01T12:00", datetime(2127, 1, 1, 12, tzinfo=UTC)),
        ("2127-01-01T12:00+02:00", datetime(2127, 1, 1, 10, tzinfo=UTC)),
    ],
)
def test_a_key_ends_when_it_is_told(run: Any, when: str, expected: timedelta | datetime) -> None:
    before = datetime.now(UTC)
    assert run("add", "search", "--expires", when).exit_code == 0
    (row,) = listed(run).values()
    end = datetime.fromisoformat(row["expires"])
    if isinstance(expected, datetime):
        assert end == expected
    else:
        after = datetime.now(UTC)
        assert before + expected - timedelta(seconds=1) <= end <= after + expected


@pytest.mark.parametrize(
    "when",
    ["", "90", "d", "-1d", "0s", "90y", "1.5d", "٣d", "tomorrow", "2020-01-01", "2127-13-01",
     "9" * 5000 + "d", "9999999999w", "99999999w",
     "9999-12-31T23:59-23:59", "0001-01-01T00:00+23:59"],
)  # fmt: skip
def test_an_end_that_is_none_or_has_passed_is_refused(run: Any, folder: Path, when: str) -> None:
    refused = run("add", "search", f"--expires={when}")
    assert refused.exit_code == 2, refused.output
    assert refused.stdout == ""
    assert not (folder / "keys.json").exists()


def test_a_key_is_made_only_for_a_principal_that_exists(run: Any, folder: Path) -> None:
    refused = run("add", "serach")
    assert refused.exit_code == 1
    assert "has no principal 'serach'; it has ops, search" in refused.stderr
    assert refused.stdout == ""
    assert not (folder / "keys.json").exists()
    assert run("add", "serach", principals="").exit_code == 0
    assert run("add", "Not A Name", principals="").exit_code == 2
    (row,) = listed(run).values()
    assert (row["state"], row["principal_exists"]) == ("active", False)
    assert "active, no such principal" in run("ls").stdout


@pytest.mark.parametrize("note", ["x" * 201, "two\nlines", "\x1b[31m"])
def test_a_note_is_a_short_line(run: Any, note: str) -> None:
    assert run("add", "search", "--note", note).exit_code == 2


def test_a_key_is_revoked_by_its_id_or_by_itself_and_no_message_repeats_it(run: Any) -> None:
    first, second = (run("add", "search").stdout.strip() for _ in range(2))
    by_id = run("revoke", first.split("_")[1])
    assert by_id.exit_code == 0
    assert "was revoked at" in by_id.stdout
    again = run("revoke", first)
    assert again.stdout == by_id.stdout
    assert run("revoke", second).exit_code == 0
    assert {row["state"] for row in listed(run).values()} == {"revoked"}
    for wrong in ("0000000000", second[:-1], second.upper(), "nothing"):
        refused = run("revoke", wrong)
        assert refused.exit_code in (1, 2)
        assert second.rpartition("_")[2][:20] not in refused.output.lower()


def test_keys_that_ended_are_pruned(run: Any, folder: Path) -> None:
    file = KeyFile(folder / "keys.json")
    old, _ = file.add("search", datetime.now(UTC) - timedelta(days=31))
    revoked, _ = file.add("search")
    kept, _ = file.add("ops")
    file.revoke(revoked.id)
    assert run("prune").stdout == f"key {old.id} of search was removed\n1 removed\n"
    assert run("prune", "--older-than", "99999999w").stdout == "0 removed\n"
    for wrong in ("", "x", "30", "-1d", "9" * 100 + "d"):
        assert run("prune", f"--older-than={wrong}").exit_code == 2
    removed = run("prune", "--older-than", "0s")
    assert removed.exit_code == 0
    assert listed(run).keys() <= {kept.id, revoked.id}
    assert kept.id in listed(run)


def test_nothing_to_list(run: Any) -> None:
    assert run("ls").stdout == "no keys\n"
    assert listed(run) == {}
    assert run("prune").stdout == "0 removed\n"


def test_a_damaged_file_of_keys_ends_every_command_and_is_not_overwritten(
    run: Any, folder: Path
) -> None:
    file = folder / "keys.json"
    file.write_text("{ damaged")
    file.chmod(0o600)
    for command in (["add", "search"], ["ls"], ["revoke", "0000000000"], ["prune"]):
        ended = run(*command)
        assert ended.exit_code == 2, command
        assert ended.stderr.startswith(f"error: {file}: "), command
        assert ended.stdout == ""
    assert file.read_text() == "{ damaged"


def test_keys_are_listed_and_revoked_whatever_is_wrong_with_the_principals(
    run: Any, folder: Path
) -> None:
    key_id = run("add", "search").stdout.split("_")[1]
    (folder / "principals.toml").write_text("wrong")
    assert run("add", "search").exit_code == 2
    shown = run("ls")
    assert shown.exit_code == 0
    assert key_id in shown.stdout
    assert shown.stderr.startswith("warning: ")
    assert run("revoke", key_id).exit_code == 0


def test_a_place_that_cannot_be_written_is_named(run: Any, folder: Path) -> None:
    (folder / "keys.json").mkdir()
    refused = run("add", "search")
    assert refused.exit_code == 2
    assert "keys.json" in refused.stderr
    (folder / "file").write_text("")
    ended = CliRunner().invoke(app, ["keys", "add", "a", "--keys", str(folder / "file" / "keys")])
    assert ended.exit_code == 1
    assert "Not a directory" in ended.stderr


def test_the_command_needs_neither_torch_nor_grpc_nor_the_reader_of_tokens(folder: Path) -> None:
    code = (
        "import sys\n"
        "from loraplex_server.cli import main\n"
        f"sys.argv = ['loraplex-server', 'keys', 'ls', '--keys', {str(folder / 'k.json')!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print(*({'torch', 'grpc', 'joserfc', 'pydantic'} & set(sys.modules)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert ran.stdout == "no keys\npydantic\n"
