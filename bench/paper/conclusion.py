"""The common end of the benchmarks in this folder: the asserted relations and one JSON line."""

from __future__ import annotations

import json
from collections.abc import Mapping

from paper.small_model import HOME
from report import json_line

RESULTS = HOME / "results"
"""Folder in which `make figures` finds the results of the last runs."""


def conclude(name: str, values: Mapping[str, object], relations: Mapping[str, bool]) -> int:
    """Prints which relations hold, stores the values for the figures, and prints the JSON line.

    Returns the exit status: 1 if a relation does not hold.
    """
    print()
    for relation, holds in relations.items():
        print(f"{'holds' if holds else 'FAILS'}  {relation}")
    line = json_line({"bench": name, **values, "relations": relations})
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(json.loads(line), indent=1))
    print(line)
    return 0 if all(relations.values()) else 1
