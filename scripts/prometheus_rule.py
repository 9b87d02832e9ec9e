#!/usr/bin/env python3
"""Writes the alerts as an object of the Prometheus operator: make deploy-rules

    python scripts/prometheus_rule.py [--check]

deploy/prometheus/alerts.yml is the source; the object in deploy/kubernetes has the same groups.
With `--check` nothing is written, and the exit code is 1 if the object differs from what would be
written. Needs the standard library only.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "deploy" / "prometheus" / "alerts.yml"
TARGET = ROOT / "deploy/kubernetes/components/observability/prometheusrule.yaml"

HEAD = """\
# Written by `make deploy-rules` from deploy/prometheus/alerts.yml; change that file.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: loraplex
spec:
"""


def rule(alerts: str) -> str:
    """The object for the text of a rule file; comments before its first key are left out."""
    start = alerts.index("groups:")
    return HEAD + textwrap.indent(alerts[start:], "  ")


def main() -> int:
    """The command line; returns the exit code."""
    made = rule(SOURCE.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--check"]:
        return int(not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != made)
    TARGET.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
