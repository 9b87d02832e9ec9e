"""The check of forms: what is accepted, and that a hostile form costs its own request only."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.engine.structures.library import new_matcher, read_tokenizer
from loraplex_server.forms import checker as checker_module
from loraplex_server.forms.checker import FormChecker
from loraplex_server.forms.form import FormKind, StructureForm
from loraplex_server.forms.grammars import MOST_NESTING, nesting
from loraplex_server.forms.process import CHECK_BYTES, Checks, CheckSetup, shown
from loraplex_server.forms.unions import with_tagged_unions
from loraplex_server.series import Series
from prometheus_client import CollectorRegistry
from rpc.harness import EOS, VOCAB, write_model


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> CheckSetup:
    folder = write_model(tmp_path_factory.mktemp("model"))
    return CheckSetup(str(folder / "tokenizer.json"), VOCAB, CHECK_BYTES, [EOS])


@pytest.fixture(scope="module")
def checks(setup: CheckSetup) -> Checks:
    return Checks(setup)


def form(kind: str, *texts: str) -> StructureForm:
    return StructureForm(FormKind(kind), list(texts))


def accepts(setup: CheckSetup, grammar: str, text: str) -> bool:
    tokens = read_tokenizer(Path(setup.tokenizer), VOCAB, [EOS])
    matcher, ids = new_matcher(tokens, grammar, False), tokens.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


GBNF = """
# of llama.cpp
root  ::= greeting " " name ("!" | "?")?
greeting ::= "hello" | "good\\x20day"
name ::= [A-Z] [a-z]{2,4}
"""
LARK = """
start: expr
expr: expr "+" term | term
term: "(" expr ")" | NUMBER
NUMBER: /[0-9]+/
"""


@pytest.mark.parametrize(
    ("given", "yes", "no"),
    [
        (form("regex", "[a-c]+x?"), ["a", "abcx"], ["", "x", "abd", "a x"]),
        (form("regex", "^a|bc$"), ["a", "bc"], ["ac"]),
        (form("regex", "\\d{2}[^0-9(]"), ["12a"], ["1a", "12(", "123"]),
        (form("choices", "yes", "no", "yes please"), ["yes", "yes please"], ["yes ", "n"]),
        (form("choices", 'say "hi"', "back\\slash", "new\nline"), ["back\\slash", 'say "hi"'], []),
        (form("choices", "日本", "😀", "a|b", "/x/"), ["日本", "😀", "a|b", "/x/"], ["a", "x"]),
        (form("choices", "a", "a"), ["a"], ["aa"]),
        (form("grammar", LARK), ["1", "(1+2)+3"], ["", "1+", "(1"]),
        (form("grammar", GBNF), ["hello Bob", "good day Alice?"], ["hello bob", "hi Bob"]),
        (form("json_object"), ["{}", '{"a": [1, null]}', '{"a":{"b":"c"}}'], ["[]", "1", "{a:1}"]),
    ],
)
def test_a_form_accepts_what_it_says(
    checks: Checks, setup: CheckSetup, given: StructureForm, yes: list[str], no: list[str]
) -> None:
    checked = checks.check(given)
    assert checked.problem == ""
    assert [text for text in yes if not accepts(setup, checked.grammar, text)] == []
    assert [text for text in no if accepts(setup, checked.grammar, text)] == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (form("regex", "(a"), "unclosed group"),
        (form("regex", "(?=a)b"), "look"),
        (form("regex", "a{0}"), "empty text"),
        (form("grammar", 'start: ""'), "empty text"),
        (form("regex", "(" * 200 + "a" + ")" * 200), "brackets"),
        (form("grammar", "start: nothing"), "unknown name"),
        (form("grammar", "start: a\na: b\nb: a"), "no text"),
        (form("grammar", 'root ::= "a'), "GBNF"),
        (form("grammar", 'name ::= "a"'), "root"),
        (form("grammar", '{"grammars": []}'), "neither"),
        (form("grammar", "start: " + "(" * 60_000), "brackets"),
        (form("grammar", "root ::= " + "(" * 60_000), "brackets"),
        (form("json_schema", '{"type": "object"'), "is not JSON"),
        (form("json_schema", "{'type': 'object'}"), "is not JSON"),
        (form("json_schema", '{"const": NaN}'), "NaN is not a value"),
        (form("json_schema", '{"minimum": 1e999}'), "float64"),
        (form("json_schema", '{"minimum": ' + "9" * 5000 + "}"), "64 bits"),
        (form("json_schema", '{"items":' * 30_000 + "{}" + "}" * 30_000), "brackets"),
        (form("json_schema", "[" * 60_000), "brackets"),
        (form("json_schema", "null"), "must be an object"),
        (form("json_schema", '{"allOf": [{"$ref": "#"}]}'), ""),
    ],
)
def test_a_form_at_fault_is_refused_with_what_is_wrong(
    checks: Checks, given: StructureForm, problem: str
) -> None:
    found = checks.check(given).problem
    assert problem in found
    assert 0 < len(found) < 400


def test_brackets_in_texts_and_classes_do_not_nest() -> None:
    assert nesting("([{}])", has_classes=False) == 3
    assert nesting('{"a(((": "\\"((("}', has_classes=False) == 1
    assert nesting("[((((]" * 50 + "\\(" * 50, has_classes=True) == 0
    assert nesting("()" * 1000, has_classes=True) == 1
    assert nesting("(" * (MOST_NESTING + 1), has_classes=True) == MOST_NESTING + 1


def test_messages_have_one_line_and_say_what_is_wrong() -> None:
    assert shown("regex parse error:\n   (\n   ^\nerror: unclosed group") == (
        "regex parse error: error: unclosed group"
    )
    assert shown("first\nsecond") == "first"
    assert len(shown("x" * 1000)) == 300


def test_unions_are_rewritten_only_if_a_tag_excludes_all_but_one_branch() -> None:
    def branch(tag: Any, **more: Any) -> dict[str, Any]:
        return {"type": "object", "properties": {"t": tag}, "required": ["t"], **more}

    one, two, both = {"const": "1"}, {"const": "2"}, {"enum": ["2", "3"]}
    tagged = {"oneOf": [branch(one), branch(two)]}
    assert with_tagged_unions(tagged) == ({"anyOf": tagged["oneOf"]}, True)
    for other in (
        {"oneOf": [branch(both), branch(two)]},
        {"oneOf": [branch(one), branch(two, required=[])]},
        {"oneOf": [branch(one), branch(two, type="array")]},
        {"oneOf": [branch({"const": 1}), branch({"const": 1.0})]},
        {"oneOf": [branch(one), {"$ref": "#/nowhere"}]},
        {"oneOf": [branch(one), {"$ref": "#"}]},
        {"oneOf": [branch(one), branch(two)], "anyOf": [True]},
        {"const": {"oneOf": [branch(one), branch(two)]}},
        {"oneOf": []},
        {"oneOf": 3},
    ):
        assert with_tagged_unions(other) == (other, False)


# The processes.

ECHO = """
import sys, time, os, msgspec
def answer(d):
    m = msgspec.msgpack.encode(d); sys.stdout.buffer.write(len(m).to_bytes(4, "little") + m)
    sys.stdout.buffer.flush()
