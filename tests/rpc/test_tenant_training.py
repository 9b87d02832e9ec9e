"""Training jobs exist for who ordered them, and make adapters that only these see."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from loraplex.v1 import training_pb2 as pb
from loraplex_server.training.files.shelf import MAX_STREAMS, MAX_STREAMS_PER_PEER
from loraplex_server.training.jobs import JobOrder, JobOwner, JobRecord
from rpc.harness import until, write_adapter
from rpc.tenants import Answer, Tenant, Tenants, answer_of, tenant, tenants
from rpc.training_jobs import State, lines, order, settings

CHUNK = pb.UploadDataRequest(chunk=b"x")


@asynccontextmanager
async def training(folder: Path, *principals: Any, **more: Any) -> AsyncIterator[Tenants]:
    async with tenants(folder, *principals, **settings(folder, **more)) as shop:
        yield shop


async def answer(call: Any) -> Answer:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return answer_of(caught.value)


async def create(who: Tenant, *texts: str, **fields: Any) -> pb.TrainingJob:
    return (await who.training.CreateJob(order(*texts, **fields))).job


async def watch(who: Tenant, job_id: str) -> list[pb.TrainingJob]:
    call = who.training.WatchJob(pb.WatchJobRequest(job_id=job_id))
    return [message.job async for message in call]


async def listed(who: Tenant, **fields: Any) -> list[str]:
    reply = await who.training.ListJobs(pb.ListJobsRequest(**fields))
    assert not reply.next_page_token or reply.next_page_token == reply.jobs[-1].job_id
    return [job.job_id for job in reply.jobs]


async def test_a_job_exists_for_who_ordered_it(tmp_path: Path) -> None:
    async with training(tmp_path) as shop:
        ours = await create(shop.a, "hold", name="a-made")
        theirs = await create(shop.b, "hold", name="b-made")
        assert await listed(shop.a) == [ours.job_id]
        assert await listed(shop.a, page_size=1) == [ours.job_id]
        assert await listed(shop.b) == [theirs.job_id]
        assert await listed(shop.admin) == [theirs.job_id, ours.job_id]
        assert theirs.queue_position >= 1  # a number, which names nobody
        never = "0" * 12 + "-" + "0" * 8
        for job_id in (ours.job_id, never):
            seen = []
            for call in (
                shop.b.training.GetJob(pb.GetJobRequest(job_id=job_id)),
                shop.b.training.CancelJob(pb.CancelJobRequest(job_id=job_id)),
                watch(shop.b, job_id),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                seen.append(answer_of(caught.value, job_id))
            assert {each.reason for each in seen} == {"JOB_NOT_FOUND"}
            assert seen[0] == seen[1] == seen[2]
        cancel = pb.CancelJobRequest(job_id=theirs.job_id)
        await shop.b.training.CancelJob(cancel)
        await shop.admin.training.CancelJob(pb.CancelJobRequest(job_id=ours.job_id))
        assert (await watch(shop.a, ours.job_id))[-1].state == State.TRAINING_JOB_STATE_CANCELLED


async def test_a_trained_adapter_is_its_tenants(tmp_path: Path) -> None:
    async with training(tmp_path, tenant("a", own_copies=True)) as shop:
        made = write_adapter(tmp_path / "made", 1)
        delivery = {"load": True, "alias": "a-live", "labels": {"by": "hand"}}
        job = await create(shop.a, "step 2", f"publish {made}", name="a-made", delivery=delivery)
        assert dict(job.delivery.labels) == {"team": "a", "by": "hand"}
        (*_, done) = await watch(shop.a, job.job_id)
        assert done.state == State.TRAINING_JOB_STATE_SUCCEEDED, done.error
        assert (done.result.loaded, done.result.warning) == (True, "")
        assert dict((await shop.a.get("a-live")).labels) == {"team": "a", "by": "hand"}
        assert await shop.b.names() == []


async def test_the_rules_of_registration_hold_for_jobs(tmp_path: Path) -> None:
    async with training(tmp_path, tenant("c", imports=None)) as shop:
        await shop.admin.register("a-kept", labels={"team": "x"})
        (tmp_path / "import" / "a" / "data.jsonl").write_bytes(lines("hold"))
        (tmp_path / "import" / "b" / "data.jsonl").write_bytes(lines("hold"))
        refused = {
            "another prefix": order("hold", name="b-made"),
            "an alias of another prefix": order(
                "hold", name="a-made", delivery={"alias": "b-live"}
            ),
            "a label": order("hold", name="a-made", delivery={"labels": {"team": "b"}}),
            "a name in use": order("hold", name="a-kept"),
            "a name in use, replaced": order("hold", name="a-kept", delivery={"replace": True}),
            "an alias in use": order("hold", name="a-made", delivery={"alias": "a-kept"}),
        }
        for what, request in refused.items():
            assert (await answer(shop.a.training.CreateJob(request))).reason == (
                "PERMISSION_DENIED"
            ), what
        for path in ("../b/data.jsonl", "b/data.jsonl", "/etc/passwd", "gone.jsonl"):
            request = order(name="a-made", data=pb.TrainingData(path=path))
            assert (await answer(shop.a.training.CreateJob(request))).reason == "FIELD_INVALID"
        request = order(name="c-made", data=pb.TrainingData(path="data.jsonl"))
        assert (await answer(shop.of("c").training.CreateJob(request))).reason == (
            "PERMISSION_DENIED"
        )
        data = pb.TrainingData(path="data.jsonl")
        await create(shop.a, name="a-made", data=data)
        assert await listed(shop.b) == []


async def test_each_tenant_has_request_ids_of_its_own(tmp_path: Path) -> None:
    async with training(tmp_path) as shop:
        ours = await create(shop.a, "hold", name="a-made", request_id="nightly")
        theirs = await create(shop.b, "hold", name="b-made", request_id="nightly")
        assert ours.job_id != theirs.job_id
        again = await create(shop.a, "hold", name="a-made", request_id="nightly")
        assert again.job_id == ours.job_id
        other = order("hold", name="a-other", request_id="nightly")
        assert (await answer(shop.a.training.CreateJob(other))).reason == "JOB_CONFLICT"


async def test_a_job_of_the_administrator_under_a_tenants_name_is_not_told(
    tmp_path: Path,
) -> None:
    async with training(tmp_path) as shop:
        job = await create(shop.admin, "hold", name="a-made")
        seen = await answer(shop.a.training.CreateJob(order("hold", name="a-made")))
        assert seen.reason == "PERMISSION_DENIED"
        assert job.job_id not in str(seen)


async def test_what_a_job_needs_of_its_owner_survives_a_restart(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "made", 1)
    async with training(tmp_path) as shop:
        await create(shop.b, "hold", name="b-first")
        job = await create(shop.a, "step 2", f"publish {made}", name="a-made")
        await shop.admin.register("a-made", labels={"team": "x"})  # it is taken meanwhile
    async with training(tmp_path) as shop:
        (first,) = await listed(shop.b)
        await shop.b.training.CancelJob(pb.CancelJobRequest(job_id=first))
        (*_, done) = await watch(shop.a, job.job_id)
        assert done.state == State.TRAINING_JOB_STATE_FAILED
        assert done.error.reason == "PERMISSION_DENIED"
        assert "sha256" not in done.error.message


def test_a_record_of_an_older_server_belongs_to_nobody_in_particular() -> None:
    record = JobRecord(id="0", order=JobOrder(name="n"))
    old = msgspec.json.decode(msgspec.json.encode(record))
    del old["owner"]
    found = msgspec.json.decode(msgspec.json.encode(old), type=JobRecord)
    assert found == record
    assert found.owner == JobOwner()
    assert found.is_of(None)
    assert found.is_of("")
    assert not found.is_of("a")


async def test_one_tenants_uploads_of_data_leave_places_to_others(tmp_path: Path) -> None:
    async with training(tmp_path) as shop:  # all from one address, as behind a gateway
        begun = []
        for _ in range(MAX_STREAMS_PER_PEER):
            call = shop.a.training.UploadData()
            await call.write(pb.UploadDataRequest(start={}))
            begun.append(call)
        shelf = shop.a.up.server._training._shelf
        await until(lambda: len(shelf._arriving) == MAX_STREAMS_PER_PEER)
        assert MAX_STREAMS_PER_PEER < MAX_STREAMS

        def sent(who: Tenant) -> Any:
            return who.training.UploadData(iter([pb.UploadDataRequest(start={}), CHUNK]))

        refused = await answer(sent(shop.a))
        assert refused.reason == "OVERLOADED"
        assert "8 of them from a" in refused.message
        assert (await sent(shop.b)).file.size_bytes == len(CHUNK.chunk)
        for call in begun:
            call.cancel()
        await until(lambda: not shelf._arriving)
        assert (await sent(shop.a)).file.size_bytes == len(CHUNK.chunk)
