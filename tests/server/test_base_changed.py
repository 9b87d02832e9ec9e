"""A real base model that is exchanged for another of the same shapes under the same store; R16."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from adapters.peft_files import lora, write
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc, generation_pb2_grpc
from loraplex_server.app import Server
from loraplex_server.config import Config
from rpc.harness import ask, refusal

from model import tiny


@pytest.mark.slow
@pytest.mark.fault("base-changed-under-store")
async def test_another_checkpoint_of_the_same_shapes_serves_no_adapter_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")  # the torch reference will do
    for seed, name in enumerate(("first", "second")):
        tiny.write("llama", tmp_path / name, seed=seed)
    write(lora("llama", {}, target_modules="all-linear"), tmp_path / "import" / "pirate")

    async def answers(model: str, *names: str, dtype: str = "float32") -> list[str]:
        """The outcome of a call with each adapter; those that are new are registered."""
        settings = {"model": str(tmp_path / model), "dtype": dtype, "device": "cpu", "threads": 1}
        folders = {key: tmp_path / key for key in ("cache", "store")}
        ports = {"port": 0, "admin_port": 0, "import_root": tmp_path / "import"}
        server = Server(Config(**settings, **folders, **ports, kv_tokens=512))
        outcomes = []
        try:
            await server.start()
            async with grpc.aio.insecure_channel(str(server.address)) as channel:
                adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
                generation = generation_pb2_grpc.GenerationServiceStub(channel)
                known = {
                    a.name for a in (await adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
                }
                for name in set(names) - known:
                    request = pb.RegisterAdapterRequest(name=name, path="pirate")
                    await adapters.RegisterAdapter(request)
                for name in names:
                    try:
                        await generation.Generate(ask(5, 6, 7, new=2, adapter=name))
                        outcomes.append("OK")
                    except grpc.aio.AioRpcError as error:
                        outcomes.append(refusal(error).reason)
        finally:
            await server.close()
        return outcomes

    assert await answers("first", "old") == ["OK"]
    assert await answers("first", "old", dtype="bfloat16") == ["OK"], "the base is the same"
    assert await answers("second", "old", "new") == ["BASE_MODEL_MISMATCH", "OK"]
    assert await answers("first", "old", "new") == ["OK", "BASE_MODEL_MISMATCH"]