answer({"grammar": "", "problem": ""})
while head := sys.stdin.buffer.read(4):
    text = msgspec.msgpack.decode(sys.stdin.buffer.read(int.from_bytes(head, "little")))["texts"][0]
    if text == "hang": time.sleep(3600)
    if text == "die": os.kill(os.getpid(), 9)
    if text == "slow": time.sleep(0.5)
    if text == "garbage": answer([1, 2])
    answer({"grammar": f"{text} {os.getpid()}", "problem": ""})
"""


async def made(
    seconds: float, *command: str, series: Series | None = None
) -> AsyncIterator[FormChecker]:
    series = series or Series(CollectorRegistry())
    one = FormChecker(command or (sys.executable, "-c", ECHO), seconds, series)
    yield one
    await one.close()


@pytest.fixture
async def echo() -> AsyncIterator[FormChecker]:
    async for one in made(30.0):
        yield one


@pytest.fixture
async def real(setup: CheckSetup) -> AsyncIterator[FormChecker]:
    async for one in made(30.0, *setup.command()):
        yield one


async def refused(one: FormChecker, given: StructureForm) -> Refusal:
    with pytest.raises(Refusal) as found:
        await one.grammar(given, "field")
    return found.value


async def test_the_process_answers_as_the_checks_do(real: FormChecker, checks: Checks) -> None:
    good, bad = form("regex", "a+"), form("regex", "(")
    assert await real.grammar(good, "field") == checks.check(good).grammar
    error = await refused(real, bad)
    assert (error.reason, error.field) == (Reason.STRUCTURE_INVALID, "field")
    assert checks.check(bad).problem in error.message


async def test_a_check_that_hangs_is_refused_and_others_go_on(caplog: Any) -> None:
    async for one in made(1.0):
        slow = asyncio.create_task(refused(one, form("regex", "hang")))
        assert (await one.grammar(form("regex", "fine"), "f")).startswith("fine")
        error = await slow
        assert error.reason is Reason.STRUCTURE_INVALID
        assert "too long" in error.message
        again = await refused(one, form("regex", "hang"))  # at once, without a process
        assert again.message == error.message
        assert (await one.grammar(form("regex", "fine too"), "f")).startswith("fine too")
        assert "hang" not in caplog.text


async def test_a_check_that_ends_its_process_is_refused_alone(echo: FormChecker) -> None:
    kinds = [form("regex", text) for text in ("die", "a", "garbage", "b")]
    results = await asyncio.gather(
        *(echo.grammar(each, "f") for each in kinds), return_exceptions=True
    )
    assert [isinstance(result, Exception) for result in results] == [True, False, True, False]
    assert isinstance(results[0], Refusal)
    assert (await echo.grammar(form("regex", "c"), "f")).startswith("c")


async def test_a_form_is_checked_once(echo: FormChecker) -> None:
    """However many ask at the same time, and later; the process is told by its number."""
    given = form("regex", "slow")
    answers = {*await asyncio.gather(*(echo.grammar(given, "f") for _ in range(20)))}
    process = next(p for p in echo._all if p._process is not None)
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    answers.add(await echo.grammar(given, "f"))
    assert len(answers) == 1


async def test_a_caller_that_leaves_disturbs_nobody(echo: FormChecker) -> None:
    given = form("regex", "slow")
    first = asyncio.create_task(echo.grammar(given, "f"))
    second = asyncio.create_task(echo.grammar(given, "f"))
    await asyncio.sleep(0.1)
    first.cancel()
    assert (await second).startswith("slow")
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_too_many_forms_are_refused_as_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker_module, "MOST_WAITING", 3)
    async for one in made(30.0):
        tasks = [
            asyncio.create_task(one.grammar(StructureForm(FormKind.REGEX, ["slow", str(i)]), "f"))
            for i in range(10)
        ]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [each for each in results if isinstance(each, Exception)]
        assert 0 < len(errors) <= 7
        assert {each.reason for each in errors if isinstance(each, Refusal)} == {Reason.OVERLOADED}


async def test_what_is_remembered_is_bounded(
    echo: FormChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker_module, "KEPT_BYTES", 1000)
    for i in range(100):
        await echo.grammar(form("regex", f"text {i}"), "f")
    assert 0 < len(echo._kept) < 100
    assert echo._kept_bytes == sum(len(each.grammar) for each, _ in echo._kept.values()) <= 1000


async def test_a_process_that_cannot_start_is_no_fault_of_the_client() -> None:
    for command in (("/nonexistent",), (sys.executable, "-c", "raise SystemExit(3)")):
        async for one in made(5.0, *command):
            assert (await refused(one, form("regex", "a"))).reason is Reason.ENGINE_FAULT
            assert (await refused(one, form("regex", "a"))).reason is Reason.ENGINE_FAULT


async def test_checks_are_counted(setup: CheckSetup) -> None:
    registry = CollectorRegistry()
    async for one in made(30.0, *setup.command(), series=Series(registry)):
        for text in ("a", "a", "("):
            await asyncio.gather(one.grammar(form("regex", text), "f"), return_exceptions=True)
    value = registry.get_sample_value
    assert value("loraplex_structure_checks_total", {"result": "accepted"}) == 2
    assert value("loraplex_structure_checks_total", {"result": "refused"}) == 1
    assert value("loraplex_structure_check_seconds_count") == 2


HOSTILE = {
    "wide optional": json.dumps(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    ),
    "deep": '{"type":"array","items":' * 90 + "{}" + "}" * 90,
    "doubling": json.dumps(
        {
            "$defs": {
                **{
                    f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2, "title": str(i)}
                    for i in range(60)
                },
                "a60": {"type": "null"},
            },
            "$ref": "#/$defs/a0",
        }
    ),
    "long enum": json.dumps({"enum": [f"value {i} of many" for i in range(3000)]}),
    "intersections": json.dumps(
        {"allOf": [{"type": "string", "pattern": f"{c}.*{c}"} for c in "abcdefghijklm"]}
    ),
    "huge bounds": json.dumps(
        {"type": "array", "items": {"type": "string", "maxLength": 10**9}, "minItems": 10**9}
    ),
}


async def answered(one: FormChecker, given: StructureForm) -> None:
    """Asks for a check; a refusal must be one for the form."""
    (found,) = await asyncio.gather(one.grammar(given, "f"), return_exceptions=True)
    is_refused = isinstance(found, Refusal) and found.reason is Reason.STRUCTURE_INVALID
    assert is_refused or isinstance(found, str)


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_schema_is_answered(real: FormChecker, name: str) -> None:
    """Accepted or refused, but answered; and the process goes on or is replaced."""
    await answered(real, form("json_schema", HOSTILE[name]))
    assert await real.grammar(form("regex", "a"), "f")


@pytest.mark.parametrize(
    "pattern", ["(a|b)*a(a|b){200}", "(a{1,1000}){1,1000}", "(.*a.*b.*c){30}", r"(\w{1,500} ){500}"]
)
async def test_a_hostile_expression_is_answered(real: FormChecker, pattern: str) -> None:
    await answered(real, form("regex", pattern))
    assert await real.grammar(form("regex", "a"), "f")
