"""Controllers of other projects, written from what they send and expect, against the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway.adapter_gateway import Gateway, checked, gateway
from pull import bucket, fake_hub
from rpc.harness import write_adapter

COMMIT = "c" * 40


class AibrixController:
    """AIBrix's ModelAdapter controller: at most five attempts; only 200 and 201 are success."""

    def __init__(self, http: httpx2.AsyncClient, engine: str = "vllm") -> None:
        prefix = "" if engine == "sglang" else "/v1"
        self.load_path = f"{prefix}/load_lora_adapter"
        self.unload_path = f"{prefix}/unload_lora_adapter"
        self.http = http

    async def reconcile(self, name: str, artifact_url: str) -> str:
        """The phase that a custom resource of this name and artifact reaches."""
        if name in await self.served():
            return "Bound"
        body = {"lora_name": name, "lora_path": artifact_url.removeprefix("huggingface://")}
        for _ in range(5):
            reply = await self.http.post(self.load_path, json=body)
            if reply.status_code in (200, 201):
                return "Running" if name in await self.served() else "Lost"
        return "Failed"

    async def delete(self, name: str) -> bool:
        reply = await self.http.post(self.unload_path, json={"lora_name": name})
        return reply.status_code in (200, 201) and name not in await self.served()

    async def served(self) -> list[str]:
        reply = await self.http.get("/v1/models")
        return [model["id"] for model in reply.json()["data"]]


class StackOperator:
    """production-stack's LoraAdapter operator: it reads the former shape of vLLM's errors."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self.http = http

    async def load(self, name: str, path: str) -> None:
        body = {"lora_name": name, "lora_path": path}
        reply = await self.http.post("/v1/load_lora_adapter", json=body)
        if reply.status_code == 200:
            return
        assert reply.status_code == 400, reply.text
        error = reply.json()  # a body that is not JSON is an error of the operator's
        if error.get("type") == "InvalidUserInput" and (
            "has already been loaded" in error.get("message", "")
        ):
            return
        raise RuntimeError(error["message"])

    async def loaded(self) -> set[str]:
        models = (await self.http.get("/v1/models")).json()["data"]
        return {model["id"] for model in models if model.get("parent")}


class InspectProvider:
    """inspect-ai's vLLM provider, for `vllm/<base>:<adapter>`."""

    def __init__(self, http: httpx2.AsyncClient, home: Path) -> None:
        self.http = http
        self.home = home

    async def model(self, name: str) -> str:
        """The id to send in chats."""
        _, _, suffix = name.partition(":")
        path = self.home / suffix
        if path.is_dir():
            await self.load(str(path), str(path))
            return str(path)
        if "/" in suffix:
            await self.load(suffix, suffix)
            return suffix
        models = (await self.http.get("/v1/models")).json()["data"]
        assert suffix in [model["id"] for model in models]
        return suffix

    async def load(self, name: str, path: str) -> None:
        body = {"lora_name": name, "lora_path": path}
        reply = await self.http.post("/v1/load_lora_adapter", json=body)
        if reply.status_code == 404:
            raise LookupError("the server has no adapter endpoint")
        if reply.status_code == 400 and "already been loaded" not in reply.text:
            raise ValueError(reply.text)
        reply.raise_for_status()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with gateway(tmp_path) as found:
        yield found


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
async def test_aibrix_reaches_running_and_back(site: Gateway, engine: str) -> None:
    controller = AibrixController(site.http, engine)
    folder = site.write("text2sql")
    assert await controller.reconcile("text2sql-lora-1", str(folder)) == "Running"
    assert await controller.reconcile("text2sql-lora-1", str(folder)) == "Bound"
    assert await controller.reconcile("other", "/no/such/folder") == "Failed"
    assert await controller.delete("text2sql-lora-1")
    assert not await controller.delete("text2sql-lora-1")
    assert await controller.reconcile("text2sql-lora-1", str(folder)) == "Running"


async def test_production_stack_sees_what_it_loaded(site: Gateway) -> None:
    operator = StackOperator(site.http)
    site.write("one")
    site.write("two", seed=1)
    for _ in range(3):
        await operator.load("one", str(site.root / "one"))
    await operator.load("one", "two")  # it takes "already loaded" for success
    assert await operator.loaded() == {"one"}
    site.write("bad", target_modules=["nowhere"])
    with pytest.raises(RuntimeError, match="target modules"):
        await operator.load("bad", "bad")


async def test_inspect_evaluates_local_folders_and_loaded_names(
    site: Gateway, tmp_path: Path
) -> None:
    provider = InspectProvider(site.http, site.root)
    folder = site.write("Run_7")
    assert await provider.model("base:Run_7") == str(folder)
    await site.post("/v1/load_lora_adapter", lora_name="plain", lora_path="Run_7")
    assert await provider.model("base:plain") == "plain"
    assert sorted(await site.models()) == sorted(["plain", str(folder)])
    bad = site.write("bad", target_modules=["nowhere"])
    with pytest.raises(ValueError, match="target modules"):
        await provider.model(f"base:{bad}")


async def test_hub_ids_are_fetched_if_the_operator_allows_their_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_hub.hub() as hub:
        hub.add(COMMIT, write_adapter(tmp_path / "hub"))
        hub.refs["main"] = hub.refs["v1"] = COMMIT
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("LORAPLEX_KEY", "not-for-the-process")
        async with gateway(tmp_path, {"allow_sources": ("hf://org",)}) as site:
            controller = AibrixController(site.http)
            assert await controller.reconcile("cr", "huggingface://org/name") == "Running"
            provider = InspectProvider(site.http, site.root)
            assert await provider.model("base:org/name@v1") == "org/name@v1"
            found = {a["model"]: a for a in await adapters(site)}
            assert found.keys() == {"cr", "org/name@v1"}
            assert found["cr"]["labels"]["loraplex.dev/source"] == "org/name"
            asked = len(hub.asked)
            await site.post("/v1/load_lora_adapter", 403, lora_name="x", lora_path="hf://other/x")
            await site.post("/v1/load_lora_adapter", 404, lora_name="x", lora_path="other/name")
            assert len(hub.asked) == asked
            refused = await site.post(
                "/v1/load_lora_adapter", 400, lora_name="x", lora_path="hf://org/none"
            )
            assert "does not exist" in refused["message"]


async def test_a_bucket_is_fetched_below_the_allowed_prefix_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bucket.s3() as s3:
        s3.put(write_adapter(tmp_path / "one"), "team/one")
        for name, text in s3.environment.items():
            monkeypatch.setenv(name, text)
        settings = {"allow_sources": ("s3://adapters/team",), "adapter_root": None}
        async with gateway(tmp_path, settings) as site:
            uri = "s3://adapters/team/one"
            await site.post("/v1/loras", lora_name="one", source={"uri": uri})
            report = await site.post("/v1/adapters", source=uri, validate_only=True)
            assert report["valid"]
            for other in ("s3://adapters/secret", "s3://adapters-others/team", "s3://adapters"):
                await site.post("/v1/loras", 403, lora_name="x", source={"uri": other})
            assert await site.models() == ["one"]


async def test_a_fetch_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    settings = {"allow_sources": ("hf://org",), "pull_seconds": 0.01}
    async with gateway(tmp_path, settings) as site:
        body = await site.post("/v1/load_lora_adapter", 504, lora_name="x", lora_path="hf://org/x")
        assert "was not fetched within" in body["message"]


async def adapters(site: Gateway) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = checked(await site.http.get("/v1/adapters"), 200)["data"]
    return found
