"""How the benches of the papers' claims end: what was asserted, and one JSON line."""

from __future__ import annotations

import json
from collections.abc import Mapping

from paper.small_model import HOME
from report import json_line

RESULTS = HOME / "results"
"""Where `make figures` finds what the last runs gave."""


def conclude(name: str, values: Mapping[str, object], relations: Mapping[str, bool]) -> int:
    """Prints each relation and whether it holds, keeps the values for the figures, and ends with
    the JSON line. Returns the exit status: 1 if a relation does not hold.
    """
    print()
    for relation, holds in relations.items():
        print(f"{'holds' if holds else 'FAILS'}  {relation}")
    line = json_line({"bench": name, **values, "relations": relations})
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(json.loads(line), indent=1))
    print(line)
    return 0 if all(relations.values()) else 1
