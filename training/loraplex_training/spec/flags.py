"""The flags of `loraplex-train`, made from the options in `spec`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer
from pydantic.fields import FieldInfo

from loraplex_training.spec.parse import KEYS, RUN_KEYS, Key
from loraplex_training.spec.spec import DataSpec

DATA_FLAGS: Final = tuple(name for name, key in KEYS.items() if key.kind is DataSpec)
REPEATED: Final = ("data",)
"""Flags that may be repeated."""
BASE_FLAGS: Final = ("model", "chat_template", "special_tokens_in_messages", "cache")

PANELS: Final[Mapping[str, str]] = {
    "data": "Data",
    "method": "Method",
    "optimiser": "Optimiser",
    "schedule": "Schedule",
    "clip": "Optimiser",
    "name": "Output",
    "epochs": "Schedule",
    "batch_size": "Batches",
    "eval_every": "Evaluation",
    "seed": "Batches",
    "out": "Output",
    "model": "Model",
    "device": "Machine",
    "save_every": "Output",
}
"""Panels of `--help`, by their first options; the others follow in their order of declaration."""


def with_flags(
    names: Collection[str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds a flag for each option, or for each of `names`.

    The decorated function gets `flags`: the options that were given, with their values as text.
    A flag that may be repeated has a list of them.
    """
    made = {name: parameter for name, parameter in _parameters() if names is None or name in names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [*made.values(), *(one for one in own if one.name != "flags")]

        def run(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in made}
            texts = {
                name: value if isinstance(value, list) else str(value)
                for name, value in given.items()
                if value not in (None, [])
            }
            command(flags=texts, **arguments)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameters() -> Iterator[tuple[str, inspect.Parameter]]:
    panel = ""
    for name, key in {**KEYS, **RUN_KEYS}.items():
        panel = PANELS.get(name, panel)
        if name != "options":  # which are given by --set
            yield name, _parameter(name, key, panel)


def _parameter(name: str, key: Key, panel: str) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    kind: Any = FieldInfo.from_annotation(key.hint).annotation
    help_ = _descriptions(key.kind)[key.field] + default_text(key.default)
    if kind is bool:
        names, metavar = f"{flag}/--no-{flag.removeprefix('--')}", None
    else:
        is_path = Path in (kind, *get_args(kind))
        names, metavar = flag, {int: "N", float: "X"}.get(kind, "PATH" if is_path else "TEXT")
    option = typer.Option(names, help=help_, metavar=metavar, rich_help_panel=panel)
    value: Any = list[str] if name in REPEATED else bool if kind is bool else str
    annotation: Any = Annotated[value | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


@cache
def _descriptions(kind: type) -> Mapping[str, str]:
    """The docstrings of a dataclass's attributes, each in one line."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for line, text in pairwise(declared.body):
        match line, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(docstring))):
                found[name] = " ".join(docstring.split())
    return found


def default_text(value: object) -> str:
    """Returns " (default: ...)", or "" for a flag that is off and for an option that is empty."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    shown = isinstance(value, int | float | str | Path) and value is not False and value != ""
    return f" (default: {value})" if shown else ""
