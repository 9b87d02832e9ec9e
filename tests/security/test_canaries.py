"""Prompts, keys and the bytes of adapters stay out of everything that a server writes or sends.

A real server process is given texts that occur nowhere else, in every place where clients send
secrets, in calls that succeed and in calls that fail in many ways. Then its output, log, audit log,
metrics and traces are searched, and the errors that clients got.
"""

from __future__ import annotations

import json
import signal
import struct
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from gateway.test_process import beside
from loraplex.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from loraplex_server.access.identity.key_file import KeyFile
from rpc.harness import CRASH, FAULT, NONFINITE, write_adapter
from safetensors.numpy import load_file, save_file
from server.test_process import serving
from telemetry.collector import collecting

PROMPT, MESSAGE, STOP, SALT, LABEL = (
    f"canary-{name}-{number}"
    for name, number in (
        ("prompt", "7d1f"),
        ("message", "93ac"),
        ("stop", "b20e"),
        ("salt", "4c77"),
        ("label", "e815"),
    )
)
WEIGHT = b"CNR<"
"""The bytes of a weight, as a float32."""

PRINCIPALS = """
[principals.search]
roles = ["infer", "read", "register", "admin"]
adapters = "*"
imports = ""
"""


def canary_adapter(folder: Path, **config: Any) -> Path:
    """An adapter all of whose weights have the same, conspicuous bytes."""
    write_adapter(folder, **config)
    file = folder / "adapter_model.safetensors"
    (weight,) = struct.unpack("<f", WEIGHT)
    save_file({k: np.full_like(v, weight) for k, v in load_file(file).items()}, file)
    return folder


def requests() -> Iterator[generation_pb2.GenerateRequest]:
    """Requests with secrets: right ones, wrong ones, and some at which the engine fails."""
    fields: dict[str, Any] = {
        "cache_salt": SALT,
        "stop": {"max_new_tokens": 4, "strings": [STOP]},
        "sampling": {"temperature": 0.0},
    }
    make = generation_pb2.GenerateRequest
    yield make(prompt=PROMPT, **fields)
    yield make(prompt=PROMPT, adapter_id="canary", **fields)
    yield make(prompt=PROMPT * 4000, **fields)
    yield make(prompt=PROMPT, adapter_id="nobody", **fields)
    yield make(prompt=PROMPT, **{**fields, "sampling": {"temperature": -1.0, "top_p": 7.0}})
    yield make(prompt=PROMPT, **{**fields, "stop": {"strings": [STOP] * 100}})
    said = {"role": "user", "content": MESSAGE}
    yield make(messages={"messages": [said]}, **fields)
    yield make(messages={"messages": [said, {"role": "system", "content": MESSAGE}]}, **fields)
    yield make(messages={"messages": [{"role": MESSAGE, "content": MESSAGE}]}, **fields)
    for token in (NONFINITE, FAULT, CRASH):
        yield make(token_ids={"ids": [20, token, 30]}, **fields)
    scored = {**fields, "stop": {"strings": [STOP], "max_new_tokens": 0}}
    yield make(prompt=PROMPT, n=3, prompt_logprobs=1, return_prompt_token_ids=True, **scored)
    yield make(prompt=PROMPT, n=129, **fields)


