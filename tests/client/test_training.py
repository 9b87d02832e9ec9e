"""Training jobs through both clients and the command line: what is sent, and what is shown."""

from __future__ import annotations

import inspect
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from client.fake_server import WAIT_S, failure
from google.rpc import error_details_pb2
from loraplex import (
    AsyncClient,
    Client,
    FailedPrecondition,
    InvalidRequest,
    JobConflict,
    JobNotFound,
    JobState,
    Unavailable,
)
from loraplex.aio import AsyncTraining
from loraplex.cli import app, training_output
from loraplex.client import Training
from loraplex.training import job
from loraplex.v1 import training_pb2 as pb
from loraplex.v1 import training_pb2_grpc
from typer.testing import CliRunner, Result

DATA = b'{"text": "hi"}\n'


def described(job_id: str, state: str, **fields: Any) -> pb.TrainingJob:
    return pb.TrainingJob(
        job_id=job_id,
        state=f"TRAINING_JOB_STATE_{state}",
        spec={"name": "tickets", "method": {"name": "lora", "options": {"r": "16"}}},
        create_time={"seconds": 1_700_000_000},
        **fields,
    )


PROGRESS = pb.TrainingProgress(
    step=5,
    steps=10,
    loss=1.25,
    learning_rate=1e-4,
    gradient_norm=0.5,
    tokens_per_second=123.4,
    remaining={"seconds": 75, "nanos": 500_000_000},
    evaluation={"step": 4, "loss": 1.5, "perplexity": 4.48, "metric": 0.25},
    best_evaluation={"step": 2, "loss": 1.4, "perplexity": 4.06},
    saved_step=4,
)
DONE = described(
    "j3",
    "SUCCEEDED",
    progress=PROGRESS,
    result={"version": 2, "digest": "sha256:ab", "ending": "all steps are done", "loaded": True},
)
FAILED = described(
    "j2",
    "FAILED",
    error={"reason": "DIVERGED", "message": "the loss is not finite", "log": ["a", "b\x1b[2J"]},
)


