"""A server with a policy of signatures registers nothing that is not signed, on any path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex.aio import AsyncClient
from loraplex.errors import AdapterRejected
from loraplex.v1 import adapter_pb2
from loraplex_adapters.signing import sign
from loraplex_server import app
from loraplex_server.exits import ServerExit
from rpc.harness import Running, config_for, refusal, running, write_adapter
from rpc.training_jobs import State, training

from adapters import keys


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    folder = tmp_path / "keys"
    private = keys.make_key(folder, "release")
    (tmp_path / "private.pem").write_bytes(private)
    policy = keys.write_policy(folder, 'unsigned = ["dev-"]', release=["prod-"])
    async with running(tmp_path, adapter_signatures=policy) as started:
        yield started


def signed(up: Running, name: str, seed: int = 0) -> tuple[Path, bytes]:
    source = write_adapter(up.folder / "import" / f"{name}-{seed}", seed)
    return source, sign(source, name, (up.folder / "private.pem").read_bytes())


async def refused(work: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work
    found = refusal(caught.value)
    assert found.code is grpc.StatusCode.FAILED_PRECONDITION
    return found.reason


def order(name: str, path: Path, **fields: Any) -> adapter_pb2.RegisterAdapterRequest:
    return adapter_pb2.RegisterAdapterRequest(name=name, path=path.name, **fields)


@pytest.mark.parametrize("terms", [{}, {"load": True}, {"load": True, "replace": True}])
async def test_a_registration_needs_a_signature(up: Running, terms: dict[str, Any]) -> None:
    source, signature = signed(up, "prod-a")
    register = up.adapters.RegisterAdapter
    assert await refused(register(order("prod-a", source, **terms))) == "SIGNATURE_INVALID"
    wrong = order("prod-b", source, signature=signature, **terms)
    assert await refused(register(wrong)) == "SIGNATURE_INVALID"
    # Neither has left anything on the device or in the store.
    assert not up.server.engine.adapters
    assert not list((up.folder / "store" / "blobs" / "sha256").iterdir())
    reply = await register(order("prod-a", source, signature=signature, **terms))
    assert "signed by the key release" in reply.notes
    other, _ = signed(up, "prod-a", seed=1)
    changed = order("prod-a", other, signature=signature, replace=True)
    assert await refused(register(changed)) == "SIGNATURE_INVALID"
    unsigned = await register(order("dev-a", other))
    assert unsigned.created
    assert not [note for note in unsigned.notes if "signed" in note]


async def test_an_upload_needs_a_signature_and_can_be_finished_with_it(up: Running) -> None:
    source, signature = signed(up, "prod-a")
    async with AsyncClient(str(up.server.address)) as client:
        upload = await client.start_upload()
        with pytest.raises(AdapterRejected) as caught:
            await client.upload_adapter("prod-a", source, upload_id=upload)
        assert caught.value.reason == "SIGNATURE_INVALID"
        done = await client.upload_adapter("prod-a", source, upload_id=upload, signature=signature)
        assert done.created
        assert "signed by the key release" in done.notes


async def test_an_alias_is_no_way_around(up: Running) -> None:
    source, signature = signed(up, "prod-a")
    await up.adapters.RegisterAdapter(order("prod-a", source, signature=signature))
    await up.adapters.RegisterAdapter(order("dev-a", source))
    point = up.adapters.SetAlias
    way_around = adapter_pb2.SetAliasRequest(alias="prod-now", adapter_id="dev-a")
    assert await refused(point(way_around)) == "SIGNATURE_INVALID"
    await point(adapter_pb2.SetAliasRequest(alias="prod-now", adapter_id="prod-a"))
    await point(adapter_pb2.SetAliasRequest(alias="dev-now", adapter_id="dev-a"))


async def test_a_policy_is_read_again_and_a_damaged_one_allows_nothing(up: Running) -> None:
    source, signature = signed(up, "prod-a")
    policy = up.folder / "keys" / "policy.toml"
    text = policy.read_text()
    policy.write_text("damaged")
    for request in (order("prod-a", source, signature=signature), order("dev-a", source)):
        assert await refused(up.adapters.RegisterAdapter(request)) == "SIGNATURE_INVALID"
    policy.write_text(text.replace("prod-", "ops-"))
    request = order("prod-a", source, signature=signature)
    assert await refused(up.adapters.RegisterAdapter(request)) == "SIGNATURE_INVALID"
    policy.write_text(text)
    assert (await up.adapters.RegisterAdapter(request)).created


def test_a_server_does_not_start_with_a_wrong_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("[keys.a]")
    code = asyncio.run(app.run(config_for(tmp_path, adapter_signatures=file)))
    assert code is ServerExit.BAD_CONFIG
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", 'training = "unsigned"'])
async def test_a_name_that_needs_a_signature_is_trained_only_if_the_operator_allows_it(
    line: str, tmp_path: Path
) -> None:
    """It is refused when the job is ordered, not after hours of training."""
    keys.make_key(tmp_path / "keys", "release")
    policy = keys.write_policy(tmp_path / "keys", line, 'unsigned = ["dev-"]', release=["prod-"])
    async with training(tmp_path, adapter_signatures=policy) as jobs:
        made = f"publish {jobs.adapter()}"
        done = await jobs.ended(await jobs.create(made, name="dev-a"))
        assert done.state == State.TRAINING_JOB_STATE_SUCCEEDED
        if not line:
            assert await refused(jobs.create(made, name="prod-a")) == "SIGNATURE_INVALID"
            return
        done = await jobs.ended(await jobs.create(made, name="prod-a"))
        assert done.state == State.TRAINING_JOB_STATE_SUCCEEDED
        aliased = jobs.create(made, name="dev-b", delivery={"alias": "prod-now"})
        assert await refused(aliased) == "SIGNATURE_INVALID"
