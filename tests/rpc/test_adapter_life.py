"""An adapter's life over gRPC: labels, aliases, versions; tiers, pins and merges."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from engine import oracle
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from loraplex.v1 import adapter_pb2 as pb
from rpc.harness import (
    CRASH,
    FORBIDDEN,
    VOCAB,
    Running,
    ask,
    expected,
    refusal,
    rest,
    running,
    streamed,
    until,
    write_adapter,
    write_prompt,
)

PROMPT = [20, 21, 22]


async def get(up: Running, adapter_id: str) -> pb.Adapter:
    return (await up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id=adapter_id))).adapter


async def answer(up: Running, adapter_id: str) -> list[int]:
    return list((await up.generation.Generate(ask(new=3, adapter=adapter_id))).token_ids)


async def reason_of(call: object) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return refusal(caught.value).reason


def teach(up: Running, adapter: pb.Adapter, text: str) -> None:
    """Tells the oracle about an adapter, in the store."""
    (folder,) = [
        path.parent
        for path in (up.folder / "store").rglob("adapter_config.json")
        if adapter.digest.removeprefix("sha256:") in str(path)
    ]
    folder.chmod(0o755)
    (folder / "oracle.json").write_text(text)


async def test_labels_are_set_found_changed_and_kept_by_their_version(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        first = await up.register("alpha", 1, labels={"team": "search", "stage": "test"})
        await up.register("beta", 2, labels={"team": "search"})
        assert dict(first.labels) == {"team": "search", "stage": "test"}

        async def found(**labels: str) -> list[str]:
            reply = await up.adapters.ListAdapters(pb.ListAdaptersRequest(labels=labels))
            return [adapter.name for adapter in reply.adapters]

        assert await found(team="search") == ["alpha", "beta"]
        assert await found(team="search", stage="test") == ["alpha"]
        assert await found(team="ads") == []
        change = pb.LabelAdapterRequest(
            adapter_id="alpha", set={"stage": "live"}, remove=["team", "absent"]
        )
        reply = await up.adapters.LabelAdapter(change)
        assert dict(reply.adapter.labels) == {"stage": "live"}
        assert dict((await get(up, "alpha")).labels) == {"stage": "live"}
        await up.register("alpha", 3, replace=True)
        assert not (await get(up, "alpha")).labels
        assert dict((await get(up, "alpha@1")).labels) == {"stage": "live"}
        nobody = pb.LabelAdapterRequest(adapter_id="nobody", set={"a": "b"})
        assert await reason_of(up.adapters.LabelAdapter(nobody)) == "ADAPTER_NOT_FOUND"


async def test_an_alias_serves_the_version_it_points_to_and_moves_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        old = await up.register("alpha", 1)
        point = pb.SetAliasRequest(alias="live", adapter_id="alpha", expected="")
        assert (await up.adapters.SetAlias(point)).adapter.digest == old.digest
        new = await up.register("alpha", 2, replace=True)
        assert await answer(up, "live") == expected(PROMPT, 3, old.digest)
        assert await answer(up, "alpha") == expected(PROMPT, 3, new.digest)
        assert list((await get(up, "alpha@1")).aliases) == ["live"]
        # Compare and set: two who expect the same cannot both win.
        move = pb.SetAliasRequest(alias="live", adapter_id="alpha", expected="alpha@1")
        outcomes = await asyncio.gather(
            *(up.adapters.SetAlias(move) for _ in range(2)), return_exceptions=True
        )
        lost = [o for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
        assert [refusal(error).reason for error in lost] == ["ADAPTER_CONFLICT"]
        assert await answer(up, "live") == expected(PROMPT, 3, new.digest)
        reply = await up.generation.Generate(ask(new=1, adapter="live"))
        assert [(a.name, a.version) for a in reply.adapters] == [("alpha", 2)]
        for wrong in ({"alias": "alpha", "adapter_id": "alpha"},):
            request = pb.SetAliasRequest(**wrong)
            assert await reason_of(up.adapters.SetAlias(request)) == "ADAPTER_CONFLICT"
        remove = pb.DeleteAliasRequest(alias="live")
        await up.adapters.DeleteAlias(remove)
        assert await reason_of(up.adapters.DeleteAlias(remove)) == "ADAPTER_NOT_FOUND"
        assert await reason_of(get(up, "live")) == "ADAPTER_NOT_FOUND"


async def test_versions_are_listed_and_a_deleted_name_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        for seed in (1, 2, 3):
            await up.register("alpha", seed, replace=True)
        versions = pb.ListAdapterVersionsRequest(name="alpha")
        reply = await up.adapters.ListAdapterVersions(versions)
        assert [adapter.version for adapter in reply.adapters] == [3, 2, 1]
        await up.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="alpha"))
        assert await reason_of(up.adapters.ListAdapterVersions(versions)) == "ADAPTER_NOT_FOUND"
        assert await reason_of(answer(up, "alpha")) == "ADAPTER_NOT_FOUND"
        restore = pb.RestoreAdapterRequest(name="alpha")
        restored = (await up.adapters.RestoreAdapter(restore)).adapter
        assert restored.version == 3
        assert await answer(up, "alpha@1") == expected(PROMPT, 3, (await get(up, "alpha@1")).digest)
        assert up.metric("adapters", state="registered") == 1
        assert await reason_of(up.adapters.RestoreAdapter(restore)) == "ADAPTER_CONFLICT"


async def test_what_another_process_changes_is_seen_here(tmp_path: Path) -> None:
    async with running(tmp_path) as one, running(tmp_path) as other:
        old = await one.register("alpha", 1)
        assert await answer(other, "alpha") == expected(PROMPT, 3, old.digest)
        new = await one.register("alpha", 2, replace=True)
        assert await answer(one, "alpha") == expected(PROMPT, 3, new.digest)  # at once
        seen = expected(PROMPT, 3, new.digest)
        while await answer(other, "alpha") != seen:  # noqa: ASYNC110  (nobody tells)
            await asyncio.sleep(0.02)


async def test_a_validation_tells_everything_and_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        write_adapter(tmp_path / "import" / "good")
        good = await up.adapters.ValidateAdapter(pb.ValidateAdapterRequest(path="good"))
        assert not good.findings
        assert good.spec.peft_type == "LORA"
        assert good.spec.rank == 2
        assert list(good.spec.target_modules) == ["q_proj", "v_proj"]
        assert good.spec.device_bytes > 0
        assert good.spec.digest.startswith("sha256:")
        assert not (await up.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
        registered = await up.adapters.RegisterAdapter(
            pb.RegisterAdapterRequest(name="good", path="good")
        )
        assert registered.adapter.digest == good.spec.digest
        write_adapter(tmp_path / "import" / "bad", r=-1, bias="much", nonsense=1)
        bad = await up.adapters.ValidateAdapter(pb.ValidateAdapterRequest(path="bad"))
        assert not bad.HasField("spec")
        assert {"r", "bias", "nonsense"} <= {finding.field for finding in bad.findings}
        assert all(f.reason.startswith("ADAPTER_") and f.message for f in bad.findings)
        for path in ("../import", "nothing"):
            request = pb.ValidateAdapterRequest(path=path)
            assert await reason_of(up.adapters.ValidateAdapter(request)) == "FIELD_INVALID"


async def test_a_pinned_adapter_stays_while_others_come_and_go(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "probe")
    size = sum(file.stat().st_size for file in folder.iterdir())
    tight = {"adapter_budget_bytes": 2 * size + size // 2, "num_slots": 3}
    async with running(tmp_path, engine_options=tight) as up:
        pinned = await up.register("pinned", 1)
        pin = pb.PinAdapterRequest(adapter_id="pinned")
        for _ in range(2):  # idempotent
            reply = await up.adapters.PinAdapter(pin)
            assert reply.adapter.pinned
            assert reply.adapter.tier == pb.ADAPTER_TIER_DEVICE
        for seed in range(2, 7):
            adapter = await up.register(f"n{seed}", seed)
            assert await answer(up, f"n{seed}") == expected(PROMPT, 3, adapter.digest)
            assert (await get(up, "pinned")).state == pb.ADAPTER_STATE_RESIDENT
        assert up.metric("adapters", state="pinned") == 1
        # A new engine gets it back, pinned.
        assert await reason_of(up.generation.Generate(ask(20, CRASH))) == "ENGINE_RESTARTED"
        await until(lambda: up.metric("adapters", state="pinned") == 1)
        assert (await get(up, "pinned")).digest == pinned.digest
        reply = await up.adapters.UnpinAdapter(pb.UnpinAdapterRequest(adapter_id="pinned"))
        assert not reply.adapter.pinned
        assert reply.adapter.state == pb.ADAPTER_STATE_RESIDENT


async def test_merging_changes_no_answer_and_ends_when_told(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options={"merge_budget_bytes": 100}) as up:
        adapter = await up.register("alpha", 1)
        teach(up, adapter, '{"merge_nbytes": 100}')
        other = await up.register("beta", 2)
        right = expected(PROMPT, 3, adapter.digest)
        assert await answer(up, "alpha") == right
        merge = pb.MergeAdapterRequest(adapter_id="alpha")
        for _ in range(2):  # idempotent
            reply = await up.adapters.MergeAdapter(merge)
            assert reply.adapter.merged_bytes == 100
        assert up.metric("adapters", state="merged") == 1
        assert up.metric("adapter_bytes", tier="merged") == 100
        assert up.metric("adapter_merges_total", change="merge", cause="order", result="ok") == 1
        assert await answer(up, "alpha") == right
        assert await answer(up, "beta") == expected(PROMPT, 3, other.digest)
        # A new engine merges it again.
        assert await reason_of(up.generation.Generate(ask(20, CRASH))) == "ENGINE_RESTARTED"
        await until(lambda: up.metric("adapters", state="merged") == 1)
        unmerge = pb.UnmergeAdapterRequest(adapter_id="alpha")
        for _ in range(2):
            reply = await up.adapters.UnmergeAdapter(unmerge)
            assert reply.adapter.merged_bytes == 0
        assert await answer(up, "alpha") == right


async def test_an_unload_with_a_drain_aborts_what_runs_too_long(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options={"step_seconds": 0.005}) as up:
        await up.register("alpha", 1)
        call = up.generation.GenerateStream(streamed(ask(new=200, adapter="alpha")))
        assert (await call.read()).WhichOneof("event") == "started"
        drain = Duration(nanos=50_000_000)
        reply = await up.adapters.UnloadAdapter(
            pb.UnloadAdapterRequest(adapter_id="alpha", drain=drain)
        )
        assert reply.adapter.state == pb.ADAPTER_STATE_STORED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(call)
        assert refusal(caught.value).reason == "ADAPTER_UNLOADED"
        assert up.metric("adapter_unloads_total", result="ok") == 1


async def test_an_evicted_adapter_waits_in_host_memory_and_tells_so(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "probe")
    size = sum(file.stat().st_size for file in folder.iterdir())
    tight = {"adapter_budget_bytes": size + size // 2, "host_budget_bytes": 10 * size}
    async with running(tmp_path, engine_options=tight) as up:
        await up.register("alpha", 1)
        await up.register("beta", 2)
        fresh = await get(up, "alpha")
        assert fresh.tier == pb.ADAPTER_TIER_DISK
        assert not fresh.HasField("last_use_time")
        await answer(up, "alpha")
        used = await get(up, "alpha")
        assert used.tier == pb.ADAPTER_TIER_DEVICE
        assert used.HasField("load_duration")
        assert abs(used.last_use_time.ToSeconds() - used.create_time.ToSeconds()) < 60
        await answer(up, "beta")
        evicted = await get(up, "alpha")
        assert (evicted.state, evicted.tier) == (pb.ADAPTER_STATE_STORED, pb.ADAPTER_TIER_HOST)
        assert evicted.host_bytes > 0
        assert up.metric("adapter_evictions_total", tier="device") == 1
        assert up.metric("adapter_bytes", tier="host") > 0
        await answer(up, "alpha")
        assert up.metric("adapter_loads_total", tier="host", result="ok") == 1


async def test_streams_of_many_replacements_each_keep_their_digest(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options={"step_seconds": 0.003, "num_slots": 8}) as up:
        calls = []
        for seed in range(4):
            adapter = await up.register("alpha", seed, replace=True)
            call = up.generation.GenerateStream(streamed(ask(new=60, adapter="alpha")))
            started = (await call.read()).started
            assert [a.digest for a in started.adapters] == [adapter.digest]
            calls.append((adapter.digest, call))
        for digest, call in calls:
            tokens = [t for message in await rest(call) for t in message.delta.token_ids]
            assert tokens == expected(PROMPT, 60, digest)


async def test_virtual_tokens_are_used_alone_and_count_against_the_context(
    tmp_path: Path,
) -> None:
    options = {
        "prefix_blocks": 8,
        "max_context": 64,
    }
    async with running(tmp_path, engine_options=options) as up:
        write_prompt(tmp_path / "import" / "soft", 3)
        request = pb.RegisterAdapterRequest(name="soft", path="soft")
        adapter = (await up.adapters.RegisterAdapter(request)).adapter
        assert (adapter.peft_type, adapter.virtual_tokens) == ("PROMPT_TUNING", 3)
        teach(up, adapter, '{"virtual": 3}')
        assert await answer(up, "soft") == oracle.continuation(
            PROMPT, [(adapter.digest, 1.0)], 3, VOCAB, FORBIDDEN, virtual=3
        )
        assert up.metric("adapter_prefix_blocks", state="used") == 1
        await up.register("alpha", 1)
        for mix in (
            [{"adapter_id": "soft", "weight": 2.0}],
            [{"adapter_id": "soft"}, {"adapter_id": "alpha"}],
            [{"adapter_id": "soft"}, {"adapter_id": "soft"}],
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await up.generation.Generate(ask(new=2, mix=mix))
            seen = refusal(caught.value)
            assert seen.reason == "ADAPTER_NOT_MIXABLE"
            (violation,) = seen.detail(error_details_pb2.BadRequest).field_violations
            assert violation.field == "mix"
        await up.generation.Generate(ask(new=2, mix=[{"adapter_id": "soft", "weight": 1.0}]))
        # 64 positions: 3 virtual tokens, at most 60 of the prompt, one of the answer.
        whole = await up.generation.Generate(ask(*[20] * 60, new=50, adapter="soft"))
        assert len(whole.token_ids) == 1
        too_long = up.generation.Generate(ask(*[20] * 61, adapter="soft"))
        assert await reason_of(too_long) == "PROMPT_TOO_LONG"
        await up.generation.Generate(ask(*[20] * 61, adapter="alpha"))


@pytest.mark.fault("virtual-tokens-beyond-context")
async def test_virtual_tokens_without_room_for_a_prompt_are_not_registered(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, engine_options={"prefix_blocks": 40, "max_context": 64}) as up:
        for tokens, reason in ((62, ""), (63, "ADAPTER_TOO_LARGE"), (400, "ADAPTER_TOO_LARGE")):
            name = f"soft{tokens}"
            write_prompt(tmp_path / "import" / name, tokens)
            report = await up.adapters.ValidateAdapter(pb.ValidateAdapterRequest(path=name))
            assert {finding.reason for finding in report.findings} == {reason} - {""}
            request = pb.RegisterAdapterRequest(name=name, path=name)
            if not reason:
                await up.adapters.RegisterAdapter(request)
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await up.adapters.RegisterAdapter(request)
            seen = refusal(caught.value)
            assert seen.reason == reason
            assert "max_context" in str(caught.value.details())


@pytest.mark.fault("virtual-tokens-beyond-context")
async def test_virtual_tokens_from_a_time_of_more_room_are_refused_by_name(tmp_path: Path) -> None:
    """Not as a prompt that is too long, since no prompt is short enough."""
    async with running(tmp_path, engine_options={"prefix_blocks": 8, "max_context": 64}) as up:
        write_prompt(tmp_path / "import" / "soft", 30)
        await up.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="soft", path="soft"))
    async with running(tmp_path, engine_options={"prefix_blocks": 8, "max_context": 31}) as up:
        assert await reason_of(answer(up, "soft")) == "ADAPTER_TOO_LARGE"
        assert await answer(up, "") == expected(PROMPT, 3)
    async with running(tmp_path, engine_options={"prefix_blocks": 8, "max_context": 32}) as up:
        soft = up.generation.Generate(ask(20, new=5, adapter="soft"))
        assert len((await soft).token_ids) == 1
