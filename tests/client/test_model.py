"""The base model, rendered conversations and matched stops, by library and command line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from client.fake_server import FakeServer
from loraplex import (
    AsyncClient,
    ChatTemplateInfo,
    Client,
    InvalidRequest,
    MatchedStop,
    NamedToken,
    RenderedChat,
)
from loraplex.cli import app, terminal
from loraplex.v1 import generation_pb2, model_pb2
from typer.testing import CliRunner, Result

USER = {"role": "user", "content": "hi"}
MODEL = model_pb2.Model(
    name="tiny",
    fingerprint="sha256:00",
    architecture="LlamaForCausalLM",
    max_context=64,
    vocab_size=100,
    eos_tokens=[{"token_id": 2, "text": "</s>"}, {"token_id": 3, "text": "\n"}],
    has_tokenizer=True,
    has_structured_output=True,
    chat_template={
        "sha256": "ab",
        "source": "model",
        "takes_tools": True,
        "variables": ["enable_thinking", "mode"],
        "text": "{{ mode }}",
    },
    hidden_size=16,
)


@pytest.fixture
def run(server: FakeServer):
    runner = CliRunner(env={"LORAPLEX_SERVER": server.target})

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return runner.invoke(app, arguments, input=stdin, catch_exceptions=False)

    return invoke


def test_a_model_is_described(server: FakeServer, client: Client) -> None:
    server.model = MODEL
    found = client.get_model()
    assert (found.name, found.max_context) == ("tiny", 64)
    assert found.eos_tokens == (NamedToken(2, "</s>"), NamedToken(3, "\n"))
    assert found.bos_token is None
    assert found.chat_template == ChatTemplateInfo(
        "ab", "model", True, ("enable_thinking", "mode"), "{{ mode }}"
    )
    assert found.hidden_size == 16
    server.model = model_pb2.Model(bos_token={"token_id": 0, "text": ""})
    found = client.get_model()
    assert (found.bos_token, found.chat_template) == (NamedToken(0, ""), None)


async def test_a_conversation_is_rendered(server: FakeServer, client: Client) -> None:
    expected = RenderedChat("<user>hi", (1, 2))
    options = {"tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}
    assert client.render_chat([USER], adapter="pirate", **options) == expected
    async with AsyncClient(server.target) as other:
        assert await other.render_chat([USER], adapter="pirate", **options) == expected
        assert (await other.get_model()).name == ""
    first, second, _ = server.calls
    assert first.request == second.request
    assert first.request.adapter_id == "pirate"
    assert list(first.request.messages.tools) == ['{"name": "f"}']
    with pytest.raises(InvalidRequest, match="content"):
        client.render_chat([{"role": "user", "content": None}])


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (None, None),
        ({"text": "<|im_end|>"}, MatchedStop(text="<|im_end|>")),
        ({"token_id": 0}, MatchedStop(token_id=0)),
    ],
)
def test_what_stopped_a_completion_is_reported(
    server: FakeServer, client: Client, wire, expected: MatchedStop | None
) -> None:
    server.matched_stop = generation_pb2.MatchedStop(**wire) if wire else None
    assert client.generate("x").matched_stop == expected
    with client.stream("x") as stream:
        list(stream)
        assert stream.finished is not None
        assert stream.finished.matched_stop == expected
        assert stream.completion().matched_stop == expected


# the command line


def test_the_model_is_printed_line_by_line(run, server: FakeServer) -> None:
    server.model = MODEL
    assert run("model").stdout.splitlines() == [
        "name: tiny",
        "fingerprint: sha256:00",
        "architecture: LlamaForCausalLM",
        "max_context: 64",
        "vocab_size: 100",
        'eos_tokens: 2 "</s>" 3 "\\n"',
        "bos_token: none",
        "has_tokenizer: True",
        "has_structured_output: True",
        "hidden_size: 16",
        "chat_template.sha256: ab",
        "chat_template.source: model",
        "chat_template.takes_tools: True",
        "chat_template.variables: enable_thinking mode",
    ]
    assert json.loads(run("model", "--json").stdout)["eos_tokens"][0]["token_id"] == 2
    server.model = model_pb2.Model()
    assert run("model").stdout.endswith("hidden_size: 0\nchat_template: none\n")


def test_a_prompt_is_printed_as_it_is(run, server: FakeServer, tmp_path) -> None:
    result = run("render", "hi", "--system", "s", "-a", "pirate")
    assert (result.stdout, result.stderr) == ("<system>s<user>hi", "")
    assert json.loads(run("render", "-", "--json", stdin="x").stdout)["token_ids"] == [1, 2]
    chat, tools = tmp_path / "chat.json", tmp_path / "tools.json"
    chat.write_text(json.dumps([USER, {"role": "assistant", "content": "é"}]), "utf-8")
    tools.write_text('[{"name": "f"}]')
    result = run(
        *("render", "--messages", str(chat), "--tools", str(tools), "--no-add-generation-prompt"),
        *("--chat-template-kwarg", "a=true", "--chat-template-kwarg", "b=x"),
    )
    assert result.stdout == "<user>hi<assistant>é"
    sent = server.calls[-1].request.messages
    assert list(sent.tools) == ['{"name": "f"}']
    assert sent.chat_template_kwargs["a"].bool_value is True
    assert sent.chat_template_kwargs["b"].string_value == "x"
    assert sent.HasField("add_generation_prompt")
    assert not sent.HasField("continue_final_message")


def test_a_conversation_must_be_given_once_and_be_a_list(run, tmp_path) -> None:
    file = tmp_path / "chat.json"
    file.write_text("{}")
    for arguments in ((), ("hi", "--messages", "x"), ("--messages", str(file))):
        assert run("render", *arguments).exit_code == 2
    file.write_text("[")
    assert run("render", "--messages", str(file)).exit_code == 2
    assert run("render", "--messages", str(tmp_path / "none")).exit_code == 2


def test_generate_sends_stop_tokens_and_template_variables(run, server: FakeServer) -> None:
    server.matched_stop = generation_pb2.MatchedStop(token_id=5)
    result = run(
        *("generate", "x", "--stop-token-id", "5", "--stop-token-id", "7", "--json"),
        *("--no-skip-special-tokens", "--chat-template-kwarg", "enable_thinking=false"),
        *("--chat-template-kwarg", "list=[1]"),
    )
    request = server.calls[0].request
    assert list(request.stop.token_ids) == [5, 7]
    assert request.HasField("skip_special_tokens")
    assert not request.skip_special_tokens
    assert [m.role for m in request.messages.messages] == ["user"]
    assert request.messages.chat_template_kwargs["enable_thinking"].bool_value is False
    assert request.messages.chat_template_kwargs["list"].json_value == "[1]"
    assert json.loads(result.stdout)["matched_stop"] == {"text": None, "token_id": 5}


# terminals and pipes of any encoding


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_cannot_be_shown_is_replaced(server: FakeServer, encoding: str, tmp_path) -> None:
    """Commands end as they do elsewhere, and no traceback appears."""
    server.model.CopyFrom(MODEL)
    server.model.eos_tokens[0].text = "日"
    server.adapters["a"] = server_adapter("日本")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    environment["LORAPLEX_SERVER"] = server.target
    chat = tmp_path / "chat.json"
    chat.write_text('[{"role": "user", "content": "日"}]', "utf-8")

    def run(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "loraplex", *arguments]
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert b"Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, done.stderr
        return done.stdout.decode(encoding)

    shown = "日" if encoding == "utf-8" else "?"
    assert run("generate", "日é").startswith(f"base says {shown}")
    assert run("generate", "日é", "--no-stream").startswith(f"base says {shown}")
    assert json.loads(run("generate", "日é", "--json"))["text"] == "base says 日é"
    assert f'2 "{shown}"' in run("model")
    assert json.loads(run("model", "--json"))["eos_tokens"][0]["text"] == "日"
    assert run("render", "--messages", str(chat)) == f"<user>{shown}"
    assert shown in run("adapters", "list")
    assert shown in run("adapters", "get", "a")
    assert json.loads(run("adapters", "get", "a", "--json"))["name"] == "日本"
    run("adapters", "get", "日", code=3)
    run("adapters", "upload", "日", str(tmp_path), code=6)  # the folder holds no adapter
    assert "Usage" in run("--help")


def server_adapter(name: str):
    from loraplex.v1 import adapter_pb2

    return adapter_pb2.Adapter(name=name, version=1)


def test_arguments_in_the_locale_c_are_read_as_utf_8(server: FakeServer) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment["LORAPLEX_SERVER"] = server.target
    for arguments, stdin in ((["日"], b""), (["-"], "日".encode())):
        command = [sys.executable, "-m", "loraplex", "generate", *arguments]
        done = subprocess.run(
            command, input=stdin, capture_output=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert server.calls[-1].request.prompt == "日"
    command[-1:] = [b"\xff"]  # type: ignore[list-item]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"loraplex: prompt")
    assert b"Traceback" not in done.stderr


def test_only_undecoded_bytes_are_recovered() -> None:
    for text in ("", "a", "日", "\ud800"):
        assert terminal.recovered(text) == text
    assert terminal.recovered("é" + "日".encode().decode("ascii", "surrogateescape")) == "é日"
    assert terminal.recovered("\udcff") == "\udcff"


def test_json_escapes_what_standard_output_cannot_show(monkeypatch) -> None:
    for encoding, can in (("ascii", False), ("utf-8", True)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert terminal.can_show("日") is can
