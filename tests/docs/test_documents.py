"""The documents agree with the code, with each other, and with the files that they point at."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit
from loraplex_server.rpc import server
from loraplex_server.rpc.calls import arriving, bounds
from loraplex_server.rpc.calls.errors import TABLE
from loraplex_server.rpc.services import health, reflection, watching
from loraplex_server.rpc.services.live import engine as live
from loraplex_server.runtime import admin
from loraplex_server.training import table as table_of_jobs
from loraplex_server.training.files import shelf

from deploy import exposition

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
DOCUMENTS = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")})


def tracked() -> list[Path]:
    """The repository's text files: tracked ones, and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    files = [ROOT / name for name in listed.splitlines()]
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()[:4096]]


def table(document: str, first: str) -> dict[str, list[str]]:
    """The rows of the table headed `first`: the first cell, without backquotes, to the others."""
    lines = iter(document.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            break
    else:
        pytest.fail(f"there is no table of {first}")
    assert set(next(lines)) <= set("|-: ")
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        key, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[key.strip("`")] = cells
    return rows


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    prose = re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_error_table_is_the_codes() -> None:
    documented = {reason: cells[0] for reason, cells in table(OPERATIONS, "reason").items()}
    assert documented == {reason.name: row.code.name for reason, row in TABLE.items()}


def test_every_reason_of_the_table_is_given_somewhere() -> None:
    sources = [
        file.read_text()
        for package in ("model", "adapters", "training", "server")
        for file in (ROOT / package).rglob("*.py")
        if file.name not in ("refusal.py", "errors.py")
    ]
    given = set(re.findall(r"\bReason\.([A-Z_]+)\b", "\n".join(sources)))
    assert {reason.name for reason in TABLE} <= given


def test_the_configuration_table_is_the_codes() -> None:
    rows = table(OPERATIONS, "setting")
    shown = {name for name, field in Config.model_fields.items() if field.repr}
    assert rows.keys() == shown
    documented = Config.model_validate({name: cells[0].strip("`") for name, cells in rows.items()})
    defaults = {name: field.default for name, field in Config.model_fields.items()}
    assert {name: getattr(documented, name) for name in shown} == {n: defaults[n] for n in shown}


def test_the_metrics_table_is_the_codes() -> None:
    documented = {name: cells[0] for name, cells in table(OPERATIONS, "metric").items()}
    assert documented == exposition.families()


def test_the_table_of_exit_codes_is_the_codes() -> None:
    assert table(OPERATIONS, "exit code").keys() == {str(int(code)) for code in ServerExit}


def test_the_table_of_what_clients_may_hold_is_the_codes() -> None:
    rows = list(table(OPERATIONS, "what").values())
    options = dict(server.OPTIONS)
    in_code = [
        (),
        (options["grpc.server_handshake_timeout_ms"] / 1000,),
        (options["grpc.max_connection_idle_ms"] / 60_000,),
        (
            options["grpc.max_connection_age_ms"] / 60_000,
            options["grpc.max_connection_age_grace_ms"] / 60_000,
        ),
        (options["grpc.max_concurrent_streams"],),
        (arriving.ARRIVAL_SECONDS,),
        (arriving.MAX_HALF_SENT, bounds.MAX_MESSAGE_BYTES >> 20),
        (arriving.SILENCE_SECONDS,),
        (),
        (shelf.MAX_STREAMS, shelf.MAX_STREAMS_PER_PEER),
        (shelf.MAX_READERS,),
        (
            watching.MAX_WATCHERS,
            live.MAX_WATCHES,
            table_of_jobs.MAX_WATCHERS,
            health.MAX_HEALTH_WATCHERS,
            reflection.MAX_REFLECTIONS,
        ),
        (admin.MAX_HTTP_CONNECTIONS, admin.HTTP_SECONDS),
    ]
    numbers = [tuple(map(float, re.findall(r"\d+", cells[0]))) for cells in rows]
    assert numbers == in_code


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_metric_that_a_document_mentions_exists(document: Path) -> None:
    known = exposition.series_names() | exposition.families().keys()
    known |= exposition.gateway_families().keys()
    assert exposition.mentioned(document.read_text()) <= known


def links(document: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), link


def test_every_make_target_that_a_document_mentions_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE):
            assert target in targets, f"{document.name}: make {target}"


def test_make_help_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    phony = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE).group(1).split())
    explained = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", makefile, re.MULTILINE))
    assert explained.keys() == phony
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert all(text in shown for text in explained.values())


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        re.match(r"[\w.-]+", requirement).group().lower()
        for requirements in (project["dependencies"], *project["optional-dependencies"].values())
        for requirement in requirements
    } - {"loraplex"}
    text = (ROOT / "docs" / "dependencies.md").read_text()
    first_cells = re.findall(r"^\| (`[^|]+) \|", text.split("## Not packages")[0], re.MULTILINE)
    explained = {name.lower() for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    assert explained == declared


def test_the_lock_holds_every_direct_dependency_at_an_exact_version() -> None:
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    ]
    pinned = {}
    for line in lines:
        name, _, version = line.partition("==")
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), line
        pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    assert pinned["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in requirements:
            name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()
            assert name == "loraplex" or name in pinned, requirement


@pytest.mark.parametrize(
    "document", ["guarantees.md", "adapters.md", "threats.md", "vllm-tests.md"]
)
def test_every_test_that_the_guarantees_name_exists(document: str) -> None:
    text = (ROOT / "docs" / document).read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert named
    for file in {file for file, _ in named}:
        assert (ROOT / file).is_file(), file
        tree = ast.parse((ROOT / file).read_text())
        defined = {getattr(node, "name", "") for node in tree.body}
        for node in tree.body:
            if isinstance(node, ast.Assign):
                defined |= {ast.unparse(target) for target in node.targets}
        missing = {name for where, name in named if where == file and name} - defined
        assert not missing, file


def test_every_file_that_a_document_names_exists() -> None:
    folders = "adapters|bench|client|deploy|docs|examples|gateway|model|proto|scripts|server|"
    folders += "tests|training"
    for document in DOCUMENTS:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text()):
            assert (ROOT / name).exists(), f"{document.name}: {name}"


def test_the_architecture_shows_every_room_and_every_contract_of_imports() -> None:
    shown = (ROOT / "docs" / "architecture.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    contracts = {contract["name"] for contract in project["importlinter"]["contracts"]}
    assert table(shown, "contract").keys() == contracts
    tree = shown.split("## Where things are")[1].split("## Allowed imports")[0]
    for package in project["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert f" {package}/" in tree
        for module in (ROOT / package).rglob("__init__.py"):
            room = module.parent
            assert room == ROOT / package or f"  {room.name}/" in tree, room


def test_nothing_names_a_path_of_the_machine_it_was_written_on() -> None:
    # The patterns are put together here so that this file does not match itself.
    places = "|".join(
        ["work/(main|scratch|shared)", r"root/(?!\.cache/pip\b)", "home/[a-z]", "opt/(pypi|wheels)"]
    )
    pattern = re.compile(rf"(?<![\w.}}])/({places})")
    offenders = {
        f"{file.relative_to(ROOT)}:{number}"
        for file in tracked()
        if file != Path(__file__)
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    }
    assert not offenders


def test_every_fault_has_a_test_and_every_marker_a_row() -> None:
    rows = set(re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "faults.md").read_text(), re.M))
    assert rows, "there is no table of faults"
    marked = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"mark\.fault\(\s*\"([a-z-]+)\"", file.read_text())
    }
    assert marked == rows
