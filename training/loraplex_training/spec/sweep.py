"""Sweeps: every job once for each combination of values, under a name that shows them."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from loraplex_model.base.refusal import Problem

MOST = 256
"""Maximum number of jobs that a sweep may make; more is most likely a mistake."""

Table = Mapping[str, Any]


def expand(
    jobs: Sequence[Table], sweep: Table, keys: Collection[str]
) -> tuple[Sequence[Table], list[Problem]]:
    """Returns the jobs' tables multiplied by the sweep's values, and the problems of the sweep.

    A name in `keys` is set on the job, any other among its method's `options`. The job's name gets
    "-<key><value>" for each, in the order of the sweep, reduced to what a name may have.
    """
    problems = []
    for key, values in sweep.items():
        if key in ("name", "options"):
            problems.append(Problem(f"sweep.{key}", f"{key} cannot be swept"))
        elif not isinstance(values, list) or not values:
            text = f"{key} is {values!r}; it should be a list of values"
            problems.append(Problem(f"sweep.{key}", text))
    if not sweep or problems:
        return jobs, problems
    combinations = list(itertools.product(*sweep.values()))
    if (count := len(combinations) * len(jobs)) > MOST:
        text = f"the sweep makes {count} jobs; at most {MOST} train in one run"
        return jobs, [Problem("sweep", text)]
    return [_with(job, zip(sweep, c, strict=True), keys) for job in jobs for c in combinations], []


def literal(text: str) -> object:
    """Reads a value from a command line: as TOML where it is TOML, else as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _with(job: Table, chosen: Iterable[tuple[str, Any]], keys: Collection[str]) -> Table:
    table, options, parts = dict(job), job.get("options", {}), [str(job.get("name"))]
    for key, value in chosen:
        if key in keys:
            table[key] = value
        elif isinstance(options, Mapping):
            own = literal(value) if isinstance(value, str) else value
            table["options"] = options = {**options, key: own}
        parts.append(_slug(key) + _slug(_shown(value)))
    if isinstance(name := job.get("name"), str) and name:
        table["name"] = "-".join(parts)
    return table


def _shown(value: object) -> str:
    """The value as a person would write it: 1e-4, not 0.0001."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return min(f"{value:g}", f"{mantissa}e{int(exponent)}", key=len)
    if isinstance(value, list):
        return "-".join(map(_shown, value))
    return str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
