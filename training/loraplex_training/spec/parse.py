"""Reads a run's options from flags, a TOML file or both into a `RunSpec`, and writes them back.

    [run]                          # an option of RunSpec
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

The keys of a job are the options of JobSpec, DataSpec, MethodSpec and OptimSpec (`KEYS`), flat.
Relative paths are relative to the working directory. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from loraplex_model.base.refusal import Problem, Reason, Refusal
from pydantic import BaseModel, ConfigDict, create_model
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from loraplex_training.spec import fields
from loraplex_training.spec.spec import RATES, DataSpec, JobSpec, MethodSpec, OptimSpec, RunSpec
from loraplex_training.spec.sweep import expand, literal

RUNS = Path("var/runs")
"""Directory for the directories of runs whose `out` is not given."""

_PARTS: Mapping[str, type] = {"data": DataSpec, "method": MethodSpec, "optim": OptimSpec}


@dataclass(frozen=True, slots=True)
class Key:
    """An option's place: a part of the job ("" is the job itself, or the run) and its field.

    Attributes:
        kind: the dataclass that declares the field.
        hint: the annotated type; `default` is MISSING where a value is required.
    """

    part: str
    kind: type
    field: str
    hint: Any
    default: Any


def _keys(kind: type, part: str = "") -> dict[str, Key]:
    """The options that a dataclass declares, by their keys in files."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):
        if field.name in ("jobs", *_PARTS):
            continue
        hint, made = hints[field.name], field.default_factory
        default = field.default if made is MISSING else made()
        name = FieldInfo.from_annotation(hint).alias or field.name
        found[name] = Key(part, kind, field.name, hint, default)
    return found


KEYS: Mapping[str, Key] = {
    **{name: key for part, kind in _PARTS.items() for name, key in _keys(kind, part).items()},
    **_keys(JobSpec),
}
"""The options of a job."""

RUN_KEYS: Mapping[str, Key] = _keys(RunSpec)
"""The options of the run itself."""


def _model(name: str, keys: Mapping[str, Key]) -> type[BaseModel]:
    made: dict[str, Any] = {
        name: (key.hint, ... if key.default is MISSING else key.default)
        for name, key in keys.items()
    }
    return create_model(name, __config__=fields.STRICT, **made)


_JOB = _model("job", KEYS)
_RUN = _model("run", RUN_KEYS)


class _Document(BaseModel):
    """A file's tables. Unknown ones are in `model_extra`."""

    model_config = ConfigDict(extra="allow")

    run: dict[str, Any] = {}
    job: list[dict[str, Any]] = []
    sweep: dict[str, Any] = {}


def read(
    flags: Mapping[str, str | list[str]] | None = None,
    options: Mapping[str, str] | None = None,
    sweep: Iterable[str] = (),
    config: Path | None = None,
) -> RunSpec:
    """Reads the run that a command line asks for. The command line overrides the file.

    Args:
        flags: options of jobs and of the run, with - or _, as text; a list for a flag that was
            repeated. They apply to every job.
        options: options of the method, as text ("16", "true", "q_proj,v_proj", "[1, 2]").
        sweep: options of jobs or of the method with their values: "r=4,16", "lr=1e-4,3e-4".
        config: a TOML file.

    Raises Refusal(CONFIG_INVALID) with every problem.
    """
    problems: list[Problem] = []
    document = _document(_open(config) if config is not None else {"job": [{}]}, problems)
    for flag, value in (flags or {}).items():
        key = flag.replace("-", "_")
        if key in RUN_KEYS:
            document.run[key] = value
        elif key in KEYS and key != "options":
            for job in document.job:
                job[key] = value
        else:
            text = fields.unknown(key, [*KEYS, *RUN_KEYS])
            problems.append(Problem("", f"--{flag}: {text}"))
    for item in sweep:
        name, equals, values = item.partition("=")
        given = [value.strip() for value in values.split(",")]
        if not equals or not all(given):
            text = f"--sweep {item}: it should read like r=4,16 or lr=1e-4,3e-4"
            problems.append(Problem("", text))
        document.sweep[name.strip().replace("-", "_")] = given
    chosen = {name.replace("-", "_"): literal(text) for name, text in (options or {}).items()}
    for job in document.job if chosen else ():
        if isinstance(own := job.get("options", {}), Mapping):
            job["options"] = {**own, **chosen}
    return _build(document, problems)