@dataclass
class FakeTraining(training_pb2_grpc.TrainingServiceServicer):
    """Answers as told, and keeps what it was asked."""

    failures: list[Any] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    states: list[pb.TrainingJob] = field(default_factory=list)
    hold: bool = False
    target: str = ""

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        training_pb2_grpc.add_TrainingServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def _enter(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.failures:
            self.failures.pop(0).abort(context)

    def CreateJob(self, request, context):
        self._enter(request, context)
        return pb.CreateJobResponse(job=described("j3", "QUEUED", queue_position=2), created=True)

    def GetJob(self, request, context):
        self._enter(request, context)
        return pb.GetJobResponse(job={"j2": FAILED, "j3": DONE}[request.job_id])

    def ListJobs(self, request, context):
        self._enter(request, context)
        if not request.page_token:
            return pb.ListJobsResponse(jobs=[DONE], next_page_token="j3")
        return pb.ListJobsResponse(jobs=[FAILED])

    def CancelJob(self, request, context):
        self._enter(request, context)
        return pb.CancelJobResponse(job=described(request.job_id, "CANCELLED"))

    def WatchJob(self, request, context):
        self._enter(request, context)
        for state in self.states:
            yield pb.WatchJobResponse(job=state)
        if self.hold:
            over = threading.Event()
            context.add_callback(over.set)
            over.wait(WAIT_S)


@pytest.fixture
def server() -> Iterator[FakeTraining]:
    fake = FakeTraining()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def client(server: FakeTraining) -> Iterator[Client]:
    with Client(server.target, timeout=30.0) as connected:
        yield connected


@pytest.fixture
def run(server: FakeTraining):
    runner = CliRunner(env={"LORAPLEX_SERVER": server.target})

    def invoke(*arguments: str) -> Result:
        return runner.invoke(app, ("train", *arguments), catch_exceptions=False)

    return invoke


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_bytes(DATA)
    return file


def test_both_clients_have_the_same_calls_with_the_same_arguments():
    for name, method in inspect.getmembers(Training, inspect.isfunction):
        if not name.startswith("_"):
            twin = getattr(AsyncTraining, name)
            assert inspect.signature(twin).parameters == inspect.signature(method).parameters, name


async def test_a_job_is_asked_for_in_the_same_words_by_both(server: FakeTraining, data: Path):
    options = {
        "method": "dora",
        "options": {"r": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        "epochs": 2.5,
        "batch_size": 3,
        "pack": False,
        "learning_rate": 1e-3,
        "optimiser": "sgd",
        "warmup": 0.0,
        "metric": "exact",
        "alias": "live",
        "load": True,
        "labels": {"team": "search"},
        "seed": None,
    }
    with Client(server.target) as client:
        job = client.training.create("tickets", data, request_id="r1", **options)
    async with AsyncClient(server.target) as client:
        assert job == await client.training.create("tickets", data, request_id="r1", **options)
    first, second = server.requests
    assert first == second
    spec = first.spec
    assert (spec.name, spec.method.name, spec.epochs, spec.batch_size) == (
        "tickets",
        "dora",
        2.5,
        3,
    )
    assert dict(spec.method.options) == {
        "r": "16",
        "use_rslora": "true",
        "target_modules": "q_proj,v_proj",
    }
    assert spec.HasField("pack")
    assert not spec.pack
    assert not spec.HasField("steps")
    assert not spec.HasField("seed")
    assert (spec.optimiser.name, spec.optimiser.learning_rate) == ("sgd", 1e-3)
    assert spec.optimiser.HasField("warmup")
    assert not spec.optimiser.HasField("clip")
    assert first.data.jsonl == DATA
    assert not first.HasField("eval_data")
    assert (first.delivery.alias, first.delivery.load, first.delivery.replace) == (
        "live", True, False,
    )  # fmt: skip
    assert dict(first.delivery.labels) == {"team": "search"}
    assert (job.state, job.queue_position) == (JobState.QUEUED, 2)


def test_data_may_lie_on_the_server_and_must_be_somewhere(client: Client, server: FakeTraining):
    client.training.create("n", server_path="sets/a.jsonl", eval_data=b"{}")
    (request,) = server.requests
    assert (request.data.path, request.eval_data.jsonl) == ("sets/a.jsonl", b"{}")
    for arguments in ({}, {"data": b"x", "server_path": "y"}, {"data": "/no/such/file"}):
        with pytest.raises(InvalidRequest) as caught:
            client.training.create("n", **arguments)
        assert caught.value.violations[0].field == "data"
    with pytest.raises(TypeError, match="colour"):
        client.training.create("n", b"x", colour="red")  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest) as caught:
        client.training.create("n", b"x", steps=-1)
    assert caught.value.violations[0].field == "steps"


def test_every_call_is_one_job_however_often_it_is_tried(client: Client, server: FakeTraining):
    server.failures = [failure(grpc.StatusCode.UNAVAILABLE, "OVERLOADED")]
    client.training.create("n", b"x")
    client.training.create("n", b"x")
    ids = [request.request_id for request in server.requests]
    assert ids[0] == ids[1] != ids[2]  # the first was tried again


def test_a_job_is_read_whole(client: Client):
    job = client.training.get("j3")
    assert (job.state, job.name, job.method, dict(job.options)) == (
        JobState.SUCCEEDED, "tickets", "lora", {"r": "16"},
    )  # fmt: skip
    assert job.create_time == datetime.fromtimestamp(1_700_000_000, UTC)
    assert job.start_time is None
    now = job.progress
    assert (now.step, now.steps, now.loss, now.remaining, now.saved_step) == (5, 10, 1.25, 75.5, 4)
    assert (now.evaluation.loss, now.evaluation.metric) == (1.5, 0.25)
    assert (now.best_evaluation.step, now.best_evaluation.metric) == (2, None)
    assert (job.result.version, job.result.digest, job.result.loaded) == (2, "sha256:ab", True)
    assert job.error is None
    failed = client.training.get("j2")
    assert (failed.error.reason, failed.error.log[0]) == ("DIVERGED", "a")
    assert failed.progress is None
    assert failed.state.final


async def test_all_pages_are_listed(server: FakeTraining):
    with Client(server.target) as client:
        found = client.training.list(states=["failed", JobState.SUCCEEDED], page_size=1)
        with pytest.raises(InvalidRequest):
            client.training.list(states=["lost"])
    async with AsyncClient(server.target) as client:
        assert found == await client.training.list(
            states=["failed", JobState.SUCCEEDED], page_size=1
        )
    assert [job.job_id for job in found] == ["j3", "j2"]
    assert [request.page_token for request in server.requests] == ["", "j3"] * 2
    assert list(server.requests[0].states) == [5, 4]


async def test_a_watch_goes_to_the_end_or_until_it_is_left(server: FakeTraining):
    server.states = [described("j3", "RUNNING", progress=PROGRESS), DONE]
    with Client(server.target) as client:
        assert [job.state for job in client.training.watch("j3")] == ["running", "succeeded"]
    async with AsyncClient(server.target) as client:
        seen = [job.state async for job in client.training.watch("j3")]
        assert seen == ["running", "succeeded"]
        server.hold = True
        server.states = server.states[:1]
        watch = client.training.watch("j3")
        assert (await anext(watch)).state is JobState.RUNNING
        watch.cancel()
        assert [job async for job in watch] == []
    with Client(server.target) as client, client.training.watch("j3") as states:
        next(states)
        states.cancel()
        assert list(states) == []


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", JobNotFound),
        (grpc.StatusCode.ALREADY_EXISTS, "JOB_CONFLICT", JobConflict),
        (grpc.StatusCode.FAILED_PRECONDITION, "TRAINING_DISABLED", FailedPrecondition),
        (grpc.StatusCode.UNAVAILABLE, "TRAINING_ELSEWHERE", Unavailable),
    ],
)
async def test_refusals_are_typed(server: FakeTraining, code, reason: str, kind: type):
    server.failures = [failure(code, reason)] * 8
    with Client(server.target) as client, pytest.raises(kind):
        client.training.cancel("j1")
    server.failures = [failure(code, reason)] * 8
    async with AsyncClient(server.target) as client:
        with pytest.raises(kind):
            await client.training.get("j1")
        server.failures = [failure(code, reason)] * 8
        with pytest.raises(kind):
            await anext(client.training.watch("j1"))


