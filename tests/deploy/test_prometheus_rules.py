"""Prometheus accepts our configuration; every alert fires on its trouble and has a runbook."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml
from deploy.dashboard import ROOT

from deploy import exposition

FOLDER = ROOT / "deploy" / "prometheus"


def rules() -> list[dict]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed (`make prometheus` fetches it)")
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(promtool: str, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [promtool, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = [
        case
        for test in yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_every_alert_asks_for_series_that_the_server_exports() -> None:
    known = exposition.series_names()
    for rule in rules():
        assert exposition.mentioned(rule["expr"]) <= known, rule["alert"]


def test_every_alert_has_a_severity_and_a_section_of_the_runbook() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    sections = {
        heading.lower() for heading in re.findall(r"^#+ (Loraplex\w+)$", text, re.MULTILINE)
    }
    for rule in rules():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "docs/operations.md"
        assert anchor == rule["alert"].lower()
        assert anchor in sections, f"{rule['alert']} has no section in docs/operations.md"
    assert sections == {rule["alert"].lower() for rule in rules()}
