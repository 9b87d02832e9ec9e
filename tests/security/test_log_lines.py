"""Log lines of a server process: who called, with which adapter, and nothing of the credential."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import grpc
import pytest
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2_grpc
from loraplex_server.access.identity.key_file import KeyFile
from rpc.harness import ask, streamed, write_adapter
from server.test_process import serving

PRINCIPALS = """
[principals.search]
roles = ["infer", "register"]
adapters = "*"
imports = ""
"""


def test_lines_name_the_caller_and_the_digest_and_no_key(tmp_path: Path) -> None:
    file = tmp_path / "principals.toml"
    file.write_text(PRINCIPALS)
    _, key = KeyFile(tmp_path / "keys.json").add("search")
    who = {"metadata": (("authorization", f"Bearer {key}"),)}
    settings = {"principals": file, "keys": tmp_path / "keys.json", "log_format": "json"}
    write_adapter(tmp_path / "import" / "alpha")
    with serving(tmp_path, **settings) as up, grpc.insecure_channel(up.grpc) as channel:
        adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        generation = generation_pb2_grpc.GenerationServiceStub(channel)
        request = adapter_pb2.RegisterAdapterRequest(name="alpha", path="alpha")
        digest = adapters.RegisterAdapter(request, **who).adapter.digest
        generation.Generate(ask(adapter="alpha", new=2, request_id="one"), **who)
        list(generation.GenerateStream(streamed(ask(adapter="alpha", request_id="two")), **who))
        generation.Generate(ask(new=2, request_id="three"), **who)
        wrong = (("authorization", f"Bearer {key[:-1]}"),)
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                generation.Generate(ask(), metadata=wrong)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        up.process.send_signal(signal.SIGTERM)
        assert up.wait() == 0
    lines = [json.loads(line) for line in up.log]
    ended = {line["request_id"]: line for line in lines if line["message"] == "call ended"}
    assert {name: ended[name].get("digest") for name in ("one", "two", "three")} == {
        "one": digest,
        "two": digest,
        "three": None,
    }
    assert {line["principal"] for line in ended.values()} == {"search"}
    audit = [line for line in lines if line["logger"] == "loraplex.audit"]
    assert [line.get("reason") for line in audit] == [None, *["CREDENTIALS_INVALID"] * 3]
    assert (audit[0]["adapter"], audit[0]["digest"]) == ("alpha", digest)
    assert "malformed" in audit[1]["why"]
    assert key.rpartition("_")[2][:-1] not in "".join(up.log)
