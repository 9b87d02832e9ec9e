"""The page about security agrees with the code: roles, the example, keys of the file, tokens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from docs.commands import blocks
from loraplex_server.access.identity import principals_file
from loraplex_server.access.identity.principals_file import read_principals
from loraplex_server.access.identity.tokens import ALGORITHMS, LEEWAY
from loraplex_server.access.principals import PrincipalLimits
from loraplex_server.access.roles import ALL_ROLES, METHOD_ROLES, OPEN_METHODS, Role
from loraplex_server.commands.program import app

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "security.md").read_text()


def rows(first: str) -> dict[str, list[str]]:
    """The rows of the table headed `first`, by their first cells."""
    lines = PAGE.split(f"\n| {first} |")[1].splitlines()[2:]
    table = (line for line in lines[: lines.index("")])
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return {key.strip("`"): others for key, *others in cells}


def test_the_table_of_roles_is_the_codes() -> None:
    listed = {role: set(re.findall(r"`(\w+)`", cells[0])) for role, cells in rows("role").items()}

    def methods(role: Role) -> set[str]:
        return {
            method.rpartition("/")[2]
            for method, roles in METHOD_ROLES.items()
            if role in roles and roles != ALL_ROLES
        }

    assert listed == {
        **{str(role): methods(role) for role in Role},
        "any role": {m.rpartition("/")[2] for m, r in METHOD_ROLES.items() if r == ALL_ROLES},
        "nobody needs one": {method.rpartition("/")[2] for method in OPEN_METHODS},
    }


def test_the_example_of_a_file_of_principals_is_one(tmp_path: Path) -> None:
    (example,) = [block for block in blocks(PAGE) if block.language == "toml"]
    file = tmp_path / "principals.toml"
    file.write_text(example.text)
    known = read_principals(file)
    assert set(known.by_name) == {"search", "chat", "operator"}
    search, operator = known.by_name["search"], known.by_name["operator"]
    assert search.sees({"team": "search"})
    assert not search.sees({"team": "chat"})
    assert known.by_name["chat"].sees({"team": "search", "stage": "live"})
    assert operator.sees_all
    assert operator.roles == ALL_ROLES
    assert known.certificates["search.example"] is search


def test_the_keys_of_the_file_are_listed() -> None:
    fields = principals_file._Entry.model_fields
    listed = rows("key")
    assert listed.keys() == fields.keys()
    assert {key for key, cells in listed.items() if cells[0] == "(required)"} == {"roles"}
    limits = set(re.findall(r"`(\w+)`", listed["limits"][1]))
    assert limits == set(PrincipalLimits.__dataclass_fields__)


def test_the_algorithms_of_tokens_are_listed() -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith("- Signatures: "))
    listed = re.findall(r"\b(?:[REP]S\d+|EdDSA|Ed\d+)\b", line.split(". ")[0])
    assert tuple(listed) == ALGORITHMS
    assert f"at most {LEEWAY} s" in PAGE


@pytest.mark.parametrize(
    "line",
    [line for block in blocks(PAGE) for line in block.text.splitlines() if "keys " in line],
)
def test_every_command_of_the_page_exists_with_its_flags(line: str) -> None:
    """Parsed, not run: whatever is no option of the command raises."""
    program, group, name, *arguments = shlex.split(line)
    assert (program, group) == ("loraplex-server", "keys")
    keys = typer.main.get_command(app).commands[group]
    keys.commands[name].make_context(name, list(arguments))