# the command line


def test_create_prints_the_job_and_sends_every_flag(run, server: FakeTraining, data: Path):
    result = run(
        *("create", "tickets", str(data), "--method", "dora", "--set", "r=8", "--set", "bias=none"),
        *("--epochs", "2", "--batch-size", "3", "--accumulation", "2", "--pack", "--lr", "1e-3"),
        *("--max-length", "99", "--optimiser", "sgd", "--schedule", "linear", "--learn", "all"),
        *("--eval-every", "7", "--patience", "2", "--metric", "exact", "--seed", "5", "--replace"),
        *("--load", "--alias", "live", "--label", "a=b", "--request-id", "x"),
    )
    assert (result.exit_code, result.stdout) == (0, "j3\n")
    assert "loraplex train watch j3" in result.stderr
    (request,) = server.requests
    spec = request.spec
    assert dict(spec.method.options) == {"r": "8", "bias": "none"}
    assert (spec.epochs, spec.batch_size, spec.accumulation, spec.pack) == (2, 3, 2, True)
    assert (spec.max_length, spec.learn, spec.eval_every, spec.patience) == (99, "all", 7, 2)
    assert (spec.metric, spec.seed, spec.optimiser.schedule) == ("exact", 5, "linear")
    assert (spec.optimiser.name, spec.optimiser.learning_rate) == ("sgd", 1e-3)
    assert request.delivery == pb.TrainingDelivery(
        replace=True, load=True, alias="live", labels={"a": "b"}
    )
    assert (request.request_id, request.data.jsonl) == ("x", DATA)


