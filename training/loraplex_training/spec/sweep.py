"""A sweep: every job once for each combination of values, named for them."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence

MOST = 256
"""Jobs that a sweep may make; more is a slip of the hand."""


def expand(
    jobs: Sequence[object], sweep: Mapping[str, object], keys: Collection[str]
) -> tuple[list[object], list[str]]:
    """The jobs' tables multiplied by the sweep's values, and what is wrong with the sweep.

    A name in `keys` is set on the job, any other among its method's `options`. The job's name gets
    "-<key><value>" for each, in the order of the sweep, reduced to what a name may have.
    """
    problems = []
    for key, values in sweep.items():
        if key in ("name", "options"):
            problems.append(f"sweep: {key} cannot be swept")
        elif not isinstance(values, list) or not values:
            problems.append(f"sweep: {key} is {values!r}; it should be a list of values")
    if not sweep or problems:
        return list(jobs), problems
    lists = [values for values in sweep.values() if isinstance(values, list)]
    combinations = list(itertools.product(*lists))
    if len(combinations) * len(jobs) > MOST:
        made = f"{len(combinations)} times {len(jobs)} jobs"
        return list(jobs), [f"sweep: it makes {made}; at most {MOST} train in one run"]
    return [_with(job, list(zip(sweep, c, strict=True)), keys) for job in jobs for c in combinations
            ], []  # fmt: skip


def literal(text: str) -> object:
    """A value written on a command line: what TOML reads in it, or else the text as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _with(job: object, chosen: Sequence[tuple[str, object]], keys: Collection[str]) -> object:
    if not isinstance(job, Mapping):
        return job  # the reader says what is wrong with it
    table = dict(job)
    for key, value in chosen:
        if key in keys:
            table[key] = value
        elif isinstance(table.setdefault("options", {}), Mapping):
            table["options"] = {
                **table["options"],
                key: literal(value) if isinstance(value, str) else value,
            }
    if isinstance(name := job.get("name"), str) and name:
        table["name"] = "-".join([name, *(_slug(key) + _slug(_shown(v)) for key, v in chosen)])
    return table


def _shown(value: object) -> str:
    """As a person would write it: 1e-4, not 0.0001."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return min(f"{value:g}", f"{mantissa}e{int(exponent)}", key=len)
    if isinstance(value, list):
        return "-".join(map(_shown, value))
    return str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
