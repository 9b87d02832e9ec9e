"""Chat templates and end tokens that adapters bring, over the API."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from loraplex.v1 import adapter_pb2, generation_pb2, model_pb2, model_pb2_grpc
from loraplex_model.checkpoints.chat import ChatTemplate
from rpc.harness import SCRIPT, VOCAB, WIDTH, Running, ask, refusal, running, write_adapter
from safetensors.numpy import load_file, save_file

OWN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
OTHER = "{% for m in messages %}({{ m.content }}){% endfor %}"
ALLOWED = {"adapter_chat_templates": True}


async def rendered(up: Running, adapter_id: str) -> str:
    """The text of a conversation for an adapter."""
    request = model_pb2.RenderChatRequest(adapter_id=adapter_id)
    request.messages.messages.add(role="user", content="hi")
    reply = await model_pb2_grpc.ModelServiceStub(up.channel).RenderChat(request)
    return str(reply.text)


async def test_conversations_are_rendered_with_the_adapters_template(tmp_path: Path) -> None:
    async with running(tmp_path, **ALLOWED) as up:
        adapter = await up.register("own", chat_template=OWN)
        assert len(adapter.chat_template_sha256) == 64
        assert not (await up.register("plain")).chat_template_sha256
        assert await rendered(up, "own") == "[hi]"
        assert await rendered(up, "plain") == await rendered(up, "") == "<user>hi<assistant>"
        request = ask(new=1)
        request.messages.messages.add(role="user", content="hi")
        counts = {}
        for name in ("own", "plain"):
            request.adapter_id = name
            counts[name] = (await up.generation.Generate(request)).usage.prompt_tokens
        assert counts["own"] < counts["plain"]
        replaced = await up.register("own", chat_template=OTHER, replace=True)
        assert replaced.version == 2
        assert await rendered(up, "own") == "(hi)"
        assert await rendered(up, "own@1") == "[hi]"


async def test_adapters_templates_never_run_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, list[str]] = {"compile": [], "render": []}
    compile_it, render = ChatTemplate.__init__, ChatTemplate.render

    def compiling(self: ChatTemplate, source: str, *args: Any, **kwargs: Any) -> None:
        if source == OWN:
            threads["compile"].append(threading.current_thread().name)
        compile_it(self, source, *args, **kwargs)

    def rendering(self: ChatTemplate, *args: Any) -> str:
        if self.source == OWN:
            threads["render"].append(threading.current_thread().name)
        return render(self, *args)

    monkeypatch.setattr(ChatTemplate, "__init__", compiling)
    monkeypatch.setattr(ChatTemplate, "render", rendering)
    async with running(tmp_path, **ALLOWED) as up:
        await up.register("own", chat_template=OWN)
        assert await rendered(up, "own") == "[hi]"
        request = ask(new=1)
        request.adapter_id = "own"
        request.messages.messages.add(role="user", content="hi")
        await up.generation.Generate(request)
    loop = threading.current_thread().name
    assert len(threads["compile"]) >= 2
    assert len(threads["render"]) == 2
    assert loop not in {*threads["compile"], *threads["render"]}


async def test_templates_are_refused_unless_the_operator_allows_them(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.register("own", chat_template=OWN)
        assert refusal(caught.value).reason == "FIELD_INVALID"
        assert "--adapter-chat-templates" in refusal(caught.value).message
        assert not (await up.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())).adapters


async def test_template_that_is_not_allowed_any_more_is_not_run(tmp_path: Path) -> None:
    async with running(tmp_path, **ALLOWED) as up:
        await up.register("own", chat_template=OWN)
    async with running(tmp_path) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rendered(up, "own")
        assert refusal(caught.value).reason == "ADAPTER_UNSUPPORTED"
        request = ask(20, 21, new=2)
        request.adapter_id = "own"
        assert len((await up.generation.Generate(request)).token_ids) == 2


async def test_template_that_does_not_compile_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, **ALLOWED) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.register("own", chat_template="{% for m in %}")
        assert refusal(caught.value).reason == "FIELD_INVALID"
        assert "does not compile" in refusal(caught.value).message


async def test_template_that_never_ends_is_refused_at_registration(tmp_path: Path) -> None:
    async with running(tmp_path, **ALLOWED) as up:
        loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.register("own", chat_template=loop)
        assert refusal(caught.value).reason == "FIELD_INVALID"
        assert "too much work" in refusal(caught.value).message


async def test_adapters_end_tokens_take_the_place_of_the_models(tmp_path: Path) -> None:
    async with running(tmp_path, script=[30, 31, 32, 33]) as up:
        adapter = await up.register("ends", eos_token_ids=[32, 32])
        assert list(adapter.eos_token_ids) == [32]
        await up.register("plain")

        async def answer(**changes: Any) -> generation_pb2.GenerateResponse:
            request = ask(SCRIPT, new=4)
            for field, value in changes.items():
                if field == "adapter_id":
                    request.adapter_id = value
                elif field == "ignore_eos":
                    request.stop.ignore_eos = value
                else:
                    for name in value:
                        request.mix.add(adapter_id=name)
            return await up.generation.Generate(request)

        ended = await answer(adapter_id="ends")
        assert list(ended.token_ids) == [30, 31]
        assert ended.finish_reason == generation_pb2.FINISH_REASON_STOP
        assert ended.matched_stop.token_id == 32
        for changes in (
            {"adapter_id": "plain"},
            {"adapter_id": "ends", "ignore_eos": True},
            {"mix": ["ends", "plain"]},
        ):
            assert len((await answer(**changes)).token_ids) == 4, changes


async def test_end_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.register("ends", eos_token_ids=[VOCAB])
        assert refusal(caught.value).reason == "FIELD_INVALID"


async def test_files_that_are_not_used_are_noted(tmp_path: Path) -> None:
    async with running(tmp_path, **ALLOWED) as up:
        folder = write_adapter(tmp_path / "import" / "x")
        for name in ("chat_template.jinja", "tokenizer.json", "README.md"):
            (folder / name).write_text("")
        register = adapter_pb2.RegisterAdapterRequest(name="a", path="x")
        notes = list((await up.adapters.RegisterAdapter(register)).notes)
        assert len(notes) == 2
        assert "chat_template.jinja is not used" in notes[0]
        assert "tokenizer.json is not used" in notes[1]
        validate = adapter_pb2.ValidateAdapterRequest(path="x")
        assert list((await up.adapters.ValidateAdapter(validate)).notes) == notes
        register.name, register.chat_template = "b", OWN
        assert list((await up.adapters.RegisterAdapter(register)).notes) == notes[1:]


async def test_notes_of_a_registration_do_not_wait_for_validations(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        folder = write_adapter(tmp_path / "import" / "x")
        (folder / "tokenizer.json").write_text("")
        register = adapter_pb2.RegisterAdapterRequest(name="a", path="x")
        leave = threading.Event()
        busy = asyncio.create_task(up.server._lanes.validations.run(leave.wait))
        try:
            assert len((await up.adapters.RegisterAdapter(register, timeout=20)).notes) == 1
        finally:
            leave.set()
            await busy


async def test_copies_of_the_base_in_an_adapter_are_noted(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        folder = write_adapter(tmp_path / "import" / "x")
        file, name = folder / "adapter_model.safetensors", "base_model.model.model.norm.weight"
        save_file({**load_file(file), name: np.full(WIDTH, 1.5, np.float32)}, file)
        register = adapter_pb2.RegisterAdapterRequest(name="a", path="x")
        for _ in range(2):  # the second time the version is there already
            (note,) = (await up.adapters.RegisterAdapter(register)).notes
            assert name in note
            assert "replaces" in note
        validate = adapter_pb2.ValidateAdapterRequest(path="x")
        assert list((await up.adapters.ValidateAdapter(validate)).notes) == [note]
