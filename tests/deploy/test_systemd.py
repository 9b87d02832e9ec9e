"""The units of systemd: what they name exists, and systemd finds nothing wrong with them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from deploy.dashboard import ROOT
from deploy.test_orchestration import settings_of
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit
from loraplex_server.runtime.shutdown import EXIT_SECONDS
from pydantic import TypeAdapter

FOLDER = ROOT / "deploy" / "systemd"
UNIT = FOLDER / "loraplex-server.service"
DROP_INS = sorted((FOLDER / "loraplex-server.service.d").iterdir())

MOST_EXPOSED = 20
"""Highest exposure that `systemd-analyze security` may find, in tenths: 0 is none, 100 the most."""


def named(files: list[Path]) -> str:
    return "+".join(file.name.partition(".")[0] for file in files) or "unit"


def entries(*files: Path) -> dict[str, list[str]]:
    """The values of each key of the section Service, in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in files:
        section = ""
        for line in file.read_text().splitlines():
            if line.startswith("["):
                section = line
            elif section == "[Service]" and line and line[0] not in "#;":
                key, _, value = line.partition("=")
                found[key].append(value)
    return found


def variables(*files: Path) -> dict[str, str]:
    words = [word for line in entries(*files)["Environment"] for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


def installed(folder: Path, *drop_ins: Path) -> Path:
    """A copy of the unit whose program exists, with drop-ins."""
    program = folder / "loraplex-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = UNIT.read_text().replace("/opt/loraplex/bin/loraplex-server", str(program))
    unit = folder / UNIT.name
    unit.write_text(text)
    for drop_in in drop_ins:
        target = folder / f"{UNIT.name}.d" / drop_in.name.removesuffix(".example")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(drop_in, target)
    return unit


@pytest.fixture(scope="module")
def analyze() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed, so the units cannot be verified")
    return program


@pytest.mark.parametrize("drop_ins", [[], *([each] for each in DROP_INS), DROP_INS], ids=named)
def test_systemd_finds_nothing_wrong(analyze: str, tmp_path: Path, drop_ins: list[Path]) -> None:
    unit = installed(tmp_path, *drop_ins)
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr, done.stderr


def test_the_service_is_hardly_exposed(
    analyze: str, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    unit = installed(tmp_path)
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--json=short", str(unit)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    found = json.loads(done.stdout)
    exposure = sum(float(each["exposure"] or 0) for each in found)
    print(f"exposure: {exposure:.1f}")
    limit = subprocess.run(
        [analyze, "security", "--offline=true", f"--threshold={MOST_EXPOSED}", str(unit)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    (overall,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", limit.stdout)
    record_property("exposure", overall)
    assert limit.returncode == 0, limit.stdout


def test_the_unit_starts_a_program_of_the_package_that_notifies() -> None:
    found = entries(UNIT)
    (command,) = found["ExecStart"]
    program, *arguments = shlex.split(command)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(program).name in scripts
    assert arguments == ["serve"]
    assert found["Type"] == ["notify"]


@pytest.mark.parametrize("drop_ins", [[], *([each] for each in DROP_INS)], ids=named)
def test_every_setting_exists_and_is_valid(drop_ins: list[Path]) -> None:
    settings = settings_of(variables(UNIT, *drop_ins))
    assert settings.keys() <= Config.model_fields.keys()
    TypeAdapter(Config).validate_python(settings)


def test_what_the_server_writes_is_in_directories_that_systemd_gives_it() -> None:
    found = entries(UNIT)
    state = {f"/var/lib/{name}" for name in found["StateDirectory"][0].split()}
    cache = {f"/var/cache/{name}" for name in found["CacheDirectory"][0].split()}
    told = settings_of(variables(UNIT))
    assert {told[name] for name in ("store", "import_root", "training_jobs_dir")} <= state
    assert {told["cache"]} == cache
    assert str(Path(told["keys"]).parent) in state
    assert found["DynamicUser"] == ["yes"]
    assert found["ProtectSystem"] == ["strict"]


def test_a_stop_has_time_to_drain_and_reaches_the_server_alone() -> None:
    found = entries(UNIT)
    drain = Config.model_fields["drain_timeout"].default
    assert float(found["TimeoutStopSec"][0].removesuffix("s")) > drain + EXIT_SECONDS
    assert found["KillMode"] == ["mixed"]


def test_an_end_that_a_start_cannot_mend_is_final() -> None:
    found = entries(UNIT)
    assert found["Restart"] == ["on-failure"]
    final = {int(code) for code in found["RestartPreventExitStatus"][0].split()}
    assert final == {ServerExit.BAD_CONFIG, ServerExit.NO_MODEL}


def test_credentials_that_a_setting_names_are_loaded() -> None:
    (access,) = [each for each in DROP_INS if each.name.startswith("access")]
    loaded = {line.partition(":")[0] for line in entries(access)["LoadCredential"]}
    told = {v.removeprefix("%d/") for v in variables(access).values() if v.startswith("%d/")}
    assert told == loaded
