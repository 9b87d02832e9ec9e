"""The sandbox that chat templates run in: what Hugging Face's offers, with bounds on work and size.

A template is a program of its author, who may be an adapter's. Jinja's sandbox keeps it from the
Python objects around it. The bounds here keep it from running long and from filling the memory:
every pass of a loop and every call of a macro counts, and so do the texts that are made.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, Final, NoReturn

from jinja2 import nodes, pass_eval_context
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK: Final = 300_000
"""Passes of loops and calls of macros in one rendering: one to three seconds."""

MAX_TEXT: Final = 4 << 20
"""Characters of a text, and entries of a list, that a template makes."""

MAX_NUMBER: Final = 1_000_000
"""Largest number that a template may give to a function, such as the width of a padded text."""

_CHARACTERS: Final = 64
"""Characters of a text that count as much as one pass of a loop."""

_FREE_WORDS: Final = 2048
"""Length of a text up to which making it does not count."""


class TextRefused(Exception):
    """A text or conversation cannot be turned into tokens; the message may be shown to a client."""


class TooMuchWork(TextRefused):
    """A template exceeds a bound."""

    def __init__(self) -> None:
        super().__init__("the chat template needs too much work or memory for this conversation")


def compile_template(source: str, clock: Callable[[], datetime]) -> tuple[Template, frozenset[str]]:
    """Compiles a template; returns it with the names of the variables that it reads.

    `clock` returns the local time that the template may print. Raises jinja2.TemplateError.
    """
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Bounds])
    sandbox.filters = {name: _bounded(sandbox, work) for name, work in sandbox.filters.items()}
    sandbox.filters["tojson"] = _bounded(sandbox, _to_json)
    sandbox.globals.pop("lipsum")
    sandbox.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: clock().strftime(form),
        "dict": _Dict(),
        "namespace": _Names,
    }
    from jinja2.meta import find_undeclared_variables

    names = find_undeclared_variables(sandbox.parse(source))
    return sandbox.from_string(source), frozenset(names)


def begin(template: Template) -> None:
    """Starts the count of a rendering of a compiled template, in this thread."""
    sandbox = template.environment
    assert isinstance(sandbox, _Sandbox)
    sandbox.bounds.begin()


class _Bounds(Extension):
    """Counts the work of a rendering, and adds the tag `{% generation %}`.

    The tag stands around the assistant's own words and renders them unchanged. It makes a block of
    its own, as in transformers, so that variables set inside are local.
    """

    tags = {"generation"}  # noqa: RUF012  what jinja2 reads

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._state = threading.local()

    def begin(self) -> None:
        """Starts the count of a rendering in this thread."""
        self._state.work = 0

    def spend(self, work: int = 1) -> str:
        """Counts work. Raises TooMuchWork. Returns "" for use as a statement."""
        spent = self._state.work = getattr(self._state, "work", 0) + work
        if spent > MAX_WORK:
            raise TooMuchWork
        return ""

    def join(self, pieces: list[Any]) -> str:
        """The operator `~`."""
        text: str = self.made("".join(map(str, pieces)))
        return text

    def made(self, value: Any) -> Any:
        """Counts a value that was made or is looked through, by its length."""
        if isinstance(value, str | list | tuple | range) and len(value) > _FREE_WORDS:
            if len(value) > MAX_TEXT:
                raise TooMuchWork
            self.spend(len(value) // _CHARACTERS)
        return value

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_rendered")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    @pass_eval_context
    def _rendered(self, context: nodes.EvalContext, caller: Macro) -> str:
        return str(caller())


class _Counting(NodeTransformer):
    """Puts a count at the start of each loop's and macro's body, and counts joined texts."""

    def __init__(self, bounds: _Bounds) -> None:
        self._bounds = bounds

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._bounds.call_method("join", [nodes.List(node.nodes)], lineno=node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        count = self._bounds.call_method("spend", lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which operators and calls count what they make."""

    intercepted_binops = frozenset({"*", "**", "+", "%", "//"})

    @property
    def bounds(self) -> _Bounds:
        """The extension that counts."""
        found = self.extensions[_Bounds.identifier]
        assert isinstance(found, _Bounds)
        return found

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        counted: nodes.Template = _Counting(self.bounds).visit(tree)
        return counted

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes an operator, after a look at the size of the result."""
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    _fits(len(value) * max(count, 0))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            _fits(max(bits, right.bit_length()) * 1024)
        if operator == "%" and isinstance(left, str):
            given = right if isinstance(right, tuple | list) else (right,)
            _check_format(left, given)
        return self.bounds.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or method, after a look at its arguments."""
        _check_arguments(args, kwargs)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        for value in args:
            self.bounds.made(value)
        if isinstance(owner, str):
            self.bounds.made(owner)
            _check_method(owner, name, args, kwargs)
        return self.bounds.made(super().call(context, obj, *args, **kwargs))


def _bounded(sandbox: _Sandbox, work: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with the bounds."""

    @wraps(work)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(args, kwargs)
        for value in args:
            sandbox.bounds.made(value)
        texts = [value for value in args if isinstance(value, str)]
        if texts and work.__name__ in ("do_replace", "do_format"):
            name = work.__name__.removeprefix("do_")
            _check_method(texts[0], name, tuple(args[args.index(texts[0]) + 1 :]), kwargs)
        if work.__name__ in ("do_join", "sync_do_join"):
            items = [value for value in args if isinstance(value, list | tuple)]
            separator = kwargs.get("d", texts[0] if texts else "")
            if items and isinstance(separator, str):
                _check_method(separator, "join", (items[0],), {})
        return sandbox.bounds.made(work(*args, **kwargs))

    return filtered


def _fits(size: int) -> None:
    if size > MAX_TEXT:
        raise TooMuchWork


def _check_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TooMuchWork


def _check_method(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises TooMuchWork if a method of a text would make a text that is too long."""
    if name == "replace" and len(args) >= 2 and all(isinstance(v, str) for v in args[:2]):
        _fits(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        lengths = sum(len(item) for item in args[0] if isinstance(item, str))
        _fits(len(text) * len(args[0]) + lengths)
    elif name in ("format", "format_map"):
        _check_format(text, (*args, *kwargs.values()))
    elif name in ("translate", "expandtabs"):
        _fits(len(text) * 1024)


def _check_format(form: str, given: Any) -> None:
    """Raises TooMuchWork for wide fields, and for long values in many of them."""
    digits = 0
    for character in form:
        digits = digits + 1 if character.isdigit() else 0
        if digits > len(str(MAX_NUMBER)) - 2:
            raise TooMuchWork
    longest = max((len(value) for value in given if isinstance(value, str)), default=0)
    _fits(len(form) + (form.count("{") + form.count("%")) * longest)


class _Dict:
    """The function `dict` of templates, without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """A dictionary with one value for all keys."""
        return dict.fromkeys(*args)


class _Names(Namespace):
    """The object `namespace` of templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _refuse(message: object) -> NoReturn:
    """The function `raise_exception` of templates, whose messages are for the caller."""
    raise TextRefused(f"the model's chat template refuses: {message}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Noncharacters stay as they are, since the encoder's marks are such."""
    if isinstance(indent, int) and indent > _CHARACTERS:
        raise TooMuchWork
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    if ensure_ascii and "\\ufd" in text:
        for code in range(0xFDD0, 0xFDF0):
            text = text.replace(f"\\u{code:04x}", chr(code))
    return text
