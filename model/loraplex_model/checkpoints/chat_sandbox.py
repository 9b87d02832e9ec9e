"""The sandbox that chat templates run in: what Hugging Face's offers, with bounds on work and size.

A template is a program of its author, who may be an adapter's. Jinja's sandbox keeps it from the
Python objects around it. The bounds keep it from running long and from filling the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, Final

from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from loraplex_model.checkpoints.bounds.budget import (
    MAX_WORK,
    Budget,
    TextRefused,
    TooMuchWork,
    refuse,
)
from loraplex_model.checkpoints.bounds.counting import Counting, variables_read
from loraplex_model.checkpoints.bounds.filters import bounded_filter, bounded_test
from loraplex_model.checkpoints.bounds.sizes import (
    check_method,
    check_numbers,
    check_operator,
    to_json,
)

__all__ = ["MAX_WORK", "TextRefused", "TooMuchWork", "begin", "compile_template", "end"]

_BYTES: Final = frozenset(
    {"encode", "to_bytes", "from_bytes", "fromhex", "translate", "maketrans", "expandtabs"}
)
"""Methods of texts and numbers that make bytes, or texts that may be very long. No known
template uses them."""

_MAX_DATE_FORM: Final = 1000


def compile_template(
    source: str, clock: Callable[[], datetime]
) -> tuple[Template, frozenset[str], frozenset[str]]:
    """Compiles a template.

    Returns it with the names of the variables that it reads from outside, and of those
    that it reads before it sets them. `clock` returns the local time that the template may print.
    Raises jinja2.TemplateError.
    """
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Bounds])
    budget = sandbox.budget
    budget.begin()
    sandbox.filters["tojson"] = partial(to_json, budget)
    for name, work in list(sandbox.filters.items()):
        sandbox.filters[name] = bounded_filter(budget, name, work)
    for name, test in list(sandbox.tests.items()):
        judge: Any = test  # for mypy, which knows no type of it
        sandbox.tests[name] = bounded_test(budget, name, judge)
    sandbox.finalize = _finalize
    sandbox.globals.pop("lipsum")
    sandbox.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: _date(clock(), form),
        "dict": _Dict(),
        "namespace": _Names,
    }
    try:
        return sandbox.from_string(source), *variables_read(sandbox.parse(source))
    except TemplateError:
        raise
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise TemplateError("the template is nested too deeply or is no program") from error


def begin(template: Template) -> None:
    """Starts the count of a rendering of a compiled template, in this thread."""
    _budget(template.environment).begin()


def end(template: Template) -> None:
    """Drops what was kept about the values of a rendering in this thread."""
    _budget(template.environment).end()


def _budget(sandbox: Any) -> Budget:
    assert isinstance(sandbox, _Sandbox)
    return sandbox.budget


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """The text of an expression's value."""
    return _budget(context.environment).shown(value)


def _date(now: datetime, form: str) -> str:
    if len(form) > _MAX_DATE_FORM:
        raise TooMuchWork
    return now.strftime(form)


class _Bounds(Extension, Budget):
    """Counts the work of a rendering, and adds the tag `{% generation %}`.

    The tag stands around the assistant's own words and renders them unchanged. It makes a block of
    its own, as in transformers, so that variables set inside are local.
    """

    tags = {"generation"}  # noqa: RUF012  what jinja2 reads

    def __init__(self, environment: Any) -> None:
        Extension.__init__(self, environment)
        Budget.__init__(self)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_rendered")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    @pass_eval_context
    def _rendered(self, context: nodes.EvalContext, caller: Macro) -> str:
        return str(caller())


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which operators and calls count what they make."""

    intercepted_binops = frozenset({"*", "**", "+", "%", "//"})

    @property
    def budget(self) -> Budget:
        """The extension that counts."""
        found = self.extensions[_Bounds.identifier]
        assert isinstance(found, _Bounds)
        return found

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        counted: nodes.Template = Counting(self.extensions[_Bounds.identifier]).visit(tree)
        return counted

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute."""
        return attr not in _BYTES and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes an operator, after a look at the size of the result."""
        check_operator(self.budget, operator, left, right)
        return self.budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or method, after a look at its arguments."""
        budget = self.budget
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if owner is budget:
            if hasattr(obj, "jinja_pass_arg"):
                return super().call(context, obj, *args, **kwargs)
            return obj(*args)  # the keywords are jinja2's own, for functions that take the context
        budget.spend()
        given = list(args)
        if not isinstance(obj, Macro):
            check_numbers((*args, *kwargs.values()))
            given = [budget.made(value) for value in args]
            for value in kwargs.values():
                budget.made(value)
        text = owner if isinstance(owner, str) else _format_owner(obj)
        if text is not None:
            if name == "join" and given and not isinstance(given[0], str | list | tuple):
                given[0] = list(given[0])
            check_method(budget, text, name, tuple(given), kwargs)
        return budget.made(super().call(context, obj, *given, **kwargs))


def _format_owner(method: Any) -> str | None:
    """The text whose method `format` jinja2 has replaced by its own."""
    wrapped = getattr(method, "__wrapped__", None)
    owner = getattr(wrapped, "__self__", None)
    return owner if isinstance(owner, str) else None


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

    def __repr__(self) -> str:  # without the values, which may be namespaces in turn
        return "<Namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")