def test_flags_not_given_stay_unset(run, server: FakeTraining):
    run("create", "tickets", "sets/a.jsonl", "--on-server", "--eval-data", "sets/b.jsonl")
    (request,) = server.requests
    assert request.spec == pb.TrainingSpec(
        name="tickets", method=pb.TrainingMethod(), optimiser=pb.TrainingOptimiser()
    )
    assert (request.data.path, request.eval_data.path) == ("sets/a.jsonl", "sets/b.jsonl")
    assert request.delivery == pb.TrainingDelivery()


def test_watch_ends_with_the_adapter_or_with_the_reason(run, server: FakeTraining, data: Path):
    server.states = [described("j3", "QUEUED", queue_position=2),
                     described("j3", "RUNNING", progress=PROGRESS), DONE]  # fmt: skip
    for arguments in (("watch", "j3"), ("create", "tickets", str(data), "--watch")):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (0, "tickets@2 sha256:ab\n")
        assert "tickets queued behind 2" in result.stderr
        assert "tickets running 5/10 loss 1.2500 eval 1.5000 metric 0.250 123 tok/s 1:16 left" in (
            result.stderr
        )
    lines = run("watch", "j3", "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["queued", "running", "succeeded"]
    server.states = [FAILED]
    result = run("watch", "j2")
    assert (result.exit_code, result.stdout) == (6, "")
    assert "the loss is not finite (DIVERGED)" in result.stderr
    assert "\x1b" not in result.stderr
    server.states = [described("j2", "CANCELLED")]
    assert run("watch", "j2").exit_code == 6


def test_get_list_and_cancel(run):
    shown = dict(line.split(": ", 1) for line in run("get", "j3").stdout.splitlines())
    assert (shown["state"], shown["options"]) == ("succeeded", "r=16")
    assert (shown["progress.step"], shown["result.version"]) == ("5", "2")
    assert "start_time" not in shown
    assert "\x1b" not in run("get", "j2").stdout
    table = [line.split("\t") for line in run("list").stdout.splitlines()]
    assert table[0][:3] == ["job", "name", "state"]
    assert [row[:3] for row in table[1:]] == [
        ["j3", "tickets", "succeeded"], ["j2", "tickets", "failed"],
    ]  # fmt: skip
    assert [job["job_id"] for job in json.loads(run("list", "--json").stdout)] == ["j3", "j2"]
    assert run("cancel", "j1").stdout == "j1 cancelled\n"
    assert json.loads(run("cancel", "j1", "--json").stdout)["state"] == "cancelled"


def test_a_terminal_gets_a_table_and_a_bar(run, server: FakeTraining, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, err = Terminal(), Terminal()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    training_output.write_jobs([job(DONE)])
    with training_output.following(as_json=False) as show:
        show(job(described("j3", "RUNNING", progress=PROGRESS)))
    assert "tickets" in out.getvalue()
    assert "5/10" in err.getvalue()


@pytest.mark.parametrize(
    ("refusal", "exit_code", "advice"),
    [
        ((grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"), 3, "loraplex train list"),
        ((grpc.StatusCode.ALREADY_EXISTS, "JOB_CONFLICT"), 6, "--request-id"),
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, "JOB_QUEUE_FULL"), 6, "cancel one"),
        ((grpc.StatusCode.FAILED_PRECONDITION, "TRAINING_MEMORY"), 6, "--batch-size"),
        ((grpc.StatusCode.FAILED_PRECONDITION, "TRAINING_DISABLED"), 6, "TRAINING_DISABLED"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_a_refusal_says_what_to_do(
    run, server: FakeTraining, data: Path, refusal, exit_code, advice
):
    server.failures = [failure(*refusal, error_details_pb2.QuotaFailure())]
    result = run("create", "tickets", str(data))
    assert result.exit_code == exit_code
    assert advice in result.stderr


@pytest.mark.parametrize("term", ["r", "=1"])
def test_an_option_that_is_none_is_refused(run, data: Path, term: str):
    assert run("create", "tickets", str(data), "--set", term).exit_code == 2
