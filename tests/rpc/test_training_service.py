"""TrainingService: jobs from their order to their adapter, over gRPC, with a scripted trainer."""

from __future__ import annotations

import asyncio
import dataclasses
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from loraplex.v1 import adapter_pb2, training_pb2_grpc
from loraplex.v1 import training_pb2 as pb
from rpc.harness import Refused, ask, refusal, rest, running, slow_channel, until
from rpc.training_jobs import State, Training, alive, lines, order, read, training

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trains(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Training]:
    folder = tmp_path_factory.mktemp("server")
    async with training(
        folder, training_max_jobs=3, training_data=4096, write_stall_timeout=60.0
    ) as server:
        yield server


async def refused(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


def fields(seen: Refused) -> dict[str, str]:
    bad = seen.detail(error_details_pb2.BadRequest)
    return {violation.field: violation.description for violation in bad.field_violations}


# from an order to an adapter


async def test_a_job_ends_with_an_adapter_that_is_served(trains: Training) -> None:
    spec = {"method": {"name": "lora", "options": {"r": "2"}}, "batch_size": 3}
    job = await trains.create(
        *("step 2", "eval 0.5", f"publish {trains.adapter(1)}"),
        name="first", spec=spec, delivery={"load": True, "alias": "live", "labels": {"a": "b"}},
    )  # fmt: skip
    assert job.state == State.TRAINING_JOB_STATE_QUEUED
    assert job.estimated_bytes == 1000
    done = await trains.ended(job)
    assert done.state == State.TRAINING_JOB_STATE_SUCCEEDED, done.error
    assert (done.spec.name, done.spec.steps, done.spec.batch_size) == ("first", 9, 3)
    assert not done.spec.HasField("epochs")
    assert dict(done.spec.method.options) == {"r": "2"}
    assert done.result.ending == "all steps are done"
    assert done.result.peak_bytes == 3000
    assert (done.result.version, done.result.loaded, done.result.warning) == (1, True, "")
    stamps = (done.create_time, done.start_time, done.end_time)
    seconds = [stamp.ToNanoseconds() for stamp in stamps]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    request = adapter_pb2.GetAdapterRequest(adapter_id="live")
    adapter = (await trains.up.adapters.GetAdapter(request)).adapter
    assert (adapter.name, adapter.digest) == ("first", done.result.digest)
    assert adapter.state == adapter_pb2.ADAPTER_STATE_RESIDENT
    assert dict(adapter.labels) == {"a": "b"}
    reply = await trains.up.generation.Generate(ask(new=2, adapter="live"))
    assert reply.adapters[0].digest == done.result.digest


async def test_the_trainer_gets_what_was_asked_and_what_is_the_operators(trains: Training) -> None:
    spec = {
        "method": {"name": "dora", "options": {"r": "4", "target_modules": "q_proj,v_proj"}},
        "optimiser": {"name": "sgd", "learning_rate": 0.25, "schedule": "linear", "clip": 0.0},
        "pack": True,
        "learn": "all",
        "seed": 7,
        "eval_every": 2,
    }
    evaluation = pb.TrainingData(jsonl=b'{"text": "x"}\n')
    job = await trains.create("diverge", name="told", spec=spec, eval_data=evaluation)
    await trains.ended(job)
    config = tomllib.loads((trains.folder(job) / "job.toml").read_text())
    (told,) = config["job"]
    assert (told["method"], told["options"]) == (
        "dora",
        {"r": 4, "target_modules": "q_proj,v_proj"},
    )
    assert (told["optimiser"], told["lr"], told["schedule"], told["clip"]) == (
        "sgd", 0.25, "linear", 0.0,
    )  # fmt: skip
    assert (told["pack"], told["learn"], told["seed"], told["eval_every"]) == (True, "all", 7, 2)
    assert read(told["eval_data"]).encode() == evaluation.jsonl
    config_of = trains.up.server._config
    assert (config["run"]["model"], config["run"]["dtype"]) == (config_of.model, config_of.dtype)
    assert config["run"]["device"] == "cpu"
    assert config["run"]["threads"] == config_of.trainer_threads
    assert Path(config["run"]["out"]).is_relative_to(trains.folder(job))


async def test_progress_is_told_as_it_comes(trains: Training) -> None:
    job = await trains.create(
        "step 2", "eval 0.5", "step 4", "hold", f"publish {trains.adapter(2)}", name="told-of"
    )
    call = trains.watch(job)
    seen = []
    async for message in call:
        seen.append(message.job)
        if message.job.progress.saved_step == 4:
            break
    now = seen[-1].progress
    assert seen[-1].state == State.TRAINING_JOB_STATE_RUNNING
    assert (now.step, now.steps, now.loss) == (4, 9, 0.25)
    assert (now.learning_rate, now.gradient_norm) == (0.1, 2.0)
    assert now.tokens_per_second == pytest.approx(200)
    assert now.remaining.ToMilliseconds() == 2500
    assert (now.evaluation.step, now.evaluation.loss, now.evaluation.perplexity) == (2, 0.5, 2.0)
    assert not now.evaluation.HasField("metric")
    assert seen[-1].estimated_bytes == 2000  # the trainer itself knows better than its plan
    trains.release(job)
    last = [message.job async for message in call][-1]
    assert last.state == State.TRAINING_JOB_STATE_SUCCEEDED
    assert not last.result.loaded
    # Who comes later is told the end, and nothing else.
    assert [m.job.state async for m in trains.watch(job)] == [last.state]


async def test_it_runs_at_low_priority_and_dies_first(trains: Training) -> None:
    job = await trains.create("step 1", "hold", name="humble")
    pid = await trains.holding(job, 1)
    assert trains.calls(job)[-1] == ["run", str(pid), "19"]
    assert read(f"/proc/{pid}/oom_score_adj").strip() == "1000"
    await trains.cancel(job)
    assert not alive(pid)


async def test_requests_are_answered_while_a_job_runs(trains: Training) -> None:
    job = await trains.create("step 1", "hold", name="beside")
    await trains.holding(job, 1)
    reply = await trains.up.generation.Generate(ask(new=3))
    assert len(reply.token_ids) == 3
    await trains.cancel(job)


async def test_what_goes_wrong_after_the_registration_is_a_warning(trains: Training) -> None:
    await trains.up.register("in-the-way", 77)
    job = await trains.create(
        "step 1", "hold", f"publish {trains.adapter(3)}",
        name="unaliased", delivery={"alias": "late"},
    )  # fmt: skip
    await trains.holding(job, 1)
    await trains.up.register("late", 78)  # now it is a name
    trains.release(job)
    done = await trains.ended(job)
    assert done.state == State.TRAINING_JOB_STATE_SUCCEEDED
    assert done.result.warning.startswith("the alias was not set: ")


async def test_an_adapter_that_the_server_does_not_take_fails_the_job(trains: Training) -> None:
    made = trains.adapter(4, peft_type="FOURIERFT")
    done = await trains.ended(await trains.create(f"publish {made}", name="odd"))
    assert done.state == State.TRAINING_JOB_STATE_FAILED
    assert done.error.reason == "ADAPTER_UNSUPPORTED"


# how it fails


@pytest.mark.parametrize(
    ("does", "reason", "says"),
    [
        (["step 1", "die SIGSEGV"], "TRAINER_CRASHED", "the trainer was ended by SIGSEGV"),
        (["step 3", "die SIGKILL"], "OUT_OF_MEMORY", "killed at step 3"),
        (["diverge"], "DIVERGED", "the loss is not finite"),
        (["complain DISK_FULL no room | nor there"], "DISK_FULL", "no room (and 1 more)"),
        (["step 1"], "TRAINER_CRASHED", "ended without an adapter"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_job_that_fails_says_why(
    trains: Training, does: list[str], reason: str, says: str
) -> None:
    secret = trains.up.folder / "deep" / "train.py"
    done = await trains.ended(await trains.create(f"moan File {secret}, line 3", *does, name="bad"))
    assert done.state == State.TRAINING_JOB_STATE_FAILED
    assert done.error.reason == reason
    assert says in done.error.message
    assert "File train.py, line 3" in done.error.log
    assert str(trains.up.folder) not in str(done)
    assert not done.HasField("result")


async def test_after_a_crash_the_next_job_runs(trains: Training) -> None:
    crashed = await trains.create("die SIGKILL", name="bad")
    after = await trains.create(f"publish {trains.adapter(5)}", name="good")
    assert (await trains.ended(crashed)).state == State.TRAINING_JOB_STATE_FAILED
    assert (await trains.ended(after)).state == State.TRAINING_JOB_STATE_SUCCEEDED


async def test_what_is_no_event_is_passed_over(trains: Training) -> None:
    noise = ["say hello", 'say {"event": "Nonsense"}', 'say {"event": "StepDone", "job": 7}', "say"]
    data = pb.TrainingData(jsonl=lines(*noise, "flood", "step 2", f"publish {trains.adapter(6)}"))
    done = await trains.ended(await trains.create(name="noisy", data=data))
    assert done.state == State.TRAINING_JOB_STATE_SUCCEEDED, done.error
    assert done.progress.step == 2


# the queue


async def test_jobs_run_one_after_the_other_and_wait_in_order(trains: Training) -> None:
    made = trains.adapter(7)
    jobs = [
        await trains.create("step 1", "hold", f"publish {made}", name=f"queued-{i}")
        for i in range(3)
    ]
    await trains.holding(jobs[0], 1)
    assert [(await trains.get(job)).queue_position for job in jobs] == [0, 1, 2]
    assert trains.up.metric("training_jobs", state="queued") == 2
    assert trains.up.metric("training_jobs", state="running") == 1
    watching = trains.watch(jobs[2])
    assert (await watching.read()).job.queue_position == 2
    trains.release(jobs[0])
    assert (await trains.ended(jobs[0])).state == State.TRAINING_JOB_STATE_SUCCEEDED
    assert (await watching.read()).job.queue_position == 1
    watching.cancel()
    await trains.holding(jobs[1], 1)
    for job in reversed(jobs[1:]):
        await trains.cancel(job)
    found = (await trains.list(page_size=3)).jobs
    assert [job.job_id for job in found] == [job.job_id for job in reversed(jobs)]


async def test_a_full_queue_refuses(trains: Training) -> None:
    jobs = [await trains.create("step 1", "hold", name=f"full-{i}") for i in range(4)]
    seen = await refused(trains.create("hold", name="full-4"))
    assert (seen.code, seen.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "JOB_QUEUE_FULL")
    assert seen.detail(error_details_pb2.QuotaFailure)
    for job in reversed(jobs):
        await trains.cancel(job)


async def test_lists_are_paged_and_filtered(trains: Training) -> None:
    jobs = [await trains.create("diverge", name=f"paged-{i}") for i in range(3)]
    for job in jobs:
        await trains.ended(job)
    seen, token = [], ""
    while True:
        page = await trains.list(page_size=2, page_token=token)
        seen += page.jobs
        token = page.next_page_token
        if not token:
            break
        assert len(page.jobs) == 2
    ids = [job.job_id for job in seen]
    assert ids == sorted(ids, reverse=True)
    assert {job.job_id for job in jobs} <= set(ids)
    failed = (await trains.list(states=[State.TRAINING_JOB_STATE_FAILED])).jobs
    assert {job.state for job in failed} == {State.TRAINING_JOB_STATE_FAILED}
    assert {job.job_id for job in jobs} <= {job.job_id for job in failed}


async def test_the_same_request_id_is_the_same_job(trains: Training) -> None:
    request = order("step 1", "hold", name="once", request_id="abc")
    both = await asyncio.gather(*(trains.stub.CreateJob(request) for _ in range(2)))
    assert both[0].job.job_id == both[1].job.job_id
    assert sorted(reply.created for reply in both) == [False, True]
    other = order("step 2", "hold", name="once", request_id="abc")
    seen = await refused(trains.stub.CreateJob(other))
    assert (seen.code, seen.reason) == (grpc.StatusCode.ALREADY_EXISTS, "JOB_CONFLICT")
    await trains.cancel(both[0].job)
    again = await trains.stub.CreateJob(request)
    assert (again.created, again.job.state) == (False, State.TRAINING_JOB_STATE_CANCELLED)


# cancelling


async def test_a_job_that_waits_is_cancelled_before_it_ran(trains: Training) -> None:
    first = await trains.create("step 1", "hold", name="runs")
    second = await trains.create("step 1", "hold", name="waits")
    watching = trains.watch(second)
    assert (await watching.read()).job.state == State.TRAINING_JOB_STATE_QUEUED
    done = await trains.cancel(second)
    assert done.state == State.TRAINING_JOB_STATE_CANCELLED
    assert not done.HasField("start_time")
    assert (await rest(watching))[-1].job.state == State.TRAINING_JOB_STATE_CANCELLED
    assert [call[0] for call in trains.calls(second)] == ["plan"]
    assert (await trains.get(first)).state == State.TRAINING_JOB_STATE_RUNNING
    await trains.cancel(first)


async def test_cancelling_a_running_job_interrupts_it_and_can_be_repeated(trains: Training) -> None:
    job = await trains.create("step 2", "hold", name="stopped")
    pid = await trains.holding(job, 2)
    replies = await asyncio.gather(*(trains.cancel(job) for _ in range(3)))
    assert {reply.state for reply in replies} == {State.TRAINING_JOB_STATE_CANCELLED}
    assert not alive(pid)
    assert not replies[0].HasField("error")
    assert "interrupted" in read(trains.folder(job), "trainer.log")
    assert await trains.cancel(job) == replies[0]
    assert trains.up.metric("training_jobs_ended_total", result="cancelled") >= 1


async def test_a_cancel_while_the_end_is_being_recorded_returns_the_end(
    trains: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = trains.up.server._training
    end, recording = queue._end, asyncio.Event()

    async def late(*arguments: Any) -> None:
        recording.set()
        await asyncio.sleep(0.2)
        await end(*arguments)

    monkeypatch.setattr(queue, "_end", late)
    job = await trains.create("step 2", "hold", name="recorded")
    await trains.holding(job, 2)
    first = asyncio.create_task(trains.cancel(job))
    await recording.wait()
    assert (await trains.cancel(job)).state == State.TRAINING_JOB_STATE_CANCELLED
    assert (await first).state == State.TRAINING_JOB_STATE_CANCELLED


def with_trainer(trains: Training, patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Gives the queue a trainer with other settings."""
    queue = trains.up.server._training
    trainer = dataclasses.replace(queue._trainer, **changes)
    patch.setattr(queue, "_trainer", trainer)
    patch.setattr(queue, "_factory", dataclasses.replace(queue._factory, trainer=trainer))


async def test_a_trainer_that_does_not_stop_is_killed(
    trains: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_trainer(trains, monkeypatch, patience=0.05)
    job = await trains.create("deaf", "step 1", "hold", name="deaf")
    pid = await trains.holding(job, 1)
    assert (await trains.cancel(job)).state == State.TRAINING_JOB_STATE_CANCELLED
    assert not alive(pid)


async def test_a_job_that_runs_for_too_long_is_stopped(
    trains: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_trainer(trains, monkeypatch, timeout=0.5)
    done = await trains.ended(await trains.create("step 1", "hold", name="long"))
    assert (done.state, done.error.reason) == (State.TRAINING_JOB_STATE_FAILED, "TIMEOUT")
    assert "0.5 s" in done.error.message


# watching


async def test_a_slow_watcher_gets_the_newest_state_and_no_backlog(trains: Training) -> None:
    texts = [text for i in range(1, 400) for text in (f"step {i}", f"eval {i}")]
    data = pb.TrainingData(jsonl=lines(*texts, f"publish {trains.adapter(21)}"))
    # Large labels make each message large, so that few fit what gRPC takes ahead.
    labels = {f"k{i}": "v" * 250 for i in range(32)}
    job = await trains.create(name="quick", data=data, delivery={"labels": labels})
    async with slow_channel(trains.up) as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        call = stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))
        await call.read()
        queue = trains.up.server._training
        await until(lambda: queue.get(job.job_id).final)
        seen = [message.job for message in await rest(call)]
    assert seen[-1].state == State.TRAINING_JOB_STATE_SUCCEEDED
    assert seen[-1].progress.step == 399
    assert len(seen) < 100  # of some 1200 changes


async def test_a_watch_ends_with_the_server(tmp_path: Path) -> None:
    async with training(tmp_path, drain_timeout=60.0) as trains:
        job = await trains.create("step 1", "hold", name="left")
        await trains.holding(job, 1)
        call = trains.watch(job)
        await call.read()
        await asyncio.wait_for(trains.up.server.drain(), 20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(call)
        assert refusal(caught.value).reason == "DRAINING"


async def test_too_many_watchers_are_refused_and_those_that_left_do_not_count(
    trains: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await trains.create("step 1", "hold", name="watched")
    monkeypatch.setattr("loraplex_server.training.table.MAX_WATCHERS", 1)
    queue = trains.up.server._training
    first = trains.watch(job)
    await first.read()
    assert (await refused(anext(aiter(trains.watch(job))))).reason == "OVERLOADED"
    first.cancel()
    await until(lambda: queue._table._watchers == 0)
    await trains.cancel(job)


# what is refused


async def test_training_is_off_unless_turned_on(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        stub = training_pb2_grpc.TrainingServiceStub(up.channel)
        for call in (
            stub.CreateJob(order("hold")),
            stub.GetJob(pb.GetJobRequest(job_id="0")),
            stub.ListJobs(pb.ListJobsRequest()),
            stub.CancelJob(pb.CancelJobRequest(job_id="0")),
            anext(aiter(stub.WatchJob(pb.WatchJobRequest(job_id="0")))),
        ):
            seen = await refused(call)
            assert seen.code is grpc.StatusCode.FAILED_PRECONDITION
            assert seen.reason == "TRAINING_DISABLED"
            assert "--training" in seen.message


async def test_all_that_is_wrong_with_a_request_comes_at_once(trains: Training) -> None:
    spec = pb.TrainingSpec(name="Bad Name", epochs=1, steps=2, eval_fraction=0.1, system="\0")
    spec.method.options["loftq_source"] = "/etc"
    spec.method.options["R"] = "1"
    request = pb.CreateJobRequest(
        spec=spec,
        request_id="\n",
        eval_data=pb.TrainingData(),
        delivery={"alias": "no_name", "labels": {"Bad": "x"}},
    )
    seen = await refused(trains.stub.CreateJob(request))
    assert seen.reason == "FIELD_INVALID"
    assert fields(seen).keys() == {
        "request_id", "spec.name", "spec.steps", "spec.eval_fraction", "spec.system",
        "spec.method.options[R]", "spec.method.options[loftq_source]", "data.source",
        "eval_data.source", "delivery.alias", "delivery.labels[Bad]",
    }  # fmt: skip


async def test_what_the_trainer_would_refuse_is_refused_with_the_fields(trains: Training) -> None:
    spec = {
        "batch_size": 0,
        "optimiser": {"learning_rate": -1.0, "name": "magic"},
        "metric": "regex:(",
        "learn": "nothing",
    }
    seen = await refused(trains.create("hold", name="wrong", spec=spec))
    assert seen.reason == "FIELD_INVALID"
    assert {"spec.batch_size", "spec.optimiser.learning_rate", "spec.optimiser.name",
            "spec.learn"} <= fields(seen).keys()  # fmt: skip
    assert "at least 1" in fields(seen)["spec.batch_size"]


@pytest.mark.parametrize(
    ("reason", "field"), [("DATA_INVALID", "data"), ("METHOD_INVALID", "spec.method")]
)
async def test_what_the_plan_finds_is_refused(trains: Training, reason: str, field: str) -> None:
    before = {job.id for job in trains.up.server._training._table}
    file = trains.up.folder / "training" / "data.jsonl"
    text = f"refuse {reason} {file}, line 2: no text | {file}, line 3: no JSON"
    seen = await refused(trains.create(text, name="bad-data"))
    assert seen.reason == "FIELD_INVALID"
    violations = seen.detail(error_details_pb2.BadRequest).field_violations
    assert [v.field for v in violations] == [field, field]
    assert violations[0].description == "data.jsonl, line 2: no text"
    assert str(trains.up.folder) not in repr(seen)
    assert {job.id for job in trains.up.server._training._table} == before
    left = {path.name for path in (trains.up.folder / "training").iterdir()}
    assert left == {*before, "lock"}


async def test_fields_that_the_trainer_names_are_fields_of_the_request(trains: Training) -> None:
    paths = {
        "jobs.mapped.lr": "spec.optimiser.learning_rate",
        "jobs.mapped.method.r": "spec.method.options[r]",
        "jobs.mapped.options": "spec.method.options",
        "jobs.mapped.steps": "spec.steps",
        "eval_data": "eval_data",
        "run.threads": "spec",
        "jobs": "spec",
    }
    text = " | ".join(f"{field} @ job 'x': lr is wrong" for field in paths)
    seen = await refused(trains.create(f"refuse CONFIG_INVALID {text}", name="mapped"))
    violations = seen.detail(error_details_pb2.BadRequest).field_violations
    assert [v.field for v in violations] == list(paths.values())
    assert {v.description for v in violations} == {"job 'x': lr is wrong"}  # nobody parses it


async def test_many_problems_still_fit_the_answer(trains: Training) -> None:
    problems = " | ".join(f"line {i}: {'x' * 400}" for i in range(100))
    seen = await refused(trains.create(f"refuse DATA_INVALID {problems}", name="worse"))
    assert seen.reason == "FIELD_INVALID"
    assert (
        seen.detail(error_details_pb2.BadRequest).field_violations[-1].description.endswith("more")
    )


async def test_a_plan_that_breaks_tells_nothing_of_the_server(trains: Training) -> None:
    seen = await refused(trains.create("refuse BROKEN a secret", name="broken"))
    assert (seen.reason, seen.message) == ("ENGINE_FAULT", "internal error")


async def test_a_job_that_would_not_fit_is_refused(
    trains: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = await refused(trains.create(f"plan {1 << 60}", name="huge"))
    assert (seen.code, seen.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TRAINING_MEMORY")
    assert "are free" in seen.message
    assert seen.detail(error_details_pb2.PreconditionFailure)
    with_trainer(trains, monkeypatch, memory=1 << 20)
    seen = await refused(trains.create(f"plan {(1 << 20) + 1}", name="big"))
    assert "training_memory allows 1 MiB" in seen.message
    job = await trains.create(f"plan {1 << 20}", "diverge", name="fits")
    assert (await trains.ended(job)).error.reason == "DIVERGED"


async def test_names_that_are_taken_are_refused_before_the_training(trains: Training) -> None:
    taken = await trains.up.register("taken", 11)
    alias = adapter_pb2.SetAliasRequest(alias="other-name", adapter_id="taken")
    await trains.up.adapters.SetAlias(alias)
    for changes in (
        {"name": "taken"},
        {"name": "other-name", "delivery": {"replace": True}},
        {"name": "new", "delivery": {"alias": "taken"}},
    ):
        seen = await refused(trains.create("hold", **changes))
        assert (seen.code, seen.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_CONFLICT")
    job = await trains.create(
        f"publish {trains.adapter(12)}", name="taken", delivery={"replace": True}
    )
    done = await trains.ended(job)
    assert (done.result.version, done.result.digest == taken.digest) == (2, False)
    first = await trains.create("step 1", "hold", name="twice")
    assert (await refused(trains.create("hold", name="twice"))).reason == "ADAPTER_CONFLICT"
    await trains.cancel(first)


async def test_data_comes_from_below_the_import_root_and_from_nowhere_else(
    trains: Training,
) -> None:
    root = trains.up.folder / "import"
    (root / "sets").mkdir(parents=True)
    (root / "sets" / "a.jsonl").write_bytes(lines("diverge"))
    (root / "b.jsonl").write_bytes(lines("diverge"))
    (root / "large.jsonl").write_bytes(b"x" * 4097)
    (root / "link.jsonl").symlink_to(root / "b.jsonl")
    (trains.up.folder / "outside.jsonl").write_bytes(lines("diverge"))
    for path in ("sets/a.jsonl", "b.jsonl"):
        job = await trains.create(name="copied", data=pb.TrainingData(path=path))
        (root / path).unlink()  # the job has its own
        assert (await trains.ended(job)).error.reason == "DIVERGED"
    for path in (
        *("nowhere.jsonl", "sets", "../outside.jsonl", "/etc/passwd", "link.jsonl", "large.jsonl"),
        *("sets/../b.jsonl", "a\0b", "sets/", "."),
    ):
        seen = await refused(trains.create(name="copied", data=pb.TrainingData(path=path)))
        assert fields(seen).keys() == {"data.path"}, path
        assert str(trains.up.folder) not in repr(seen)


async def test_data_in_a_request_is_bounded(trains: Training) -> None:
    half = pb.TrainingData(jsonl=b" " * ((3 << 19) + 1))
    seen = await refused(trains.create(name="large", data=half, eval_data=half))
    assert fields(seen).keys() == {"data.jsonl"}


async def test_an_unknown_job_is_not_found(trains: Training) -> None:
    unknown = pb.TrainingJob(job_id="0" * 12 + "-" + "0" * 8)
    for call in (trains.get(unknown), trains.cancel(unknown), anext(aiter(trains.watch(unknown)))):
        seen = await refused(call)
        assert (seen.code, seen.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
        assert seen.detail(error_details_pb2.ResourceInfo).resource_name == unknown.job_id
    for job_id in ("", "../x", "x" * 65):
        assert fields(await refused(trains.get(pb.TrainingJob(job_id=job_id)))).keys() == {"job_id"}
    seen = await refused(trains.list(page_size=1001, page_token="!", states=[0, 99]))
    assert fields(seen).keys() == {"page_size", "page_token", "states[0]", "states[1]"}
