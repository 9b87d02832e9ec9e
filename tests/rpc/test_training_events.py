"""The history of a job: every state, step, evaluation, checkpoint and sample, over restarts."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from loraplex.v1 import adapter_pb2
from loraplex.v1 import training_pb2 as pb
from loraplex_server.access.principals import PrincipalLimits
from loraplex_server.training.history import file as module
from loraplex_server.training.history.events import JobEventRecord, SampleRecord, SamplesRecord
from loraplex_server.training.history.file import EventFile, thinned
from loraplex_server.training.jobs import EvaluationRecord, ProgressRecord, State
from rpc.harness import refusal, until
from rpc.tenants import tenant, tenants
from rpc.training_jobs import Training, order, settings, training

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trains(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Training]:
    async with training(tmp_path_factory.mktemp("server")) as server:
        yield server


async def events(trains: Any, job: pb.TrainingJob, **fields: Any) -> list[pb.JobEvent]:
    request = pb.ListJobEventsRequest(job_id=job.job_id, **fields)
    return list((await trains.ListJobEvents(request)).events)


def short(event: pb.JobEvent) -> str:
    """An event in a word or two."""
    kind = event.WhichOneof("kind")
    match kind:
        case "state":
            return pb.TrainingJobState.Name(event.state).rpartition("_")[2].lower()
        case "message":
            return f"message {event.message}"
        case None:
            return "nothing"
    return f"{kind} {getattr(event, kind).step}"


async def test_all_that_happens_is_listed_in_order(trains: Training) -> None:
    job = await trains.create(
        "sample before", "sample first", "step 2", "eval 0.5", "sample after",
        f"publish {trains.adapter(1)}", name="told",
    )  # fmt: skip
    done = await trains.ended(job)
    found = await events(trains.stub, job)
    assert [short(event) for event in found] == [
        "queued", "running", "samples 0", "progress 1", "progress 2", "evaluation 2",
        "samples 2", "succeeded",
    ]  # fmt: skip
    assert [event.number for event in found] == list(range(1, 9))
    times = [event.time.ToNanoseconds() for event in found]
    assert times == sorted(times)
    first = found[2].samples
    assert [(s.prompt, s.answer, s.expected) for s in first.samples] == [
        ("p", "before", "r"),
        ("p", "first", "r"),
    ]
    step = found[4].progress
    assert (step.loss, step.learning_rate, step.gradient_norm, step.steps) == (0.5, 0.1, 2.0, 9)
    assert not step.HasField("evaluation")
    assert (found[5].evaluation.loss, found[5].evaluation.perplexity) == (0.5, 2.0)
    assert done.trained_tokens == 200


async def test_a_job_that_fails_says_why_in_its_last_events(trains: Training) -> None:
    job = await trains.create("step 1", "diverge", name="failing")
    await trains.ended(job)
    last = [short(event) for event in await events(trains.stub, job, newest_first=True)]
    assert last[:3] == ["failed", "message DIVERGED: the loss is not finite", "progress 1"]


async def test_events_come_page_by_page_in_both_directions(trains: Training) -> None:
    job = await trains.create("step 5", "diverge", name="paged")
    await trains.ended(job)
    every = await events(trains.stub, job)
    for newest_first in (False, True):
        found: list[pb.JobEvent] = []
        token = ""
        while True:
            request = pb.ListJobEventsRequest(
                job_id=job.job_id, page_size=2, page_token=token, newest_first=newest_first
            )
            reply = await trains.stub.ListJobEvents(request)
            found += reply.events
            token = reply.next_page_token
            if not token:
                break
        assert found == (every[::-1] if newest_first else every)
    for wrong in ({"page_size": 10_001}, {"page_token": "x"}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events(trains.stub, job, **wrong)
        assert refusal(caught.value).reason == "FIELD_INVALID"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events(trains.stub, pb.TrainingJob(job_id="0"))
    assert refusal(caught.value).reason == "JOB_NOT_FOUND"


async def test_events_of_a_running_job_are_listed_at_once(trains: Training) -> None:
    job = await trains.create("step 3", "hold", name="now")
    await trains.holding(job, 3)
    assert short((await events(trains.stub, job))[-1]) == "progress 3"
    path = trains.folder(job) / "events.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    await trains.cancel(job)
    assert short((await events(trains.stub, job))[-1]) == "cancelled"


async def test_a_restart_continues_the_history_and_repeats_no_step(tmp_path: Path) -> None:
    texts = ("step 2", "hold", "step 4")
    async with training(tmp_path) as trains:
        job = await trains.create(*texts, f"publish {trains.adapter(1)}", name="resumed")
        await trains.holding(job, 2)
        # Steps after the checkpoint, which the next trainer repeats; and a line that was cut off.
        history = trains.up.server._training._table.histories.of(job.job_id)
        await history.add(JobEventRecord(progress=ProgressRecord(step=3)))
        await history.add(JobEventRecord(message="before the restart"))
    path = tmp_path / "training" / job.job_id / "events.jsonl"
    with path.open("ab") as file:
        file.write(b'{"number": 99, "mess')
    (tmp_path / "training" / job.job_id / "release").touch()
    async with training(tmp_path) as trains:
        done = await trains.ended(job)
        assert done.trained_tokens == 400
        found = await events(trains.stub, job)
    assert [short(event) for event in found] == [
        "queued", "running", "progress 1", "progress 2", "message before the restart",
        "interrupted", "queued", "running", "message the training continues after step 2",
        "progress 3", "progress 4", "succeeded",
    ]  # fmt: skip
    numbers = [event.number for event in found]
    assert numbers == sorted(set(numbers))


async def test_a_job_that_begins_again_repeats_nothing(tmp_path: Path) -> None:
    async with training(tmp_path) as trains:
        job = await trains.create("sample hi", "eval 0.5", "hold", "step 1", name="again")
        path = trains.folder(job) / "events.jsonl"
        await until(lambda: path.exists() and b"evaluation" in path.read_bytes())
    for checkpoint in (tmp_path / "training" / job.job_id / "run" / "checkpoints").iterdir():
        checkpoint.rmdir()
    (tmp_path / "training" / job.job_id / "release").touch()
    async with training(tmp_path) as trains:
        await trains.ended(job)
        found = [short(event) for event in await events(trains.stub, job)]
    assert found.count("samples 0") == 1
    assert found.count("evaluation 0") == 1
    assert found.count("running") == 2


async def test_a_job_with_many_events_keeps_its_bound(
    trains: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_EVENTS", 40)
    texts = [text for i in range(1, 101) for text in (f"step {i}", f"eval 0.{i}")]
    job = await trains.create(*texts, "diverge", name="long", steps=100)
    await trains.ended(job)
    found = [short(event) for event in await events(trains.stub, job)]
    assert len(found) <= 40
    assert (found[:2], found[-1]) == (["queued", "running"], "failed")
    assert "progress 1" in found
    assert "progress 100" in found
    assert "evaluation 100" in found


async def test_thinning_drops_steps_first_and_nothing_but_steps_and_evaluations() -> None:
    every = [JobEventRecord(number=1, state=State.RUNNING)]
    for i in range(1, 50):
        every.append(JobEventRecord(number=2 * i, progress=ProgressRecord(step=i)))
        every.append(JobEventRecord(number=2 * i + 1, evaluation=EvaluationRecord(i, 1.0, 2.0)))
    every.append(JobEventRecord(number=200, message="kept"))
    few = thinned(iter(every), 60)
    assert sum(event.evaluation is not None for event in few) == 49
    assert {1, 2, 98, 200} <= {event.number for event in few}
    fewer = thinned(iter(every), 10)
    assert len(fewer) <= 10
    assert {1, 2, 3, 98, 99, 200} <= {event.number for event in fewer}


async def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.open()
    file.append(
        [JobEventRecord(number=1, message="é\n"), JobEventRecord(number=2, state=State.QUEUED)]
    )
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\0\xff\n{}x\n" + path.read_bytes() + b'{"number": 3')
    again = EventFile(tmp_path)
    again.open()
    assert again.last == 2
    samples = SamplesRecord(3, (SampleRecord("p", "a", "e"),))
    again.append([JobEventRecord(number=3, samples=samples)])
    assert [event.number for event in again.read()] == [1, 2, 3]


# checkpoints


async def names(adapters: Any) -> list[str]:
    reply = await adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
    return [adapter.name for adapter in reply.adapters]


def checkpointed(trains: Any, count: int, adapter: Any) -> list[str]:
    return [
        text
        for i in range(1, count + 1)
        for text in (f"step {i}", f"eval 0.{i}", f"export {adapter(i)}")
    ]


async def test_the_latest_eight_evaluated_adapters_are_registered(tmp_path: Path) -> None:
    async with training(tmp_path) as trains:
        labels = {"a": "b", "loraplex.dev/model-id": "ft:base::x:1"}
        texts = checkpointed(trains, 9, trains.adapter)
        job = await trains.create(
            *texts, f"publish {trains.adapter(9)}",
            name="kept", delivery={"checkpoints": True, "labels": labels},
        )  # fmt: skip
        done = await trains.ended(job)
        assert done.state == pb.TRAINING_JOB_STATE_SUCCEEDED, done.error
        assert [each.step for each in done.checkpoints] == list(range(2, 10))
        assert await names(trains.up.adapters) == [
            "kept", *(f"kept-step-{i}" for i in range(2, 10))
        ]  # fmt: skip
        for each in done.checkpoints:
            request = adapter_pb2.GetAdapterRequest(adapter_id=each.adapter_id)
            adapter = (await trains.up.adapters.GetAdapter(request)).adapter
            assert adapter.digest == each.digest
            model = f"ft:base::x:1:ckpt-step-{each.step}"
            assert dict(adapter.labels) == {"a": "b", "loraplex.dev/model-id": model}
            assert (each.evaluation.step, each.loss) == (each.step, 1 / each.step)
        found = [short(event) for event in await events(trains.stub, job)]
        assert [text for text in found if "checkpoint" in text] == [
            f"checkpoint {i}" for i in range(1, 10)
        ]
    async with training(tmp_path) as trains:  # the record has them, too
        assert (await trains.get(job)).checkpoints == done.checkpoints


async def test_a_checkpoint_that_cannot_be_registered_does_not_end_the_job(
    trains: Training,
) -> None:
    await trains.up.register("taken-step-1", 99)
    texts = checkpointed(trains, 2, trains.adapter)
    odd = trains.adapter(50, peft_type="FOURIERFT")
    job = await trains.create(
        *texts, "step 3", f"export {odd}", f"publish {trains.adapter(2)}",
        name="taken", delivery={"checkpoints": True},
    )  # fmt: skip
    done = await trains.ended(job)
    assert done.state == pb.TRAINING_JOB_STATE_SUCCEEDED
    assert [each.step for each in done.checkpoints] == [2]
    said = [e.message for e in await events(trains.stub, job) if e.HasField("message")]
    assert [text.partition(":")[0] for text in said] == [
        "the adapter of step 1 was not registered",
        "the adapter of step 3 was not registered",
    ]


async def test_without_the_order_there_are_no_checkpoints(trains: Training) -> None:
    texts = checkpointed(trains, 1, trains.adapter)
    job = await trains.create(*texts, f"publish {trains.adapter(1)}", name="plain")
    done = await trains.ended(job)
    assert (done.state, len(done.checkpoints)) == (pb.TRAINING_JOB_STATE_SUCCEEDED, 0)
    assert "plain-step-1" not in await names(trains.up.adapters)


async def test_names_that_leave_no_room_for_the_step_are_refused(trains: Training) -> None:
    request = order("hold", name="x" * 51, delivery={"checkpoints": True})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await trains.stub.CreateJob(request)
    assert "spec.name" in str(refusal(caught.value).message)


async def test_a_cancelled_job_registers_no_more(trains: Training) -> None:
    texts = checkpointed(trains, 1, trains.adapter)
    job = await trains.create(
        *texts, "step 2", "hold", name="halted", delivery={"checkpoints": True}
    )
    await trains.holding(job, 2)
    done = await trains.cancel(job)
    assert [each.adapter_id for each in done.checkpoints] == ["halted-step-1@1"]


async def test_checkpoints_are_their_tenants_and_within_its_limits(tmp_path: Path) -> None:
    limited = tenant("a", limits=PrincipalLimits(adapters=2))
    async with tenants(tmp_path, limited, **settings(tmp_path)) as shop:
        shop.up.server._training._destination._principals = lambda: {"a": limited}
        server = Training(shop.up, shop.a.training)
        texts = checkpointed(server, 3, server.adapter)
        request = order(*texts, "diverge", name="a-made", delivery={"checkpoints": True})
        job = (await shop.a.training.CreateJob(request)).job
        call = shop.a.training.WatchJob(pb.WatchJobRequest(job_id=job.job_id))
        *_, last = [message.job async for message in call]
        assert [each.step for each in last.checkpoints] == [1, 2]
        assert await shop.a.names() == ["a-made-step-1", "a-made-step-2"]
        assert await shop.b.names() == []
        said = [e.message for e in await events(shop.a.training, job) if e.HasField("message")]
        assert "may have 2 adapters" in said[0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events(shop.b.training, job)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
