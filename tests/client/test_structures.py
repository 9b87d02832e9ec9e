"""Options for structured output become the form that they say, or an error that names them."""

from __future__ import annotations

import json

import pytest
from client.fake_server import FakeServer
from loraplex import InvalidRequest, requests
from loraplex.cli import app
from loraplex.v1 import generation_pb2
from typer.testing import CliRunner

SCHEMA = {"type": "object", "properties": {"naïve": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"json_schema": SCHEMA}, "json_schema", json.dumps(SCHEMA, ensure_ascii=False)),
        ({"json_schema": " {} "}, "json_schema", " {} "),
        ({"json_schema": True}, "json_schema", "true"),
        ({"json_schema": {}}, "json_schema", "{}"),
        ({"json_object": True}, "json_object", True),
        ({"regex": "a+"}, "regex", "a+"),
        ({"regex": ""}, "regex", ""),
        ({"choices": ("a", "b")}, "choices", generation_pb2.Choices(texts=["a", "b"])),
        ({"choices": iter(["a"])}, "choices", generation_pb2.Choices(texts=["a"])),
        ({"choices": []}, "choices", generation_pb2.Choices()),
        ({"grammar": "start: /a/"}, "grammar", "start: /a/"),
        ({"regex": "a", "json_object": False}, "regex", "a"),
    ],
)
def test_an_option_becomes_its_form(options, field, value):
    form = requests.generate("hi", **options).structured_output
    assert form.WhichOneof("form") == field
    assert getattr(form, field) == value


@pytest.mark.parametrize("options", [{}, {"json_object": False}, {"regex": None}])
def test_without_an_option_the_text_is_free(options):
    assert not requests.generate("hi", **options).HasField("structured_output")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"regex": "a", "json_object": True}, "structured_output"),
        ({"json_schema": {}, "choices": ["a"]}, "structured_output"),
        ({"json_schema": [SCHEMA]}, "structured_output.json_schema"),
        ({"json_schema": {"const": {1, 2}}}, "structured_output.json_schema"),
        ({"json_schema": {"const": float("nan")}}, "structured_output.json_schema"),
        ({"choices": "yes"}, "structured_output.choices"),
        ({"choices": [1]}, "structured_output.choices"),
        ({"choices": 3}, "structured_output.choices"),
        ({"regex": 3}, "structured_output.regex"),
        ({"json_object": "yes"}, "structured_output.json_object"),
    ],
)
def test_what_no_request_can_carry_is_refused_here(options, field):
    with pytest.raises(InvalidRequest) as refused:
        requests.generate("hi", **options)
    assert refused.value.violations[0].field == field


def test_the_command_line_sends_each_form(server: FakeServer, tmp_path):
    runner = CliRunner(env={"LORAPLEX_SERVER": server.target})
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text("start: /a/")
    for arguments, form in (
        (("--json-schema", str(schema)), {"json_schema": json.dumps(SCHEMA)}),
        (("--json-object",), {"json_object": True}),
        (("--regex", "[a-z]+"), {"regex": "[a-z]+"}),
        (("--choice", "yes", "--choice", "no"), {"choices": {"texts": ["yes", "no"]}}),
        (("--grammar", str(grammar)), {"grammar": "start: /a/"}),
    ):
        result = runner.invoke(app, ["generate", "x", *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        sent = server.calls[-1].request.structured_output
        assert sent == generation_pb2.StructuredOutput(**form)


def test_the_command_line_refuses_two_forms_and_missing_files(server: FakeServer, tmp_path):
    runner = CliRunner(env={"LORAPLEX_SERVER": server.target})
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for arguments in (
        ["--regex", "a", "--json-object"],
        ["--json-schema", str(tmp_path / "none")],
        ["--json-schema", str(tmp_path)],
        ["--grammar", str(tmp_path / "bytes")],
    ):
        assert runner.invoke(app, ["generate", "x", *arguments]).exit_code == 2
    assert server.calls == []
