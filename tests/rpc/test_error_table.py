"""Every reason of the error table, seen by a client: its code, its details, and nothing more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from loraplex.v1 import (
    adapter_pb2,
    generation_pb2,
    generation_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from loraplex_adapters.signing import read_policy
from loraplex_adapters.store import Store
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.principals import Principal
from loraplex_server.access.roles import Role
from loraplex_server.engine.process.limits import SupervisionLimits
from loraplex_server.registry import name_cache
from loraplex_server.registry.signatures import Signatures
from loraplex_server.rpc.calls.access import AccessCheck, credentials_of
from loraplex_server.rpc.calls.errors import TABLE, Detail
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.services import generation
from loraplex_server.rpc.services.training import TrainingService
from loraplex_server.training.files.shelf import ShelfLimits
from rpc.harness import (
    CRASH,
    FAULT,
    NONFINITE,
    Refused,
    Running,
    ask,
    refusal,
    rest,
    running,
    slow_channel,
    streamed,
    until,
    write_adapter,
)
from rpc.principals import acting, limited
from rpc.training_jobs import order, settings
from security.callers import Callers, key, principal

from adapters import keys

pytestmark = pytest.mark.asyncio(loop_scope="module")

Scenario = Callable[[Running, pytest.MonkeyPatch], Awaitable[Any]]
SCENARIOS: dict[Reason, Scenario] = {}

KINDS = {
    Detail.BAD_REQUEST: error_details_pb2.BadRequest,
    Detail.RESOURCE: error_details_pb2.ResourceInfo,
    Detail.PRECONDITION: error_details_pb2.PreconditionFailure,
    Detail.RETRY: error_details_pb2.RetryInfo,
    Detail.QUOTA: error_details_pb2.QuotaFailure,
}


def raises(reason: Reason) -> Callable[[Scenario], Scenario]:
    """Marks what brings a reason about."""

    def keep(scenario: Scenario) -> Scenario:
        SCENARIOS[reason] = scenario
        return scenario

    return keep


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    options = {
        "adapter_budget_bytes": 4096,
        "merge_budget_bytes": 100,
        "prefix_blocks": 8,
        "step_seconds": 0.002,
        "num_blocks": 256,
    }
    async with running(
        folder,
        max_rank=8,
        max_context=600,
        max_running=3,
        max_waiting=1,
        write_stall_timeout=0.3,
        engine_options=options,
        **settings(folder, training_max_jobs=0),
    ) as server:
        yield server


def import_adapter(up: Running, name: str, seed: int = 0, **settings: Any) -> Path:
    return write_adapter(up.folder / "import" / name, seed, **settings)


def register(up: Running, name: str, path: str = "") -> Awaitable[Any]:
    return up.adapters.RegisterAdapter(
        adapter_pb2.RegisterAdapterRequest(name=name, path=path or name)
    )


@raises(Reason.FIELD_INVALID)
async def field_invalid(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.generation.Generate(ask(sampling={"temperature": float("nan"), "top_p": 0.0}))


@raises(Reason.PROMPT_TOO_LONG)
async def prompt_too_long(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.generation.Generate(ask(*[20] * 600))


@raises(Reason.STRUCTURE_INVALID)
async def structure_invalid(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.generation.Generate(ask(structured_output={"regex": "("}))


@raises(Reason.STRUCTURE_FAILED)
async def structure_failed(up: Running, patch: pytest.MonkeyPatch) -> None:
    hostile = 'start: a{1,100000}\na: b{1,100000}\nb: "x"'
    on = {"ignore_eos": True}
    await up.generation.Generate(ask(new=500, stop=on, structured_output={"grammar": hostile}))


@raises(Reason.REQUEST_MALFORMED)
async def request_malformed(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.channel.unary_unary("/loraplex.v1.GenerationService/Generate")(b"\xff\xff\xff")


@raises(Reason.QUOTA_EXCEEDED)
async def quota_exceeded(up: Running, patch: pytest.MonkeyPatch) -> None:
    with acting(patch).as_(limited(tokens_per_minute=1)):
        await up.generation.Generate(ask(20, 21))


@raises(Reason.ADAPTER_NOT_FOUND)
async def adapter_not_found(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.generation.Generate(ask(adapter="nobody"))


@raises(Reason.ADAPTER_CONFLICT)
async def adapter_conflict(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.register("taken", 1)
    await up.register("taken", 2)


@raises(Reason.ADAPTER_INVALID)
async def adapter_invalid(up: Running, patch: pytest.MonkeyPatch) -> None:
    folder = import_adapter(up, "torn")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    await register(up, "torn")


@raises(Reason.SIGNATURE_INVALID)
async def signature_invalid(up: Running, patch: pytest.MonkeyPatch) -> None:
    keys.make_key(up.folder / "keys", "release")
    policy = read_policy(keys.write_policy(up.folder / "keys", release=[""]))
    patch.setattr(Signatures, "_policy", lambda self: policy)
    import_adapter(up, "unsigned")
    await register(up, "unsigned")


@raises(Reason.ADAPTER_UNSUPPORTED)
async def adapter_unsupported(up: Running, patch: pytest.MonkeyPatch) -> None:
    import_adapter(up, "other", peft_type="FOURIERFT")
    await register(up, "other")


@raises(Reason.BASE_MODEL_MISMATCH)
async def base_model_mismatch(up: Running, patch: pytest.MonkeyPatch) -> None:
    folder = import_adapter(up, "elsewhere", target_modules=["k_proj"])
    weights = folder / "adapter_model.safetensors"
    # The same files, made for a base with modules of another name and shape.
    content = weights.read_bytes().replace(b"layers.0.self", b"layers.7.self")
    weights.write_bytes(content)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    await register(up, "elsewhere")


@raises(Reason.RANK_TOO_LARGE)
async def rank_too_large(up: Running, patch: pytest.MonkeyPatch) -> None:
    import_adapter(up, "wide", rank=16)
    await register(up, "wide")


@raises(Reason.ADAPTER_TOO_LARGE)
async def adapter_too_large(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.register("bloated", 3)
    await sabotage(up, "bloated", nbytes=5000)
    await up.generation.Generate(ask(adapter="bloated"))


@raises(Reason.ADAPTER_CORRUPT)
async def adapter_corrupt(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.register("rotten", 4)
    await sabotage(up, "rotten", fail="ADAPTER_CORRUPT")
    await up.generation.Generate(ask(adapter="rotten"))


async def sabotage(up: Running, name: str, **options: Any) -> None:
    """Tells the oracle what to do when it reads the adapter's files in the store."""
    request = adapter_pb2.GetAdapterRequest(adapter_id=name)
    digest = (await up.adapters.GetAdapter(request)).adapter.digest
    store = Store(up.folder / "store")
    folder = store.path(digest)
    store.close()
    folder.chmod(0o755)
    (folder / "oracle.json").write_text(json.dumps(options))


