#!/usr/bin/env python3
"""Asks a real Prometheus for everything that dashboards and alerts show: make check-observability

    python scripts/check_observability.py

Starts a server over the tests' oracle engine with a gateway, and a Prometheus that scrapes both
every second, sends traffic of every kind (adapters, merges, refusals, training jobs, limits, a lost
engine, requests over HTTP), and then evaluates the queries of all panels of all dashboards. Of each
rule the health, the series and the labels that it matches are looked up, since the expression of an
alert that does not fire returns nothing. The tests of the rules are run with promtool, and each
rule must have one in which it fires. The last line of output is one JSON object:

panels                panels of all dashboards
panels_without_data   those of which some query returned nothing
series_without_data   series that server and gateway export, by their code, and were never scraped
rules                 alerting and recording rules
rules_without_data    those that name a series or a label which there is not
rule_tests            cases in the tests of the rules

Exit code 1 if a panel, a series or a rule has no data, or a rule has no test or fails it; 2 if
there is no Prometheus (`make prometheus`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from telemetry.collector import collecting  # noqa: E402

from deploy import dashboard, exposition, live, traffic  # noqa: E402

FOLDER = ROOT / "deploy" / "prometheus"
VARIABLES = {
    "job": ".*",
    "instance": ".*",
    "principal": ".*",
    "__rate_interval": "5s",
    "__range": "1m",
}
SCRAPES = 6
"""Scrapes with traffic before the engine crashes, and again after it is back."""

_SELECTOR = re.compile(r"\b(up|loraplex_[a-z_]+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


def main() -> int:
    """The command line; returns the exit code."""
    binary = shutil.which("prometheus")
    if binary is None or shutil.which("promtool") is None:
        print("error: there is no Prometheus; `make prometheus` fetches it", file=sys.stderr)
        return 2
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "500"
    with tempfile.TemporaryDirectory() as directory, collecting() as collector:
        folder = Path(directory)
        given = {
            **traffic.settings(folder),
            "otlp_endpoint": collector.endpoint,
            "gateway": "127.0.0.1:0",
        }
        with (
            live.server(folder, **given) as server,
            live.prometheus(binary, folder, server.admin, server.gateway) as prometheus,
        ):
            start = time.time()
            drive(folder, server, prometheus)
            return report(prometheus, start, time.time())


def drive(folder: Path, server: live.Server, prometheus: live.Prometheus) -> None:
    """Sends traffic of every kind, for some scrapes before and after a crash of the engine."""
    key = (folder / "operator.key").read_text()
    with traffic.callers(folder, server.target) as callers:
        traffic.prepare(callers.operator)
        traffic.train(callers.operator, folder)
        for _ in range(2):
            scrapes = live.scraped(prometheus)

            def enough(before: int = scrapes) -> bool:
                traffic.use(callers)
                traffic.trouble(callers)
                traffic.over_http(server.gateway, key)
                return live.scraped(prometheus) >= before + SCRAPES

            live.wait_for(enough, 120)
            traffic.crash(callers.operator)
            live.wait_for(lambda: traffic.answers(callers.operator), 60)


def report(prometheus: live.Prometheus, start: float, end: float) -> int:
    """Prints what has no data, and the figures; returns the exit code."""
    panels, empty = 0, set()
    for file in dashboard.ALL:
        board = dashboard.load(file)
        panels += sum(panel["type"] != "row" for panel in dashboard.panels(board))
        for query in dashboard.queries(board):
            if not prometheus.values(query.filled(VARIABLES), start, end):
                empty.add((file.stem, query.panel))
                print(f"no data: {file.stem}, {query.panel}: {query.expr}")
    rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    faulty = {rule["name"] for rule in rules for _ in faults(rule, prometheus, start, end)}
    cases, untested = tests_of({rule["name"] for rule in rules})
    missing = exposition.series_names() - set(prometheus.api("label/__name__/values"))
    for name in sorted(missing):
        print(f"never scraped: {name}")
    figures = {
        "panels": panels,
        "panels_without_data": len(empty),
        "series_without_data": len(missing),
        "rules": len(rules),
        "rules_without_data": len(faulty),
        "rule_tests": cases,
    }
    for name in untested:
        print(f"no test in which it fires: {name}")
    is_tested = promtool("test", "rules", "alerts_test.yml")
    print(json.dumps(figures))
    return int(bool(empty or missing or faulty or untested or not is_tested))


def faults(
    rule: dict[str, Any], prometheus: live.Prometheus, start: float, end: float
) -> Iterator[str]:
    """Prints and yields what a rule asks for that there is not."""
    if rule["health"] != "ok":
        yield complain(f"{rule['name']} cannot be evaluated: {rule.get('lastError', '')}")
    for name, matchers in _SELECTOR.findall(rule["query"]):
        selector = ",".join(f'{label}!=""' for label in _LABEL.findall(matchers))
        expr = f"{name}{{{selector}}}" if selector else name
        if not prometheus.values(expr, start, end):
            yield complain(f"{rule['name']}: no data for {expr}")


def complain(text: str) -> str:
    """Prints a line and returns it."""
    print(text)
    return text


def tests_of(names: set[str]) -> tuple[int, set[str]]:
    """The number of cases in the tests of rules, and the rules without one in which they fire."""
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    alerts = [case for test in tests for case in test.get("alert_rule_test", [])]
    queries = [case for test in tests for case in test.get("promql_expr_test", [])]
    tested = {case["alertname"] for case in alerts if case["exp_alerts"]}
    tested |= {name for case in queries for name in names if name in case["expr"]}
    return len(alerts) + len(queries), names - tested


def promtool(*arguments: str) -> bool:
    """Whether promtool succeeds; prints what it says otherwise."""
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout + done.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
