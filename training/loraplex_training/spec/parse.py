"""A run's options, from flags, a TOML file or both, read strictly into a `RunSpec`, and back.

    [run]                          # a field of RunSpec
    model = "default"
    out = "var/runs/tickets"

    [[job]]                        # one adapter; several train together
    name = "tickets"
    data = "tickets.jsonl"
    method = "lora"
    options = { r = 16, target_modules = "all-linear" }
    lr = 1e-4
    epochs = 2

    [sweep]                        # every job once for each combination: tickets-r4-lr1e-4, …
    r = [4, 16]
    lr = [1e-4, 3e-4]

A key of a job is a field of JobSpec, DataSpec or OptimSpec (`KEYS`); `options` are the method's.
Relative paths count from where the program runs. Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.spec.limits import problems_of
from loraplex_training.spec.spec import RATES, DataSpec, JobSpec, MethodSpec, OptimSpec, RunSpec
from loraplex_training.spec.sweep import expand, literal

RUNS = Path("var/runs")
"""Where a run's folder is made if nobody says where."""

_PARTS: Mapping[str, type] = {
    "data": DataSpec, "method": MethodSpec, "optim": OptimSpec, "": JobSpec
}  # fmt: skip
_CALLED = {
    ("data", "path"): "data",
    ("data", "eval_path"): "eval_data",
    ("method", "name"): "method",
    ("optim", "name"): "optimiser",
}
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


@dataclass(frozen=True, slots=True)
class Key:
    """Where a key's value goes: a part of the job ("" is the job itself) and a field of it."""

    part: str
    field: str
    hint: Any


def _keys() -> dict[str, Key]:
    found = {}
    for part, kind in _PARTS.items():
        for field, hint in get_type_hints(kind).items():
            if part or field not in _PARTS:
                found[_CALLED.get((part, field), field)] = Key(part, field, hint)
    return found


KEYS: Mapping[str, Key] = _keys()
"""What a job may say."""

RUN_KEYS: Mapping[str, Key] = {
    name: Key("run", name, hint) for name, hint in get_type_hints(RunSpec).items() if name != "jobs"
}


def read(
    flags: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
    sweep: Iterable[str] = (),
    config: Path | None = None,
) -> RunSpec:
    """The run that a command line asks for; what it says goes before what the file says.

    Args:
        flags: keys of jobs and of the run, with - or _, as text. They hold for every job.
        options: the method's options, as text ("16", "true", "q_proj,v_proj", "[1, 2]").
        sweep: "r=4,16", "lr=1e-4,3e-4": keys or options of the method, and their values.
        config: a TOML file.

    Raises Refusal(CONFIG_INVALID) with every problem.
    """
    document = _open(config) if config is not None else {"job": [{}]}
    problems: list[str] = []
    run, job = {}, {}
    for flag, value in (flags or {}).items():
        key = flag.replace("-", "_")
        if key in RUN_KEYS:
            run[key] = value
        elif key in KEYS and key != "options":
            job[key] = value
        else:
            problems.append(unknown(f"--{flag}", key, [*KEYS, *RUN_KEYS]))
    swept: dict[str, list[object]] = {}
    for item in sweep:
        name, equals, values = item.partition("=")
        given = [v.strip() for v in values.split(",")]
        if not equals or not all(given):
            problems.append(f"--sweep {item}: it should read like r=4,16 or lr=1e-4,3e-4")
        swept[name.strip().replace("-", "_")] = list(given)
    chosen = {name.replace("-", "_"): literal(text) for name, text in (options or {}).items()}
    return _build(_merged(document, run, job, chosen, swept), problems)


