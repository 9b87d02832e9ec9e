"""The decorator of all commands: it adds the shared options and opens the session.

A command's first parameter is its `Session`. A parameter annotated with a TypedDict and a mapping
stands for one option per key of the mapping, with the key's type in the TypedDict and the mapping's
declaration. Each is None unless given; the command gets them as one dictionary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints, is_typeddict

import typer

from loraplex import channel
from loraplex.cli import access, options
from loraplex.cli.session import session
from loraplex.cli.terminal import recovered

_KIND = inspect.Parameter.KEYWORD_ONLY


def command(
    group: typer.Typer,
    name: str,
    panel: str | None = None,
    *,
    json: bool = True,
    timeout: float | None = channel.DEFAULT_TIMEOUT,
    with_key: bool = True,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function that takes a Session to `group` as a command, listed in `panel`.

    The command gets the options of `access`, --json if `json` is set, and --timeout with this
    default unless it is None. Without `with_key` its calls carry no key.
    """

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        parameters, groups = _expanded(function)
        if json:
            parameters.append(_parameter("as_json", options.Json, False))
        if timeout is not None:
            parameters.append(_parameter("timeout", options.Timeout, timeout))
        parameters.append(_parameter("server", options.Server, None))
        parameters += [_parameter(name, each, None) for name, each in access.OPTIONS.items()]

        def run(ctx: typer.Context, **given: Any) -> None:
            before: access.GivenServer = ctx.obj or access.GivenServer()
            address = before.updated(given.pop("server"), access.take(given))
            if not with_key:
                address = address.without_key()
            seconds = given.pop("timeout", channel.DEFAULT_TIMEOUT)
            as_json = given.pop("as_json", False)
            given = {name: _recovered(value) for name, value in given.items()}
            for name, keys in groups.items():
                given[name] = {key: given.pop(key) for key in keys}
            with session(address, seconds, as_json) as opened:
                function(opened, **given)

        run.__doc__ = function.__doc__
        _declare(run, parameters)
        group.command(name, rich_help_panel=panel)(run)
        return function

    return declare


def add_root_options(app: typer.Typer) -> None:
    """Lets the options of the server's address stand before the command too."""

    def root(ctx: typer.Context, **given: Any) -> None:
        ctx.obj = access.GivenServer().updated(given.pop("server"), given)

    annotations = {"server": options.RootServer, **access.OPTIONS}
    _declare(root, [_parameter(name, each, None) for name, each in annotations.items()])
    app.callback()(root)


def _declare(function: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Makes Typer see these parameters in place of the function's own."""
    context = inspect.Parameter("ctx", _KIND, annotation=typer.Context)
    function.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]


def _recovered(value: Any) -> Any:
    """The value of an option or argument, with its texts as `terminal.recovered` returns them."""
    if isinstance(value, list):
        return [_recovered(each) for each in value]
    return recovered(value) if isinstance(value, str) else value


def _expanded(
    function: Callable[..., None],
) -> tuple[list[inspect.Parameter], dict[str, list[str]]]:
    """Returns the parameters after the session, and the keys of each that is a TypedDict."""
    hints = get_type_hints(function, include_extras=True)
    found: list[inspect.Parameter] = []
    groups: dict[str, list[str]] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        hint: Any = hints[parameter.name]
        kind = getattr(hint, "__origin__", None)
        if is_typeddict(kind):
            types: dict[str, Any] = get_type_hints(kind)
            (declared,) = hint.__metadata__
            groups[parameter.name] = list(declared)
            found += [
                _parameter(k, Annotated[types[k], each], None) for k, each in declared.items()
            ]
        else:
            found.append(_parameter(parameter.name, hint, parameter.default))
    return found, groups


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, _KIND, default=default, annotation=annotation)
