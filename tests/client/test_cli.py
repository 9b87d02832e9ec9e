"""The command line: results on standard output, else one useful line and a telling exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import grpc
import pytest
import typer
from client.fake_server import DIGEST, WAIT_S, FakeServer, failure
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from loraplex.cli import app, output
from loraplex.results import Finding, Finished, FinishReason, Usage
from loraplex.v1 import adapter_pb2
from typer.testing import CliRunner, Result


@pytest.fixture
def run(server: FakeServer):
    runner = CliRunner(env={"LORAPLEX_SERVER": server.target})

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return runner.invoke(app, arguments, input=stdin, catch_exceptions=False)

    return invoke


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# help


def test_every_parameter_is_explained_and_every_option_has_a_panel():
    pending = [typer.main.get_command(app)]
    while pending:
        command = pending.pop()
        pending += getattr(command, "commands", {}).values()
        for parameter in command.params:
            if "completion" not in parameter.name:
                assert parameter.help.endswith("."), (command.name, parameter.name)
                assert parameter.rich_help_panel or "-" not in parameter.opts[0], parameter.name


# generate


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_generate_prints_the_text_and_nothing_else(run, how: str):
    result = run("generate", "one two", "--adapter", "pirate", how)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "pirate says one two\n", "")


def test_generate_as_json_holds_the_whole_completion(run):
    found = json.loads(run("generate", "x", "-a", "pirate", "--json").stdout)
    assert found["text"] == "pirate says x"
    assert found["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == 3
    assert found["adapters"] == [{"name": "pirate", "version": 1, "digest": DIGEST, "weight": 1.0}]


def test_generate_sends_every_flag(run, server: FakeServer):
    run(
        *("generate", "x", "--mix", "a=0.5", "--mix", "b", "-n", "5", "-t", "0", "--top-p", "0.5"),
        *("--top-k", "3", "--min-p", "0.25", "--repetition-penalty", "1.5", "--seed", "9"),
        *("--presence-penalty", "-1", "--frequency-penalty", "0.5", "--stop", "END"),
        *("--ignore-eos", "--logprobs", "2", "--priority", "-3", "--timeout", "9"),
        *("--cache-salt", "tenant"),
    )
    request = server.calls[0].request
    assert [(term.adapter_id, term.HasField("weight")) for term in request.mix] == [
        ("a", True),
        ("b", False),
    ]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 3)
    assert sampling.HasField("temperature")
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.25, 1.5, 9)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 0.5)
    assert (request.stop.max_new_tokens, list(request.stop.strings)) == (5, ["END"])
    assert request.stop.ignore_eos
    assert (request.logprobs, request.priority) == (2, -3)
    assert request.cache_salt == "tenant"
    remaining = server.calls[0].time_remaining
    assert remaining is not None
    assert remaining < 10


def test_flags_not_given_stay_unset(run, server: FakeServer):
    run("generate", "x")
    request = server.calls[0].request
    assert request.sampling.ByteSize() == 0
    assert request.stop.ByteSize() == 0
    assert request.adapter_id == ""


def test_a_prompt_comes_from_standard_input(run):
    assert run("generate", "-", stdin="from a pipe").stdout == "base says from a pipe\n"


def test_a_chat_turn_goes_through_the_template(run, server: FakeServer):
    run("generate", "hi", "--system", "be brief")
    run("generate", "hi", "--chat")
    turns = [
        [(turn.role, turn.content) for turn in call.request.messages.messages]
        for call in server.calls
    ]
    assert turns == [[("system", "be brief"), ("user", "hi")], [("user", "hi")]]


# where the server is


def test_the_server_is_named_before_or_after_the_command(server: FakeServer):
    runner = CliRunner(env={"LORAPLEX_SERVER": "127.0.0.1:1"})
    for arguments in (["-s", server.target, "health"], ["health", "--server", server.target]):
        assert runner.invoke(app, arguments).stdout == "serving\n"
    assert runner.invoke(app, ["health"]).exit_code == 4


# adapters


def test_an_adapters_life(run):
    assert run("adapters", "register", "pirate", "dir").stdout == f"pirate@1 {DIGEST} registered\n"
    again = run("adapters", "register", "pirate", "dir").stdout
    assert again == f"pirate@1 {DIGEST} was registered already\n"
    replaced = run("adapters", "register", "pirate", "dir", "--replace", "--load").stdout
    assert replaced.startswith("pirate@2 ")
    assert json.loads(run("adapters", "get", "pirate", "--json").stdout)["state"] == "resident"
    assert run("adapters", "unload", "pirate", "--force").stdout.endswith(" stored\n")
    assert run("adapters", "load", "pirate").stdout.endswith(" resident\n")
    described = run("adapters", "get", "pirate").stdout.splitlines()
    assert {"name: pirate", "rank: 8", "target_modules: q_proj v_proj"} <= set(described)
    assert run("adapters", "delete", "pirate").stdout == "pirate deleted\n"
    assert run("adapters", "get", "pirate").exit_code == 3


def test_force_reaches_the_server(run, server: FakeServer):
    run("adapters", "register", "pirate", "dir")
    run("adapters", "unload", "pirate", "--force")
    run("adapters", "unload", "pirate")
    assert [call.request.force for call in server.calls[1:]] == [True, False]


def test_a_piped_list_is_tab_separated_and_whole(run):
    run("adapters", "register", "pirate", "dir", "--load")
    header, row = run("adapters", "list").stdout.splitlines()
    found = dict(zip(header.split("\t"), row.split("\t"), strict=True))
    assert found["name"] == "pirate"
    assert found["digest"] == DIGEST
    assert found["state"] == "resident"
    assert found["device_bytes"] == str(2 << 20)


def test_a_list_on_a_terminal_is_a_table(client, monkeypatch):
    info = client.register_adapter("pirate", "dir", load=True).adapter
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    output.write_adapters([info])
    for expected in ("pirate", "resident", "3.0 MiB", "2.0 MiB", "sha256:abababababab"):
        assert expected in screen.getvalue()


@pytest.mark.fault("base-changed-under-store")
def test_an_adapter_that_is_not_served_says_why(client, monkeypatch, capsys):
    info = client.register_adapter("pirate", "dir").adapter
    output.write_fields(info)
    assert "unservable" not in capsys.readouterr().out
    why = Finding("BASE_MODEL_MISMATCH", "", "registered for another base")
    info = replace(info, unservable=why, base_name="tiny")
    output.write_fields(info)
    lines = capsys.readouterr().out.splitlines()
    assert "unservable: BASE_MODEL_MISMATCH: registered for another base" in lines
    assert "base_name: tiny" in lines
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    output.write_adapters([info])
    assert "not served" in screen.getvalue()


def test_an_empty_list_says_what_to_do(run):
    result = run("adapters", "list")
    assert result.stdout == ""
    assert "loraplex adapters register" in result.stderr
    assert json.loads(run("adapters", "list", "--json").stdout) == []


# health


def test_health_tells_by_its_exit_code(run, server: FakeServer):
    assert run("health").exit_code == 0
    server.serving = health_pb2.HealthCheckResponse.NOT_SERVING
    result = run("health", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (4, {"status": "not_serving"})


# failures

WAIT = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2))
RESOURCE = error_details_pb2.ResourceInfo(resource_name="pirate")


@pytest.mark.parametrize(
    ("scripted", "exit_code", "advice"),
    [
        (failure(grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG"), 2, "shorten the prompt"),
        (failure(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"), 2, "--help"),
        (failure(grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", RESOURCE), 3, "adapters list"),
        (failure(grpc.StatusCode.UNAVAILABLE, "OVERLOADED", WAIT), 4, "try again in 2 s"),
        (failure(grpc.StatusCode.UNAVAILABLE, "DRAINING"), 4, "try again"),
        (failure(grpc.StatusCode.ABORTED, "ADAPTER_UNLOADED"), 4, "load it again"),
        (failure(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"), 5, "--timeout"),
        (failure(grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_CONFLICT"), 6, "--replace"),
        (failure(grpc.StatusCode.FAILED_PRECONDITION, "BASE_MODEL_MISMATCH"), 6, "adapter"),
        (failure(grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_NOT_MIXABLE"), 2, "use it alone"),
        (failure(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND"), 3, "without --resume"),
        (failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "PIN_BUDGET"), 6, "unpin"),
        (failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "MERGE_BUDGET"), 6, "unmerge"),
        (failure(grpc.StatusCode.INTERNAL, "ENGINE_FAULT"), 1, ""),
        (failure(grpc.StatusCode.UNIMPLEMENTED, ""), 1, "older"),
    ],
)
@pytest.mark.parametrize("how", ["--stream", "--json"])
def test_a_failure_is_one_line_that_says_what_to_do(
    run, server: FakeServer, scripted, exit_code: int, advice: str, how: str
):
    server.failures = [scripted] * 4
    result = run("generate", "x", how)
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert scripted.message.strip() in result.stderr
    assert advice in result.stderr


def test_no_server_is_one_line_that_names_the_address():
    result = CliRunner().invoke(app, ["-s", "127.0.0.1:1", "adapters", "list"])
    assert result.exit_code == 4
    assert result.stderr.count("\n") == 1
    assert "is a server running at 127.0.0.1:1?" in result.stderr


def test_a_broken_stream_keeps_what_came_and_ends_its_line(run, server: FakeServer):
    server.break_after = 2
    result = run("generate", "x")
    assert (result.exit_code, result.stdout) == (4, "base says\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--mix", "a=much"],
        ["generate", "x", "--mix", "a=nan"],
        ["generate", "x", "--mix", "=1"],
        ["generate", "x", "--mix", "a=1", "--mix", "a=2"],
        ["generate", "x", "--mix", "a=1", "--adapter", "b"],
        ["generate", "x", "--max-new-tokens", "-1"],
        ["generate", "x", "--timeout", "0"],
        ["generate"],
        ["nonsense"],
    ],
)
def test_a_wrong_command_line_never_reaches_the_server(run, server: FakeServer, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert server.calls == []


# a terminal


def test_a_terminal_is_not_commanded_by_the_model(monkeypatch):
    screen, pipe = Terminal(), io.StringIO()
    for stream in (screen, pipe):
        monkeypatch.setattr(sys, "stdout", stream)
        output.write_text("a\tb\n\x1b[2J\x9b1m")
    assert screen.getvalue() == "a\tb\n\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}1m"
    assert pipe.getvalue() == "a\tb\n\x1b[2J\x9b1m"


def test_a_terminal_sees_who_answered(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    output.write_summary(Finished(FinishReason.LENGTH, Usage(12, 32), ()))
    assert "[base model, 12 + 32 tokens, length]" in screen.getvalue()


# chat


def test_chat_keeps_the_conversation_and_its_commands(run, server: FakeServer):
    script = "one\ntwo\n/adapter pirate\nthree\n/reset\n/adapter\nfour\n/nonsense\n/quit\nfive\n"
    result = run("chat", "--system", "be brief", stdin=script)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "base says one",
        "base says two",
        "pirate says three",
        "base says four",
    ]
    assert "no command /nonsense" in result.stderr
    sent = [call.request for call in server.calls]
    assert [request.adapter_id for request in sent] == ["", "", "pirate", ""]
    turns = [[turn.content for turn in request.messages.messages] for request in sent]
    heard = ["one", "base says one", "two", "base says two", "three"]
    assert turns == [
        ["be brief", *heard[:1]],
        ["be brief", *heard[:3]],
        ["be brief", *heard],
        ["be brief", "four"],
    ]


def test_chat_goes_on_after_a_failure_and_forgets_the_failed_turn(run, server: FakeServer):
    server.failures = [failure(grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", RESOURCE)]
    result = run("chat", "--adapter", "pirat", stdin="one\n/adapter pirate\ntwo\n")
    assert result.exit_code == 0
    assert result.stdout == "pirate says two\n"
    assert "ADAPTER_NOT_FOUND" in result.stderr
    turns = server.calls[-1].request.messages.messages
    assert [turn.content for turn in turns] == ["two"]


# as its own process


def start(server: FakeServer, *arguments: str) -> subprocess.Popen[str]:
    # A background job of a shell ignores SIGINT, and so would what it starts.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "loraplex", *arguments],
            env={**os.environ, "LORAPLEX_SERVER": server.target},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_the_command_runs_as_a_process(server: FakeServer):
    process = start(server, "generate", "one two")
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, err) == (0, "base says one two\n", "")


def test_a_process_that_finds_no_server_says_one_line(server: FakeServer):
    process = start(server, "-s", "127.0.0.1:1", "generate", "one two")
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, err.count("\n")) == (4, "", 1)


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_ctrl_c_cancels_the_call_and_leaves_quietly(server: FakeServer, how: str):
    server.hold_after = 1
    process = start(server, "generate", "one two", how)
    assert server.holding.wait(WAIT_S)
    if how == "--stream":
        assert process.stdout is not None
        assert process.stdout.read(4) == "base"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (130, "\ncancelled\n")
    assert server.ended.wait(WAIT_S)


def test_ctrl_c_in_a_chat_stops_only_the_answer(server: FakeServer):
    server.hold_after = 1
    process = start(server, "chat")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("one\n")
    process.stdin.flush()
    assert server.holding.wait(WAIT_S)
    assert process.stdout.read(4) == "base"
    process.send_signal(signal.SIGINT)
    assert server.ended.wait(WAIT_S)
    server.hold_after = None
    out, err = process.communicate("two\n", timeout=WAIT_S)
    assert (process.returncode, out, err) == (0, "\nbase says two\n", "stopped\n")
    assert [turn.content for turn in server.calls[-1].request.messages.messages] == ["two"]


# the rest of an adapter's life


@pytest.fixture
def files(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(3000))
    return str(tmp_path)


def test_an_upload_prints_what_was_registered(run, server: FakeServer, files: str):
    result = run("adapters", "upload", "pirate", files, "--label", "team=search", "--load")
    assert result.exit_code == 0
    assert result.stdout.startswith("pirate@1 sha256:")
    assert result.stdout.endswith(" registered\n")
    header = next(c.request for c in server.calls if c.method == "UploadAdapter")
    assert (header.load, dict(header.labels)) == (True, {"team": "search"})


def test_an_interrupted_upload_says_how_to_go_on(run, server: FakeServer, files: str):
    late = failure(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    server.break_uploads = [late]
    result = run("adapters", "upload", "pirate", files)
    assert result.exit_code == 5
    assert "--resume upload0" in result.stderr
    again = run("adapters", "upload", "pirate", files, "--resume", "upload0")
    assert again.exit_code == 0


@pytest.mark.fault("uploads-blocked")
def test_unfinished_uploads_are_listed_and_aborted(run, server: FakeServer):
    assert "no unfinished uploads" in run("adapters", "uploads", "list").stderr
    for number in range(2):
        server.uploads[f"upload{number}"] = {1: bytearray(b"{}"), 2: bytearray(number)}
    lines = run("adapters", "uploads", "list").stdout.splitlines()
    assert lines[1:] == [
        f"upload{number}\t10.0.0.7\t{2 + number}\t2030-03-17 17:46:40Z\t2030-03-18 17:46:40Z"
        for number in range(2)
    ]
    (first, _) = json.loads(run("adapters", "uploads", "list", "--json").stdout)
    assert (first["upload_id"], first["config_bytes"]) == ("upload0", 2)
    result = run("adapters", "uploads", "abort", "upload0", "upload1")
    assert result.stdout == "upload0 aborted\nupload1 aborted\n"
    assert server.uploads == {}


def test_a_refused_upload_is_dropped(run, server: FakeServer, files: str):
    server.break_uploads = [failure(grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_INVALID")]
    assert run("adapters", "upload", "pirate", files).exit_code == 6
    assert server.uploads == {}


def test_validate_lists_all_findings_and_tells_by_its_exit_code(run, server, files: str):
    bad = [adapter_pb2.AdapterFinding(reason="ADAPTER_INVALID", field=f, message="m") for f in "ab"]
    server.judgement = adapter_pb2.ValidateAdapterResponse(findings=bad)
    result = run("adapters", "validate", "dir")
    assert (result.exit_code, result.stdout) == (
        6,
        "ADAPTER_INVALID\ta\tm\nADAPTER_INVALID\tb\tm\n",
    )
    good = adapter_pb2.AdapterSpec(digest=DIGEST, rank=4, provenance={"k": "v"})
    server.judgement = adapter_pb2.ValidateAdapterResponse(spec=good)
    result = run("adapters", "validate", files, "--local")
    assert result.exit_code == 0
    assert {"rank: 4", "provenance: k=v"} <= set(result.stdout.splitlines())
    assert server.uploads == {}
    assert json.loads(run("adapters", "validate", "dir", "--json").stdout)["spec"]["rank"] == 4


def test_pins_merges_labels_and_aliases(run, server: FakeServer):
    run("adapters", "register", "pirate", "dir", "--label", "team=search")
    assert dict(server.calls[-1].request.labels) == {"team": "search"}
    assert run("adapters", "pin", "pirate").stdout.endswith(" resident pinned\n")
    assert run("adapters", "merge", "pirate").stdout.endswith(" resident pinned merged\n")
    assert run("adapters", "unpin", "pirate").stdout.endswith(" resident merged\n")
    assert run("adapters", "unmerge", "pirate").stdout.endswith(" resident\n")
    done = run("adapters", "label", "pirate", "stage=live", "--remove", "team")
    assert done.stdout == f"pirate@1 {DIGEST} stage=live\n"
    done = run("adapters", "alias", "live", "pirate", "--expected", "")
    assert done.stdout == f"live -> pirate@1 {DIGEST}\n"
    assert server.calls[-1].request.HasField("expected")
    assert run("adapters", "unalias", "live").stdout == "live removed\n"
    run("adapters", "register", "pirate", "dir", "--replace")
    assert len(run("adapters", "versions", "pirate").stdout.splitlines()) == 3
    run("adapters", "unload", "pirate", "--drain", "2.5")
    assert server.calls[-1].request.drain.ToMilliseconds() == 2500
    assert run("adapters", "restore", "pirate").exit_code == 0
    run("adapters", "list", "--label", "a=b")
    assert dict(server.calls[-1].request.labels) == {"a": "b"}


@pytest.mark.parametrize("label", ["x", "=v", "a"])
def test_a_wrong_label_never_reaches_the_server(run, server: FakeServer, label: str):
    assert run("adapters", "list", "--label", label).exit_code == 2
    assert server.calls == []


def test_a_watch_prints_the_table_then_a_line_for_each_change(run, server: FakeServer):
    adapter = adapter_pb2.Adapter(name="pirate", version=1, digest=DIGEST)
    part = adapter_pb2.WatchAdaptersResponse
    server.news = [
        part(table=adapter_pb2.AdapterTable(adapters=[adapter], complete=True)),
        part(change=adapter_pb2.AdapterChange(type="ADAPTER_CHANGE_TYPE_LOADING", adapter=adapter)),
        part(
            change=adapter_pb2.AdapterChange(
                type="ADAPTER_CHANGE_TYPE_ALIAS_SET", adapter=adapter, alias="live"
            )
        ),
    ]
    lines = run("adapters", "watch").stdout.splitlines()
    assert lines[1].startswith("pirate\t1\t")
    assert lines[2:] == [f"loading pirate@1 {DIGEST}", f"alias_set live pirate@1 {DIGEST}"]
    table, *events = map(json.loads, run("adapters", "watch", "--json").stdout.splitlines())
    assert [adapter["name"] for adapter in table["table"]["adapters"]] == ["pirate"]
    assert [event["event"]["kind"] for event in events] == ["loading", "alias_set"]


def test_a_folder_that_holds_no_adapter_is_reported_without_an_upload(
    run, server: FakeServer, tmp_path
):
    (tmp_path / "support").mkdir()
    (tmp_path / "support" / "adapter_config.json").write_text("{}")
    found = run("adapters", "validate", "--local", str(tmp_path))
    assert found.exit_code == 6
    assert found.stdout.startswith("ADAPTER_INVALID\tsupport\t")
    refused = run("adapters", "upload", "a", str(tmp_path))
    assert refused.exit_code == 6
    assert "support/" in refused.stderr
    assert server.calls == []
