"""Several completions, scores and tokens, as the clients and the command line give them."""

from __future__ import annotations

import json

import pytest
from client.fake_server import FakeServer
from loraplex import (
    AsyncClient,
    Client,
    Completion,
    Delta,
    Finished,
    FinishReason,
    InvalidRequest,
    ServerFault,
)
from loraplex.cli import app
from typer.testing import CliRunner, Result


def whole(client: Client) -> Completion:
    return client.generate("x y", n=3, logprobs=0, return_prompt_token_ids=True)


def test_alternatives_follow_the_first_completion(client: Client) -> None:
    done = whole(client)
    assert done.text == "base says x y"
    assert [each.text for each in done.alternatives] == ["1" + done.text, "2" + done.text]
    assert [each.token_ids[0] for each in done.alternatives] == [1, 2]
    assert {each.finish_reason for each in done.alternatives} == {FinishReason.LENGTH}
    assert [len(each.logprobs) for each in done.alternatives] == [5, 5]
    assert done.alternatives[0].usage.completion_tokens == done.usage.completion_tokens + 1
    assert done.prompt_token_ids == (4, 5)
    assert done.logprobs[0].chosen.raw == b"<0>\xff"
    assert client.generate("x").alternatives == ()
    assert client.generate("x").prompt_token_ids == ()


def test_a_stream_of_several_says_the_same_and_which_each_part_is(client: Client) -> None:
    with client.stream("x y", n=3, return_prompt_token_ids=True) as stream:
        texts = ["", "", ""]
        for delta in stream:
            texts[delta.index] += delta.text
            assert stream.finished is None
    done = whole(client)
    assert texts == [part.text for part in (done, *done.alternatives)]
    assert stream.completion() == done
    assert sorted(stream.finishes) == [0, 1, 2]
    assert stream.finished == stream.finishes[0]
    assert stream.finishes[2].index == 2
    assert stream.finishes[2].finish_reason is FinishReason.LENGTH
    assert stream.started is not None
    assert stream.started.prompt_token_ids == (4, 5)


async def test_the_asyncio_client_says_the_same(server: FakeServer, client: Client) -> None:
    async with AsyncClient(server.target) as other:
        assert await other.generate("x y", n=3, return_prompt_token_ids=True) == whole(client)
        stream = other.stream("x y", n=3, return_prompt_token_ids=True)
        assert await stream.completion() == whole(client)
        assert sorted(stream.finishes) == [0, 1, 2]


async def test_the_parts_of_a_stream_have_each_end_where_it_comes(
    server: FakeServer, client: Client
) -> None:
    with client.stream("x y", n=3) as stream:
        parts = list(stream.parts())
    for index in range(3):
        *own, end = [part for part in parts if part.index == index]
        assert isinstance(end, Finished)
        assert all(isinstance(part, Delta) for part in own)
        assert end == stream.finishes[index]
    assert stream.completion().text == whole(client).text
    async with AsyncClient(server.target) as other:
        running = other.stream("x y", n=3)
        assert [part async for part in running.parts()] == parts
        assert (await running.completion()).text == whole(client).text
    server.omit_finished = True
    with client.stream("x", n=2) as stream, pytest.raises(ServerFault):
        list(stream.parts())


def test_a_stream_that_lacks_the_end_of_one_is_no_success(
    server: FakeServer, client: Client
) -> None:
    server.omit_finished = True  # of the first
    stream = client.stream("x", n=2)
    with pytest.raises(ServerFault):
        list(stream)
    assert stream.finished is None
    assert sorted(stream.finishes) == [1]


def test_a_text_becomes_tokens_and_tokens_a_text(server: FakeServer, client: Client) -> None:
    found = client.tokenize("é")
    assert (found.token_ids, found.pieces) == ((1, 0xC3, 0xA9), ())
    found = client.tokenize("é", special_tokens=False, pieces=True)
    assert (found.token_ids, found.pieces) == ((0xC3, 0xA9), (b"\xc3", b"\xa9"))
    back = client.detokenize([1, 0xC3], pieces=True)
    assert (back.text, back.pieces) == ("<s>\ufffd", (b"\1", b"\xc3"))
    assert client.detokenize((1, 65), skip_special_tokens=True).text == "A"
    sent = len(server.calls)
    for wrong in ([-1], [1 << 32], ["x"], [1.5]):
        with pytest.raises(InvalidRequest, match="token_ids"):
            client.detokenize(wrong)
    with pytest.raises(InvalidRequest, match="text"):
        client.tokenize("\ud800")
    assert len(server.calls) == sent


# the command line


@pytest.fixture
def run(server: FakeServer):
    runner = CliRunner(env={"LORAPLEX_SERVER": server.target})

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return runner.invoke(app, arguments, input=stdin, catch_exceptions=False)

    return invoke


def test_completions_are_printed_one_after_the_other(run, server: FakeServer) -> None:
    result = run("generate", "x", "--n", "2", "--min-new-tokens", "3", "--include-stop-string")
    assert result.stdout == "[1]\nbase says x\n[2]\n1base says x\n"
    request = server.calls[-1].request
    assert (request.n, request.stop.min_new_tokens) == (2, 3)
    assert request.stop.include_stop_string
    assert server.calls[-1].method == "Generate"
    found = json.loads(run("generate", "x", "--n", "2", "--json", "--logprobs", "0").stdout)
    assert found["alternatives"][0]["text"] == "1base says x"
    assert found["logprobs"][0]["chosen"]["raw"] == [*b"<0>\xff"]
    run("generate", "x", "--n", "1")
    assert server.calls[-1].method == "GenerateStream"


def test_tokens_are_printed(run, server: FakeServer) -> None:
    assert run("tokenize", "é").stdout == "1 195 169\n"
    assert run("tokenize", "-", "--no-special-tokens", stdin="é").stdout == "195 169\n"
    lines = run("tokenize", "aé", "--no-special-tokens", "--pieces").stdout
    assert lines == '97\t"a"\n195\t"\\\\xc3"\n169\t"\\\\xa9"\n'
    assert json.loads(run("tokenize", "a", "--pieces", "--json").stdout)["pieces"] == [[97]]
    assert run("detokenize", "1", "65").stdout == "<s>A\n"
    assert run("detokenize", "1", "65", "--skip-special-tokens").stdout == "A\n"
    assert run("detokenize").exit_code == 2
