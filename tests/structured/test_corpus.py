"""The corpus of schemas, against jsonschema and xgrammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from engine.driving import Engine
from loraplex_server.engine.structures.library import new_matcher, read_tokenizer
from loraplex_server.forms.form import FormKind, StructureForm
from loraplex_server.forms.process import CHECK_BYTES, Checks, CheckSetup
from rpc.harness import EOS, VOCAB, make_tokenizer, write_model
from structured.corpus import accepted, entries, validator
from structured.scribbler import Scribbler, seeded, structure, text_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model")) / "tokenizer.json"


@pytest.fixture(scope="module")
def checks(tokenizer: Path) -> Checks:
    return Checks(CheckSetup(str(tokenizer), VOCAB, CHECK_BYTES, [EOS]))


def form(schema: Any) -> StructureForm:
    return StructureForm(FormKind.JSON_SCHEMA, [json.dumps(schema, ensure_ascii=False)])


def test_schemas_are_accepted_unless_they_cannot_be_enforced(checks: Checks) -> None:
    found = {entry["name"]: checks.check(form(entry["schema"])).problem for entry in entries()}
    assert len(found) == len(entries()) > 100, "two entries have one name"
    refused = {name for name, problem in found.items() if problem}
    assert refused == {entry["name"] for entry in entries() if entry.get("refused")}
    assert all(problem[0] != " " and len(problem) < 400 for problem in found.values() if problem)


def test_exactly_the_valid_instances_are_accepted(checks: Checks, tokenizer: Path) -> None:
    """In the compact form, with spaces, and over several lines."""
    tokens = read_tokenizer(tokenizer, VOCAB, [EOS])

    def accepts(grammar: str, text: str) -> bool:
        matcher = new_matcher(tokens, grammar, True)
        ids = tokens.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    judged = 0
    for entry, instance, is_valid in instances():
        grammar = checks.check(form(entry["schema"])).grammar
        for layout in ({"separators": (",", ":")}, {}, {"indent": 2}):
            text = json.dumps(instance, ensure_ascii=False, **layout)
            assert accepts(grammar, text) == is_valid, (entry["name"], text)
            judged += 1
    assert judged > 1000


def test_the_instances_are_what_the_corpus_says_of_them() -> None:
    for entry, instance, is_valid in instances():
        judge = validator(entry["schema"])
        # Formats that jsonschema checks with other packages only are known by the schema's type.
        if entry["name"] not in ("duration", "hostname", "uri", "time", "configuration"):
            assert judge.is_valid(instance) == is_valid, (entry["name"], instance)


def instances() -> Iterator[tuple[dict[str, Any], Any, bool]]:
    for entry in accepted():
        yield from ((entry, instance, True) for instance in entry["valid"])
        yield from ((entry, instance, False) for instance in entry["invalid"])


@pytest.mark.parametrize("seed", [1, 2])
def test_every_answer_that_stops_is_valid(tmp_path: Path, seed: int) -> None:
    """All schemas in one batch, with rows that ask for nothing between them."""
    engine = Engine(Scribbler(tmp_path, num_blocks=8000), max_running=64)
    asked = accepted()
    for id, entry in enumerate(asked):
        wanted = structure("json_schema", json.dumps(entry["schema"], ensure_ascii=False))
        params = seeded(seed * 1000 + id, temperature=[1.0, 0.7, 0.0][id % 3])
        prompt, ends = [3 + id % 300, 4], wanted.end_token_ids
        engine.submit(id, prompt, 300, sampling=params, structure=wanted, stop_token_ids=ends)
        if id % 8 == 0:
            engine.submit(1000 + id, [5 + id], 20, sampling=seeded(id))
    engine.run(5000)
    stopped = 0
    for id, entry in enumerate(asked):
        outcome = engine.outcome(id)
        assert outcome in ("stop", "length"), entry["name"]
        if outcome == "stop":
            stopped += 1
            text = text_of(engine, id).removesuffix("</s>")
            validator(entry["schema"]).validate(json.loads(text))
    assert stopped > len(asked) * 3 // 4


@cache
def xgrammar_judge() -> Callable[[Any, str], bool]:
    reason = "xgrammar is not installed; `make test-structures` installs it and runs this"
    xgrammar = pytest.importorskip("xgrammar", reason=reason)
    tokenizer = make_tokenizer()
    vocabulary = [tokenizer.id_to_token(token) for token in range(VOCAB)]
    info = xgrammar.TokenizerInfo(
        vocabulary, vocab_type=xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[EOS]
    )
    compiler = xgrammar.GrammarCompiler(info)

    def accepts(schema: Any, text: str) -> bool:
        given = json.dumps(schema, ensure_ascii=False)
        grammar = compiler.compile_json_schema(given, any_whitespace=True, strict_mode=False)
        matcher = xgrammar.GrammarMatcher(grammar)
        return bool(matcher.accept_string(text) and matcher.accept_token(EOS))

    return accepts


def is_known_to_xgrammar(schema: Any) -> bool:
    """Whether xgrammar enforces all of a schema; it ignores some keywords without an error."""
    if isinstance(schema, list):
        return all(map(is_known_to_xgrammar, schema))
    if not isinstance(schema, dict):
        return True
    listed = [*schema.get("enum", []), schema.get("const")]
    pattern, required = schema.get("pattern", "^$"), schema.get("required", [])
    is_known = (
        not {"allOf", "patternProperties"} & schema.keys()
        and not ({"anyOf", "properties"} <= schema.keys())
        and not any(isinstance(value, list | dict) for value in listed)
        and not ("pattern" in schema and {"minLength", "maxLength"} & schema.keys())
        and (not isinstance(pattern, str) or pattern[0] + pattern[-1] == "^$")
        and (not isinstance(pattern, str) or '"' not in pattern)
        and (not isinstance(required, list) or {*required} <= {*schema.get("properties", {})})
    )
    return is_known and all(map(is_known_to_xgrammar, schema.values()))


def test_acceptance_agrees_with_xgrammar() -> None:
    accepts, judged = xgrammar_judge(), 0
    for entry, instance, is_valid in instances():
        if is_known_to_xgrammar(entry["schema"]):
            text = json.dumps(instance, ensure_ascii=False)
            assert accepts(entry["schema"], text) == is_valid, (entry["name"], text)
            judged += 1
    assert judged > 300