def from_toml(text: str) -> RunSpec:
    """What `to_toml` wrote, or a person; raises Refusal(CONFIG_INVALID) with every problem."""
    try:
        return from_mapping(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise Refusal(Reason.CONFIG_INVALID, f"it is not TOML: {error}") from None


def from_mapping(document: Mapping[str, object]) -> RunSpec:
    """The run that a parsed TOML or JSON document describes; raises as `read`."""
    return _build(document, [])


def to_mapping(spec: RunSpec) -> dict[str, Any]:
    """The same run as plain values, for JSON; `from_mapping` makes an equal one of it."""
    run = {name: _plain(getattr(spec, name)) for name in RUN_KEYS}
    jobs = []
    for job in spec.jobs:
        values = {
            name: getattr(getattr(job, key.part) if key.part else job, key.field)
            for name, key in KEYS.items()
        }
        jobs.append({name: _plain(value) for name, value in values.items() if value is not None})
    return {"run": run, "job": jobs}


def to_toml(spec: RunSpec) -> str:
    """The same run as TOML, every key written out; `from_toml` makes an equal one of it."""
    document = to_mapping(spec)
    lines = ["[run]", *(f"{key} = {_toml(value)}" for key, value in document["run"].items())]
    for job in document["job"]:
        lines += ["", "[[job]]", *(f"{key} = {_toml(value)}" for key, value in job.items())]
    return "\n".join(lines) + "\n"


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else f"; there are {', '.join(known)}"
    return f"{what}: there is no {name!r}{hint}"


def _open(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Refusal(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(Reason.CONFIG_INVALID, f"{path} is not TOML: {error}") from None


def _merged(
    document: Mapping[str, object],
    run: Mapping[str, object],
    job: Mapping[str, object],
    options: Mapping[str, object],
    sweep: Mapping[str, list[object]],
) -> Mapping[str, object]:
    """The document with a command line's values put over its own."""
    merged = dict(document)
    if run and isinstance(merged.setdefault("run", {}), Mapping):
        merged["run"] = {**merged["run"], **run}  # type: ignore[dict-item]
    if sweep and isinstance(merged.setdefault("sweep", {}), Mapping):
        merged["sweep"] = {**merged["sweep"], **sweep}  # type: ignore[dict-item]
    if isinstance(jobs := merged.get("job"), list) and all(isinstance(j, Mapping) for j in jobs):
        jobs = [{**j, **job} for j in jobs]
        for one in jobs:
            if options and isinstance(one.setdefault("options", {}), Mapping):
                one["options"] = {**one["options"], **options}
        merged["job"] = jobs
    return merged


def _build(document: Mapping[str, object], problems: list[str]) -> RunSpec:
    problems += [unknown("the file", n, ("run", "job", "sweep")) for n in document if n not in _TOP]
    run = _table(document.get("run", {}), RUN_KEYS, "[run]", problems)
    tables = document.get("job", [])
    if not isinstance(tables, list):
        problems.append("job should be a list of tables, written [[job]]")
        tables = []
    names = [t["name"] for t in tables if isinstance(t, Mapping) and t.get("name")]
    sweep = document.get("sweep", {})
    if not isinstance(sweep, Mapping):
        problems.append("sweep should be a table of lists, as in r = [4, 16]")
        sweep = {}
    tables, complaints = expand(tables, sweep, KEYS)
    problems += complaints
    jobs = []
    for number, table in enumerate(tables, 1):
        name = table.get("name") if isinstance(table, Mapping) else None
        where = f"job {name!r}" if isinstance(name, str) and name else f"job {number}"
        values = _table(table, KEYS, where, problems)
        missing = [key for key in ("name", "data") if key not in _present(table)]
        problems += [f"{where}: {key} is missing" for key in missing]
        jobs.append(_job({"name": f"unnamed-{number}", "data": Path(), **values}))
    spec = RunSpec(tuple(jobs), **({"out": RUNS / str(names[0] if names else "run")} | run))
    problems += problems_of(spec)
    if problems:
        raise Refusal.listing(Reason.CONFIG_INVALID, problems)
    return spec


_TOP = ("run", "job", "sweep")


def _present(table: object) -> Collection[object]:
    return table if isinstance(table, Mapping) else ()


def _job(values: Mapping[str, Any]) -> JobSpec:
    parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for name, value in values.items():
        parts[KEYS[name].part][KEYS[name].field] = value
    method = parts["method"].get("name", MethodSpec().name)
    if method in RATES:
        parts["optim"].setdefault("lr", RATES[method])
    return JobSpec(
        **parts[""],
        data=DataSpec(**parts["data"]),
        method=MethodSpec(**parts["method"]),
        optim=OptimSpec(**parts["optim"]),
    )


def _table(
    table: object, keys: Mapping[str, Key], where: str, problems: list[str]
) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        problems.append(f"{where} should be a table of keys and values")
        return {}
    values = {}
    for name, value in table.items():
        if name not in keys:
            problems.append(unknown(where, str(name), keys))
            continue
        try:
            values[name] = _typed(value, keys[name].hint)
        except ValueError as error:
            problems.append(f"{where}: {name} is {value!r}; it should be {error}")
    return values


def _typed(value: object, hint: Any) -> Any:
    """A value as its field wants it, given as such or as text; raises ValueError(what it wants)."""
    if NoneType in get_args(hint):
        return None if value == "" else _typed(value, get_args(hint)[0])
    if get_origin(hint) is tuple:
        pair = value.split(",") if isinstance(value, str) else value
        if not isinstance(pair, Sequence) or len(pair) != len(get_args(hint)):
            raise ValueError("two numbers, as in 0.9,0.999")
        return tuple(_typed(one, float) for one in pair)
    if hint is bool:
        text = str(value).lower()
        if text not in _TRUE + _FALSE:
            raise ValueError("true or false")
        return text in _TRUE
    if hint in (int, float):
        return _number(value, hint)
    if hint in (str, Path):
        if not isinstance(value, str):
            raise ValueError("text")
        return hint(value)
    if not isinstance(value, Mapping):
        raise ValueError("a table")
    return dict(value)


def _number(value: object, kind: type[int] | type[float]) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | kind | str):
        raise ValueError(wanted)
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise ValueError(wanted) from None


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml(str(key))} = {_toml(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    assert isinstance(value, int | float), f"{value!r} cannot be written as TOML"
    return repr(value)


def absolute(spec: RunSpec) -> RunSpec:
    """The same run with paths that hold wherever the program runs."""

    def data(of: DataSpec) -> DataSpec:
        other = of.eval_path.absolute() if of.eval_path is not None else None
        return replace(of, path=of.path.absolute(), eval_path=other)

    jobs = tuple(replace(job, data=data(job.data)) for job in spec.jobs)
    model = str(Path(spec.model).absolute()) if Path(spec.model).exists() else spec.model
    out, cache = spec.out.absolute(), spec.cache.absolute()
    return replace(spec, jobs=jobs, out=out, cache=cache, model=model)
