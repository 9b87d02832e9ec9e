"""The load generator counts what a server really sent, and calls wrong answers errors."""

from __future__ import annotations

import asyncio
import json
import math
import time

import load
import pytest
import report
import serve
from bench.scripted_service import scripted
from workload import Job


def jobs(*adapters: str, tokens: int = 5) -> list[Job]:
    return [Job(adapter, (i, 2, 3), tokens) for i, adapter in enumerate(adapters)]


async def test_a_closed_loop_sends_every_request_and_never_exceeds_its_concurrency() -> None:
    async with scripted() as (service, target):
        answers = await load.run(target, jobs(*["", "a0"] * 10), load.Pace(3))
    m = load.measure(answers)
    assert (m.requests, m.errors, m.output_tokens) == (20, 0, 100)
    assert service.most_running <= 3
    assert [answer.token_ids for answer in answers] == [(7,) * 5] * 20
    assert sorted(asked.token_ids.ids[0] for asked in service.seen) == list(range(20))


async def test_requests_are_greedy_and_ignore_the_end_of_sequence() -> None:
    async with scripted() as (service, target):
        await load.run(target, jobs("a0"), load.Pace(1))
    [asked] = service.seen
    assert asked.sampling.HasField("temperature")
    assert asked.sampling.temperature == 0
    assert asked.stop.ignore_eos
    assert asked.stop.max_new_tokens == 5


async def test_an_open_loop_sends_at_the_given_times_however_many_are_running() -> None:
    began = time.perf_counter()
    async with scripted() as (_, target):
        pace = load.Pace(1, arrivals=(0.0, 0.0, 0.0, 0.02), limit_s=60)
        answers = await load.run(target, jobs("together", "together", "together", ""), pace)
    assert load.measure(answers).errors == 0  # they end only if three of them run at once
    assert answers[3].sent >= began + 0.019


async def test_a_wrong_adapter_a_short_answer_and_a_refusal_are_errors() -> None:
    async with scripted() as (_, target):
        answers = await load.run(target, jobs("wrong", "short", "unknown", "a0"), load.Pace(2))
    errors = [answer.error for answer in answers]
    assert errors == ["WRONG_ADAPTER", "WRONG_LENGTH", "NOT_FOUND", ""]
    m = load.measure(answers)
    assert m.errors == 3
    assert m.reasons == {"WRONG_ADAPTER": 1, "WRONG_LENGTH": 1, "NOT_FOUND": 1}


async def test_a_run_ends_in_time_even_if_the_server_hangs() -> None:
    async with scripted() as (_, target):
        answers = await load.run(target, jobs("stuck", "stuck", "a0"), load.Pace(1, limit_s=0.3))
    assert [answer.error for answer in answers] == ["DEADLINE_EXCEEDED", *["OUT_OF_TIME"] * 2]
    assert math.isnan(load.measure(answers).ttft_p50_ms)


def test_latencies_come_from_the_messages_that_carry_tokens() -> None:
    def answer(sent: float, *tokens: tuple[float, int]) -> load.Answer:
        return load.Answer(Job("", (1,), 4), sent, tokens, (), "")

    m = load.measure([answer(10.0, (10.5, 1), (10.6, 1), (10.8, 2)), answer(10.1, (10.4, 4))])
    assert m.ttft_p50_ms == pytest.approx(300)
    assert m.ttft_p99_ms == pytest.approx(500)
    assert m.itl_p50_ms == pytest.approx(100)  # two tokens in 200 ms are two gaps of 100
    assert m.output_tok_s == pytest.approx(8 / 0.8)


@pytest.mark.parametrize(("p", "value"), [(0, 1), (1, 1), (50, 50), (99, 99), (100, 100)])
def test_a_percentile_is_one_of_the_values(p: float, value: int) -> None:
    assert load.percentile(list(range(100, 0, -1)), p) == value


async def test_the_command_ends_with_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    async with scripted() as (_, target):
        arguments = ["--target", target, "--requests", "6", "--concurrency", "2"]
        arguments += ["--output-tokens", "2-4", "--adapters", "distinct", "--names", "a0,a1"]
        status = await asyncio.to_thread(serve.main, [*arguments, "--warmup", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0
    assert result["errors"] == 0
    assert result["requests"] == 6
    wanted = {"output_tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"}
    assert all(result[name] > 0 for name in wanted)


async def test_the_command_fails_when_a_request_failed(capsys: pytest.CaptureFixture[str]) -> None:
    async with scripted() as (_, target):
        arguments = ["--target", target, "--requests", "2", "--warmup", "0"]
        arguments += ["--adapters", "identical", "--names", "unknown"]
        status = await asyncio.to_thread(serve.main, arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 1
    assert result["errors"] == 2
    assert result["ttft_p50_ms"] is None


def test_a_json_line_is_strict_whatever_was_measured() -> None:
    line = report.json_line({"a": float("nan"), "b": {"c": [float("inf"), 1.23456789]}, "d": None})
    assert json.loads(line) == {"a": None, "b": {"c": [None, 1.235]}, "d": None}
    assert "\n" not in line