@raises(Reason.ADAPTER_UNLOADED)
async def adapter_unloaded(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.register("brief", 5)
    call = up.generation.GenerateStream(streamed(ask(new=400, adapter="brief")))
    assert (await call.read()).WhichOneof("event") == "started"
    unload = adapter_pb2.UnloadAdapterRequest(adapter_id="brief", force=True)
    await up.adapters.UnloadAdapter(unload)
    await rest(call)


@raises(Reason.ADAPTER_QUARANTINED)
async def adapter_quarantined(up: Running, patch: pytest.MonkeyPatch) -> None:
    adapter = await up.register("held", 6)
    with Store(up.folder / "store") as store:
        store.quarantine(adapter.digest, "it ended the engine 3 times")
    patch.setattr(name_cache, "FRESH_SECONDS", 0.0)
    await up.generation.Generate(ask(adapter="held"))


@raises(Reason.ADAPTER_NOT_MIXABLE)
async def adapter_not_mixable(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.register("prefixed", 7)
    await sabotage(up, "prefixed", virtual=2)
    mix = [generation_pb2.AdapterWeight(adapter_id="prefixed", weight=0.5)]
    await up.generation.Generate(ask(mix=mix))


@raises(Reason.PIN_BUDGET)
async def pin_budget(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.register("heavy", 8)
    await sabotage(up, "heavy", nbytes=3000)
    await up.adapters.PinAdapter(adapter_pb2.PinAdapterRequest(adapter_id="heavy"))


@raises(Reason.MERGE_BUDGET)
async def merge_budget(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.register("dense", 9)
    await sabotage(up, "dense", merge_nbytes=101)
    await up.adapters.MergeAdapter(adapter_pb2.MergeAdapterRequest(adapter_id="dense"))


@raises(Reason.MERGE_UNSUPPORTED)
async def merge_unsupported(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.register("biases", 10)
    await sabotage(up, "biases", merge_nbytes=0)
    await up.adapters.MergeAdapter(adapter_pb2.MergeAdapterRequest(adapter_id="biases"))


@raises(Reason.UPLOAD_NOT_FOUND)
async def upload_not_found(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.adapters.GetUpload(adapter_pb2.GetUploadRequest(upload_id="0" * 32))


@raises(Reason.UPLOAD_OFFSET)
async def upload_offset(up: Running, patch: pytest.MonkeyPatch) -> None:
    started = await up.adapters.StartUpload(adapter_pb2.StartUploadRequest())
    header = adapter_pb2.UploadHeader(
        upload_id=started.upload_id, name="gap", config_size=10, weights_size=10
    )
    # One chunk: grpc.aio loses the status of a stream that ends while it writes another.
    chunk = adapter_pb2.UploadChunk(file=adapter_pb2.ADAPTER_FILE_CONFIG, offset=4, data=b"12345")
    part = adapter_pb2.UploadAdapterRequest
    await up.adapters.UploadAdapter(iter([part(header=header), part(chunk=chunk)]))


@raises(Reason.TRAINING_DISABLED)
async def training_disabled(up: Running, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TrainingService, "_open", TrainingService(None, CallGate())._open)
    await jobs(up).ListJobs(training_pb2.ListJobsRequest())


@raises(Reason.TRAINING_ELSEWHERE)
async def training_elsewhere(up: Running, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(up.server._training, "_owned", False)
    await jobs(up).ListJobs(training_pb2.ListJobsRequest())


@raises(Reason.TRAINING_MEMORY)
async def training_memory(up: Running, patch: pytest.MonkeyPatch) -> None:
    await jobs(up).CreateJob(order(f"plan {1 << 60}", name="too-much"))


@raises(Reason.JOB_NOT_FOUND)
async def job_not_found(up: Running, patch: pytest.MonkeyPatch) -> None:
    await jobs(up).GetJob(training_pb2.GetJobRequest(job_id="0"))


@raises(Reason.JOB_CONFLICT)
async def job_conflict(up: Running, patch: pytest.MonkeyPatch) -> None:
    await jobs(up).CreateJob(order("diverge", name="asked-for", request_id="one"))
    await jobs(up).CreateJob(order("diverge", name="asked-otherwise", request_id="one"))


async def uploaded(up: Running, data: bytes, **start: str) -> training_pb2.DataFile:
    part = training_pb2.UploadDataRequest
    reply = await jobs(up).UploadData(iter([part(start=start), part(chunk=data)]))
    return reply.file


@raises(Reason.DATA_NOT_FOUND)
async def data_not_found(up: Running, patch: pytest.MonkeyPatch) -> None:
    await jobs(up).GetData(training_pb2.GetDataRequest(data_id="0"))


@raises(Reason.DATA_CONFLICT)
async def data_conflict(up: Running, patch: pytest.MonkeyPatch) -> None:
    await uploaded(up, b"one", request_id="one")
    await uploaded(up, b"two", request_id="one")


@raises(Reason.DATA_FULL)
async def data_full(up: Running, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(up.server._training._shelf, "_limits", ShelfLimits(1 << 20, 0, 1 << 20))
    await uploaded(up, b"one too many")


@raises(Reason.DATA_CORRUPT)
async def data_corrupt(up: Running, patch: pytest.MonkeyPatch) -> None:
    file = await uploaded(up, b"as it was")
    (up.server._training._records.data / file.data_id / "data").write_bytes(b"as it is")
    call = jobs(up).ReadData(training_pb2.ReadDataRequest(data_id=file.data_id))
    await rest(call)


def calling(patch: pytest.MonkeyPatch, *known: Principal) -> None:
    """From now on callers are identified, and these are known."""
    callers = Callers(*known)

    def identify(check: object, method: str, context: Any) -> Principal:
        return callers.identify(credentials_of(context))

    patch.setattr(AccessCheck, "identify", identify)


@raises(Reason.CREDENTIALS_MISSING)
async def credentials_missing(up: Running, patch: pytest.MonkeyPatch) -> None:
    calling(patch, principal("alice"))
    await up.generation.Generate(ask())


@raises(Reason.CREDENTIALS_INVALID)
async def credentials_invalid(up: Running, patch: pytest.MonkeyPatch) -> None:
    calling(patch, principal("alice"))
    await up.generation.Generate(ask(), metadata=key("secret"))


@raises(Reason.PERMISSION_DENIED)
async def permission_denied(up: Running, patch: pytest.MonkeyPatch) -> None:
    calling(patch, principal("reader", [Role.READ]))
    await up.generation.Generate(ask(), metadata=key("reader"))


@raises(Reason.JOB_QUEUE_FULL)
async def job_queue_full(up: Running, patch: pytest.MonkeyPatch) -> None:
    first = (await jobs(up).CreateJob(order("hold", name="holds"))).job
    try:
        await jobs(up).CreateJob(order("hold", name="too-many"))
    finally:
        await jobs(up).CancelJob(training_pb2.CancelJobRequest(job_id=first.job_id))


def jobs(up: Running) -> training_pb2_grpc.TrainingServiceStub:
    return training_pb2_grpc.TrainingServiceStub(up.channel)


@raises(Reason.STORE_FULL)
async def store_full(up: Running, patch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise Refusal(Reason.STORE_FULL, "no space is left in the adapter store")

    patch.setattr(Store, "register", full)
    await up.register("late", 6)


@raises(Reason.STORE_UNAVAILABLE)
async def store_unavailable(up: Running, patch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise Refusal(Reason.STORE_UNAVAILABLE, "the store's index cannot be read")

    patch.setattr(Store, "resolve", gone)
    await up.generation.Generate(ask(adapter="alpha"))


@raises(Reason.OVERLOADED)
async def overloaded(up: Running, patch: pytest.MonkeyPatch) -> None:
    calls = [up.generation.GenerateStream(streamed(ask(new=500))) for _ in range(4)]
    try:
        # They arrive in any order, and how many run depends on who has sent requests lately.
        await until(lambda: up.metric("queue_depth") + up.metric("running_requests") == len(calls))
        await up.generation.Generate(ask())
    finally:
        for call in calls:
            call.cancel()


@raises(Reason.DRAINING)
async def draining(up: Running, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(up.server._gate, "draining", True)
    await up.generation.Generate(ask())


@raises(Reason.ENGINE_RESTARTED)
async def engine_restarted(up: Running, patch: pytest.MonkeyPatch) -> None:
    try:
        await up.generation.Generate(ask(20, CRASH))
    finally:
        await until(lambda: up.server.engine.ready)


@raises(Reason.REQUEST_QUARANTINED)
async def request_quarantined(up: Running, patch: pytest.MonkeyPatch) -> None:
    for _ in range(SupervisionLimits().request_deaths):
        with suppress(grpc.aio.AioRpcError):
            await up.generation.Generate(ask(23, CRASH))
        await until(lambda: up.server.engine.ready)
    await up.generation.Generate(ask(23, CRASH))


@raises(Reason.DEADLINE_EXCEEDED)
async def deadline_exceeded(up: Running, patch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    patch.setattr(generation, "admitted_deadline", lambda remaining: loop.time() + 0.05)
    await up.generation.Generate(ask(new=500))


@raises(Reason.DEADLINE_UNMEETABLE)
async def deadline_unmeetable(up: Running, patch: pytest.MonkeyPatch) -> None:
    await asyncio.gather(*(up.generation.Generate(ask(new=400)) for _ in range(3)))
    calls = [up.generation.GenerateStream(streamed(ask(new=500))) for _ in range(3)]
    try:
        for call in calls:
            await call.read()
        await up.generation.Generate(ask(new=500), timeout=0.4)
    finally:
        for call in calls:
            call.cancel()


@raises(Reason.NON_FINITE_LOGITS)
async def non_finite_logits(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.generation.Generate(ask(20, NONFINITE))


@raises(Reason.ENGINE_FAULT)
async def engine_fault(up: Running, patch: pytest.MonkeyPatch) -> None:
    await up.generation.Generate(ask(20, FAULT))


@raises(Reason.READER_STALLED)
async def reader_stalled(up: Running, patch: pytest.MonkeyPatch) -> None:
    async with slow_channel(up) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.GenerateStream(streamed(ask(new=500, logprobs=20)))
        await call.read()
        await until(lambda: up.metric("running_requests") == 0)
        # A client that begins to read again learns what happened meanwhile.
        await rest(call)


async def provoke(up: Running, reason: Reason, patch: pytest.MonkeyPatch) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await SCENARIOS[reason](up, patch)
    return refusal(caught.value)


@pytest.mark.parametrize("reason", list(TABLE), ids=lambda reason: reason.name)
async def test_a_client_sees_the_reason_as_the_table_says(
    up: Running, reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = up.metric("rejected_requests_total", reason=reason.name)
    seen = await provoke(up, reason, monkeypatch)
    monkeypatch.undo()
    row = TABLE[reason]
    assert seen.reason == reason.name
    assert seen.code == row.code
    assert seen.trailers["x-request-id"]
    assert len(seen.details) == (1 if row.detail is Detail.NONE else 2)
    if row.detail is not Detail.NONE:
        detail = seen.detail(KINDS[row.detail])
        assert str(detail)
    if row.detail is Detail.RETRY:
        assert seen.trailers["grpc-retry-pushback-ms"] == str(round(row.retry_seconds * 1000))
    else:
        assert "grpc-retry-pushback-ms" not in seen.trailers
    for secret in ("secret", "Traceback", str(up.folder)):
        assert secret not in repr(seen)
    # The status may reach the client before the call is counted.
    await until(lambda: up.metric("rejected_requests_total", reason=reason.name) > before)
    # The server goes on.
    reply = await up.generation.Generate(ask(new=2))
    assert len(reply.token_ids) == 2


async def test_only_unavailable_tells_a_client_to_try_again() -> None:
    for reason, row in TABLE.items():
        assert (row.code is grpc.StatusCode.UNAVAILABLE) == (row.retry_seconds > 0), reason


async def test_all_violations_come_at_once(up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = await provoke(up, Reason.FIELD_INVALID, monkeypatch)
    violations = seen.detail(error_details_pb2.BadRequest).field_violations
    assert [v.field for v in violations] == ["sampling.temperature", "sampling.top_p"]