def test_nothing_secret_is_in_what_a_server_writes_or_sends(tmp_path: Path) -> None:
    (tmp_path / "principals.toml").write_text(PRINCIPALS)
    _, key = KeyFile(tmp_path / "keys.json").add("search")
    canary_adapter(tmp_path / "import" / "good")
    canary_adapter(tmp_path / "import" / "bad", target_modules=["q_proj", "canaries"])
    errors: list[str] = []

    def attempt(call: Callable[..., Any], request: Any, credential: str = key) -> None:
        try:
            call(request, metadata=(("authorization", f"Bearer {credential}"),), timeout=30)
        except grpc.RpcError as error:
            told: Any = error
            errors.append(f"{told.details()} {told.trailing_metadata()!r}")

    with collecting() as collector:
        settings = {
            "principals": tmp_path / "principals.toml",
            "keys": tmp_path / "keys.json",
            "audit_log": tmp_path / "audit.jsonl",
            "log_format": "json",
            "log_level": "debug",
            "otlp_endpoint": collector.endpoint,
        }
        with serving(tmp_path, **settings) as up, grpc.insecure_channel(up.grpc) as channel:
            generation = generation_pb2_grpc.GenerationServiceStub(channel)
            adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
            for path in ("good", "bad"):
                register = adapter_pb2.RegisterAdapterRequest(
                    name="canary", path=path, labels={"note": LABEL}
                )
                attempt(adapters.RegisterAdapter, register)
                attempt(adapters.ValidateAdapter, adapter_pb2.ValidateAdapterRequest(path=path))
            raw = channel.unary_unary("/loraplex.v1.GenerationService/Generate")
            attempt(raw, PROMPT.encode())
            for request in requests():
                attempt(generation.Generate, request)
                stream = generation_pb2.GenerateStreamRequest(request=request)
                attempt(lambda *a, **k: list(generation.GenerateStream(*a, **k)), stream)
                attempt(generation.Generate, request, key[:-1] + "~")
            render = model_pb2.RenderChatRequest(
                messages={"messages": [{"role": "user", "content": MESSAGE}]}
            )
            model = model_pb2_grpc.ModelServiceStub(channel)
            attempt(model.RenderChat, render)
            attempt(model.Tokenize, model_pb2.TokenizeRequest(text=PROMPT, with_pieces=True))
            attempt(model.Detokenize, model_pb2.DetokenizeRequest(token_ids=[20, 1 << 20]))
            with urllib.request.urlopen(f"http://{up.admin}/metrics", timeout=10) as reply:
                metrics = reply.read()
            up.process.send_signal(signal.SIGTERM)
            assert up.wait() == 0
            rest = up.process.stdout.read().encode() if up.process.stdout else b""
    places = {
        "output": rest,
        "log": "".join(up.log).encode(),
        "audit log": (tmp_path / "audit.jsonl").read_bytes(),
        "metrics": metrics,
        "traces": b"".join(collector.requests),
        "errors": "".join(errors).encode(),
    }
    assert len(errors) > 20
    assert b"canary@1" in places["metrics"] or b'"canary"' in places["metrics"], "it was registered"
    assert all(places[name] for name in ("log", "audit log", "metrics", "traces"))
    secret = key.rpartition("_")[2]
    found = [
        (place, canary)
        for place, content in places.items()
        for canary in (PROMPT, MESSAGE, STOP, SALT, secret, secret[:-1], WEIGHT.decode())
        if canary.encode() in content or json.dumps(canary)[1:-1].encode() in content
    ]
    assert not found


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """HTTP requests with secrets: right ones, wrong ones, and some at which the engine fails."""
    said = [{"role": "user", "content": MESSAGE}]
    common = {"max_tokens": 4, "temperature": 0, "stop": [STOP], "cache_salt": SALT}
    chat, text = "/v1/chat/completions", "/v1/completions"
    for stream in (False, True):
        fields = {**common, "stream": stream}
        for model in ("oracle", "canary", "nobody", "org/nothing"):
            yield chat, {"model": model, "messages": said, **fields}
            yield text, {"model": model, "prompt": PROMPT, **fields}
        yield text, {"model": "oracle", "prompt": PROMPT * 4000, **fields}
        yield text, {"model": "oracle", "prompt": PROMPT, **{**fields, "temperature": -1}}
        yield chat, {"model": "oracle", "messages": [{"role": MESSAGE, "content": []}], **fields}
        yield chat, {"model": "oracle", "messages": said, "tools": [{PROMPT: 1}], **fields}
        for token in (NONFINITE, FAULT, CRASH):
            yield text, {"model": "oracle", "prompt": [20, token, 30], **fields}
    yield "/v1/responses", {"model": "oracle", "input": PROMPT, "store": False}
    yield "/v1/embeddings", {"model": "oracle", "input": PROMPT}
    yield "/tokenize", {"model": "oracle", "prompt": PROMPT}
    yield chat, {"model": "oracle", "messages": PROMPT}
    yield "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "hf://canary/x"}


def test_nothing_secret_is_in_what_a_gateway_and_its_server_write_or_send(tmp_path: Path) -> None:
    (tmp_path / "principals.toml").write_text(PRINCIPALS)
    _, key = KeyFile(tmp_path / "keys.json").add("search")
    canary_adapter(tmp_path / "import" / "good")
    errors: list[str] = []

    def post(url: str, path: str, data: bytes, kind: str, credential: str) -> None:
        headers = {"content-type": kind, "authorization": f"Bearer {credential}"}
        call = urllib.request.Request(url + path, data, headers)
        try:
            with urllib.request.urlopen(call, timeout=30) as reply:
                answer = reply.read()
        except urllib.error.HTTPError as error:
            answer = error.read()
            errors.append(f"{error.headers} {answer.decode()}")
        errors.extend(line for line in answer.decode().splitlines() if '"error":' in line)

    with collecting() as collector:
        settings = {
            "principals": tmp_path / "principals.toml",
            "keys": tmp_path / "keys.json",
            "audit_log": tmp_path / "audit.jsonl",
            "log_level": "debug",
            "otlp_endpoint": collector.endpoint,
        }
        with beside(tmp_path, **settings) as (process, url, log):
            load = {"lora_name": "canary", "lora_path": "good"}
            post(url, "/v1/load_lora_adapter", json.dumps(load).encode(), "application/json", key)
            for path, body in bodies():
                for credential in (key, key[:-1] + "~"):
                    post(url, path, json.dumps(body).encode(), "application/json", credential)
            post(url, "/v1/completions", b"{" + PROMPT.encode(), "application/json", key)
            post(url, "/v1/completions", PROMPT.encode(), "text/plain", key)
            form = f'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n{PROMPT}'
            for path in ("/v1/files", "/v1/adapters"):
                post(url, path, form.encode(), "multipart/form-data; boundary=x", key)
            with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
                metrics = reply.read()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    places = {
        "log": "".join(log).encode(),
        "audit log": (tmp_path / "audit.jsonl").read_bytes(),
        "metrics": metrics,
        "traces": b"".join(collector.requests),
        "errors": "".join(errors).encode(),
    }
    assert len(errors) > 30
    assert b"loraplex_gateway_requests_total{" in metrics
    assert all(places.values()), {name: len(content) for name, content in places.items()}
    secret = key.rpartition("_")[2]
    found = [
        (place, canary)
        for place, content in places.items()
        for canary in (PROMPT, MESSAGE, STOP, SALT, secret, secret[:-1])
        if canary.encode() in content or json.dumps(canary)[1:-1].encode() in content
    ]
    assert not found


def test_the_adapter_has_the_bytes_that_are_searched_for(tmp_path: Path) -> None:
    file = canary_adapter(tmp_path / "canary") / "adapter_model.safetensors"
    assert WEIGHT * 8 in file.read_bytes()