def from_mapping(document: Mapping[str, object]) -> RunSpec:
    """Reads a parsed TOML or JSON document. Raises as `read`."""
    problems: list[Problem] = []
    return _build(_document(document, problems), problems)


def to_mapping(spec: RunSpec) -> dict[str, Any]:
    """Returns the run as plain values, for JSON; `from_mapping` makes an equal one of them."""
    run = {name: getattr(spec, name) for name in RUN_KEYS if getattr(spec, name) is not None}
    jobs = []
    for job in spec.jobs:
        values = {
            name: getattr(getattr(job, key.part) if key.part else job, key.field)
            for name, key in KEYS.items()
        }
        jobs.append({name: value for name, value in values.items() if value is not None})
    plain: dict[str, Any] = to_jsonable_python({"run": run, "job": jobs})
    return plain


def to_toml(spec: RunSpec) -> str:
    """Returns the run as TOML with every option; `read` makes an equal one of it."""
    document = to_mapping(spec)
    lines = ["[run]", *(f"{key} = {_toml(value)}" for key, value in document["run"].items())]
    for job in document["job"]:
        lines += ["", "[[job]]", *(f"{key} = {_toml(value)}" for key, value in job.items())]
    return "\n".join(lines) + "\n"


def check(spec: RunSpec) -> None:
    """Raises Refusal(CONFIG_INVALID) with every option that is out of range."""
    from_mapping(to_mapping(spec))


def problems_of(part: JobSpec | DataSpec, field: str = "") -> list[Problem]:
    """Everything that is out of range in a job's data, or in the other options of the job itself.

    `field` is the path of the part, as in "jobs.tickets".
    """
    keys = _keys(type(part))
    values = {name: getattr(part, key.field) for name, key in keys.items()}
    return fields.read(_model("part", keys), values, field)[1]


def _open(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Refusal(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(Reason.CONFIG_INVALID, f"{path} is not TOML: {error}") from None


def _document(given: Mapping[str, object], problems: list[Problem]) -> _Document:
    """The document's tables; a table that is none is a problem and left out."""
    document, found = fields.read(_Document, given)
    assert document is not None, "it has no required field"
    known = list(_Document.model_fields)
    found += [
        Problem("", f"the file: {fields.unknown(name, known)}")
        for name in document.model_extra or ()
    ]
    problems += found
    return document


def _build(document: _Document, problems: list[Problem]) -> RunSpec:
    first = next((str(job["name"]) for job in document.job if job.get("name")), "run")
    run, found = fields.read(_RUN, {"out": str(RUNS / first), **document.run}, "run")
    tables, complaints = expand(document.job, document.sweep, KEYS)
    problems += [*found, *complaints]
    jobs = []
    for number, table in enumerate(tables, 1):
        lr = RATES.get(str(table.get("method")))
        job, found = fields.read(
            _JOB,
            table if lr is None else {"lr": lr, **table},
            f"jobs.{table.get('name') or number}",
        )
        problems += found
        jobs += [job] if job is not None else []
    if not tables and all(problem.field != "job" for problem in problems):
        text = "there is no job; give --data and --name, or a [[job]] in the file"
        problems.append(Problem("jobs", text))
    names = Counter(str(table["name"]) for table in tables if table.get("name"))
    problems += [
        Problem("jobs", f"{count} jobs are called {name!r}; each needs a name of its own")
        for name, count in names.items()
        if count > 1
    ]
    if problems or run is None:
        raise fields.refusal(Reason.CONFIG_INVALID, problems)
    return RunSpec(tuple(map(_job, jobs)), **dict(run))


def _job(values: BaseModel) -> JobSpec:
    parts: dict[str, dict[str, Any]] = {part: {} for part in ("", *_PARTS)}
    for name, value in values:
        parts[KEYS[name].part][KEYS[name].field] = value
    own = parts.pop("")
    return JobSpec(**own, **{part: _PARTS[part](**given) for part, given in parts.items()})


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
    """Returns the run with absolute paths, which hold in any working directory."""

    def data(of: DataSpec) -> DataSpec:
        other = of.eval_path.absolute() if of.eval_path is not None else None
        first, *others = (path.absolute() for path in of.paths)
        return replace(of, path=(first, *others) if others else first, eval_path=other)

    jobs = tuple(replace(job, data=data(job.data)) for job in spec.jobs)
    model = str(Path(spec.model).absolute()) if Path(spec.model).exists() else spec.model
    out, cache = spec.out.absolute(), spec.cache.absolute()
    return replace(spec, jobs=jobs, out=out, cache=cache, model=model)
