"""A server for client tests: its services and health, in threads, doing what a test scripts.

A completion of prompt p with adapter a is the words "<a or base> says p", one word a delta. What
clients sent is in `calls`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from loraplex.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

WAIT_S = 30.0  # how long a held call waits at most: reached only when a test fails
DIGEST = "sha256:" + "ab" * 32


@dataclass(frozen=True)
class Call:
    method: str
    request: Any
    metadata: dict[str, Any]
    time_remaining: float | None


@dataclass(frozen=True)
class Failure:
    """A status to answer with; `details` are messages of google.rpc, `trailers` extra metadata."""

    code: grpc.StatusCode
    message: str = "scripted"
    details: tuple[Any, ...] = ()
    trailers: tuple[tuple[str, Any], ...] = ()

    def abort(self, context: grpc.ServicerContext) -> None:
        if not self.details:
            context.set_trailing_metadata(self.trailers)
            context.abort(self.code, self.message)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        rich = rpc_status.to_status(status)
        trailers = (*rich.trailing_metadata, *self.trailers)
        context.abort_with_status(rich._replace(trailing_metadata=trailers))


def failure(code: grpc.StatusCode, reason: str, *details: Any, **metadata: str) -> Failure:
    """A rich failure, as the server makes them: always an ErrorInfo, then `details`."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="loraplex", metadata=metadata)
    return Failure(code, f"this is {reason}", (info, *details))


def logprobs(token: int) -> generation_pb2.TokenLogprobs:
    text = f"<{token}>"
    entry = generation_pb2.TokenLogprob(
        token_id=token, logprob=-0.5, text=text, raw=text.encode() + b"\xff"
    )
    return generation_pb2.TokenLogprobs(chosen=entry, top=[entry, entry])


@dataclass
class FakeServer(
    generation_pb2_grpc.GenerationServiceServicer,
    adapter_pb2_grpc.AdapterServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    health_pb2_grpc.HealthServicer,
):
    failures: list[Failure] = field(default_factory=list)  # each answers one call, first come
    hold_after: int | None = None  # after so many deltas a completion waits to be cancelled
    break_after: int | None = None  # after so many deltas a stream becomes UNAVAILABLE
    omit_finished: bool = False
    matched_stop: generation_pb2.MatchedStop | None = None
    model: model_pb2.Model = field(default_factory=model_pb2.Model)
    serving: int = health_pb2.HealthCheckResponse.SERVING
    adapters: dict[str, adapter_pb2.Adapter] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    uploads: dict[str, dict[int, bytearray]] = field(default_factory=dict)
    received: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # name -> both files
    break_uploads: list[Failure] = field(default_factory=list)  # each ends a stream after 2 pieces
    lose_reply: bool = False  # the next whole upload is taken, and its reply lost
    judgement: adapter_pb2.ValidateAdapterResponse = field(
        default_factory=adapter_pb2.ValidateAdapterResponse
    )
    news: list[adapter_pb2.WatchAdaptersResponse] = field(default_factory=list)
    holding: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(
        default_factory=threading.Event
    )  # a call that was to be held is over
    target: str = ""

    def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self._server = grpc.server(ThreadPoolExecutor(8))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self, self._server)
        if credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.target = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def methods(self) -> list[str]:
        return [call.method for call in self.calls]

    # GenerationService

    def Generate(self, request, context):
        self._enter("Generate", request, context)
        words = self._words(request)
        if self.hold_after is not None:
            self._hold(context)
        return generation_pb2.GenerateResponse(
            request_id=self._request_id(request),
            adapters=self._resolve(request),
            text="".join(words),
            token_ids=range(len(words)),
            finish_reason=generation_pb2.FINISH_REASON_STOP,
            usage=self._usage(request, words),
            logprobs=[logprobs(i) for i in range(len(words))],
            prompt_logprobs=[logprobs(7)],
            matched_stop=self.matched_stop,
            alternatives=[
                generation_pb2.Alternative(
                    text=f"{i}" + "".join(words),
                    token_ids=[i, *range(len(words))],
                    finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                    usage=self._usage(request, ["", *words]),
                    logprobs=[logprobs(j) for j in (i, *range(len(words)))],
                    matched_stop=self.matched_stop,
                )
                for i in range(1, request.n)
            ],
            prompt_token_ids=[4, 5] if request.return_prompt_token_ids else [],
        )

    def GenerateStream(self, request, context) -> Iterator[Any]:
        self._enter("GenerateStream", request.request, context)
        request = request.request
        event = generation_pb2.GenerateStreamResponse
        yield event(
            started=generation_pb2.GenerationStarted(
                request_id=self._request_id(request),
                adapters=self._resolve(request),
                prompt_tokens=3,
                prompt_logprobs=[logprobs(7)],
                prompt_token_ids=[4, 5] if request.return_prompt_token_ids else [],
            )
        )
        words = self._words(request)
        for i in range(1, request.n):
            delta = generation_pb2.GenerationDelta(
                text=f"{i}", token_ids=[i], logprobs=[logprobs(i)], index=i
            )
            yield event(delta=delta)
        for index, word in enumerate(words):
            if index == self.hold_after:
                self._hold(context)
                return
            if index == self.break_after:
                Failure(grpc.StatusCode.UNAVAILABLE, "broken off").abort(context)
            yield event(
                delta=generation_pb2.GenerationDelta(
                    text=word, token_ids=[index], logprobs=[logprobs(index)]
                )
            )
            for i in range(1, request.n):
                delta = generation_pb2.GenerationDelta(
                    text=word, token_ids=[index], logprobs=[logprobs(index)], index=i
                )
                yield event(delta=delta)
        for i in range(1, request.n):
            yield event(
                finished=generation_pb2.GenerationFinished(
                    finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                    usage=self._usage(request, ["", *words]),
                    matched_stop=self.matched_stop,
                    index=i,
                )
            )
        if not self.omit_finished:
            yield event(
                finished=generation_pb2.GenerationFinished(
                    finish_reason=generation_pb2.FINISH_REASON_STOP,
                    usage=self._usage(request, words),
                    matched_stop=self.matched_stop,
                )
            )

    # ModelService

    def GetModel(self, request, context):
        self._enter("GetModel", request, context)
        return model_pb2.GetModelResponse(model=self.model)

    def RenderChat(self, request, context):
        self._enter("RenderChat", request, context)
        text = "".join(f"<{m.role}>{m.content}" for m in request.messages.messages)
        return model_pb2.RenderChatResponse(text=text, token_ids=[1, 2])

    def Tokenize(self, request, context):
        self._enter("Tokenize", request, context)
        data = request.text.encode()
        return model_pb2.TokenizeResponse(
            token_ids=[*([] if request.no_special_tokens else [1]), *data],
            pieces=[bytes([each]) for each in data] if request.with_pieces else [],
        )

    def Detokenize(self, request, context):
        self._enter("Detokenize", request, context)
        data = bytes(token for token in request.token_ids if token > 1)
        start = "" if request.skip_special_tokens else "<s>" * list(request.token_ids).count(1)
        return model_pb2.DetokenizeResponse(
            text=start + data.decode(errors="replace"),
            pieces=[bytes([each]) for each in request.token_ids] if request.with_pieces else [],
        )

    def _words(self, request) -> list[str]:
        last = request.messages.messages[-1].content if request.HasField("messages") else ""
        names = [request.adapter_id, *(term.adapter_id for term in request.mix)]
        who = "+".join(name for name in names if name) or "base"
        return [who, " says", *(f" {word}" for word in (request.prompt or last).split())]

    def _resolve(self, request) -> list[generation_pb2.ResolvedAdapter]:
        terms = [(term.adapter_id, term.weight) for term in request.mix]
        if request.adapter_id:
            terms.append((request.adapter_id, 1.0))
        return [
            generation_pb2.ResolvedAdapter(name=name, version=1, digest=DIGEST, weight=weight)
            for name, weight in terms
        ]

    def _request_id(self, request) -> str:
        return request.request_id or "made-by-server"

    def _usage(self, request, words) -> generation_pb2.Usage:
        return generation_pb2.Usage(prompt_tokens=3, completion_tokens=len(words))

    # AdapterService

    def RegisterAdapter(self, request, context):
        self._enter("RegisterAdapter", request, context)
        created = request.name not in self.adapters or request.replace
        if created:
            old = self.adapters.get(request.name)
            self.adapters[request.name] = adapter_pb2.Adapter(
                name=request.name,
                version=old.version + 1 if old else 1,
                digest=DIGEST,
                peft_type="LORA",
                rank=8,
                target_modules=["q_proj", "v_proj"],
                size_bytes=3 << 20,
                state=adapter_pb2.ADAPTER_STATE_STORED,
                create_time=timestamp_pb2.Timestamp(seconds=1_700_000_000),
                base_model="tiny",
            )
        if request.load:
            self._move(request.name, adapter_pb2.ADAPTER_STATE_RESIDENT)
        return adapter_pb2.RegisterAdapterResponse(
            adapter=self.adapters[request.name], created=created
        )

    def GetAdapter(self, request, context):
        self._enter("GetAdapter", request, context)
        return adapter_pb2.GetAdapterResponse(adapter=self._find(request.adapter_id, context))

    def ListAdapters(self, request, context):
        self._enter("ListAdapters", request, context)
        names = sorted(name for name in self.adapters if name > request.page_token)
        page = names[: request.page_size or 100]
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self.adapters[name] for name in page],
            next_page_token=page[-1] if len(page) < len(names) else "",
        )

    def LoadAdapter(self, request, context):
        self._enter("LoadAdapter", request, context)
        self._find(request.adapter_id, context)
        self._move(request.adapter_id, adapter_pb2.ADAPTER_STATE_RESIDENT)
        return adapter_pb2.LoadAdapterResponse(adapter=self.adapters[request.adapter_id])

    def UnloadAdapter(self, request, context):
        self._enter("UnloadAdapter", request, context)
        self._find(request.adapter_id, context)
        self._move(request.adapter_id, adapter_pb2.ADAPTER_STATE_STORED)
        return adapter_pb2.UnloadAdapterResponse(adapter=self.adapters[request.adapter_id])

    def DeleteAdapter(self, request, context):
        self._enter("DeleteAdapter", request, context)
        self._find(request.name, context)
        del self.adapters[request.name]
        return adapter_pb2.DeleteAdapterResponse()

    def ListAdapterVersions(self, request, context):
        self._enter("ListAdapterVersions", request, context)
        newest = self._find(request.name, context)
        versions = []
        for version in range(newest.version, 0, -1):
            versions.append(adapter_pb2.Adapter())
            versions[-1].CopyFrom(newest)
            versions[-1].version = version
        return adapter_pb2.ListAdapterVersionsResponse(adapters=versions)

    def LabelAdapter(self, request, context):
        self._enter("LabelAdapter", request, context)
        found = self._find(request.adapter_id, context)
        found.labels.update(request.set)
        for key in request.remove:
            found.labels.pop(key, None)
        return adapter_pb2.LabelAdapterResponse(adapter=found)

    def SetAlias(self, request, context):
        self._enter("SetAlias", request, context)
        found = self._find(request.adapter_id, context)
        found.aliases.append(request.alias)
        return adapter_pb2.SetAliasResponse(adapter=found)

    def DeleteAlias(self, request, context):
        self._enter("DeleteAlias", request, context)
        return adapter_pb2.DeleteAliasResponse()

    def RestoreAdapter(self, request, context):
        self._enter("RestoreAdapter", request, context)
        return adapter_pb2.RestoreAdapterResponse(adapter=self._find(request.name, context))

    def PinAdapter(self, request, context):
        self._enter("PinAdapter", request, context)
        self._find(request.adapter_id, context).pinned = True
        self._move(request.adapter_id, adapter_pb2.ADAPTER_STATE_RESIDENT)
        return adapter_pb2.PinAdapterResponse(adapter=self.adapters[request.adapter_id])

    def UnpinAdapter(self, request, context):
        self._enter("UnpinAdapter", request, context)
        self._find(request.adapter_id, context).pinned = False
        return adapter_pb2.UnpinAdapterResponse(adapter=self.adapters[request.adapter_id])

    def MergeAdapter(self, request, context):
        self._enter("MergeAdapter", request, context)
        self._find(request.adapter_id, context).merged_bytes = 5
        self._move(request.adapter_id, adapter_pb2.ADAPTER_STATE_RESIDENT)
        return adapter_pb2.MergeAdapterResponse(adapter=self.adapters[request.adapter_id])

    def UnmergeAdapter(self, request, context):
        self._enter("UnmergeAdapter", request, context)
        self._find(request.adapter_id, context).merged_bytes = 0
        return adapter_pb2.UnmergeAdapterResponse(adapter=self.adapters[request.adapter_id])

    def ValidateAdapter(self, request, context):
        self._enter("ValidateAdapter", request, context)
        return self.judgement

    def WatchAdapters(self, request, context):
        self._enter("WatchAdapters", request, context)
        yield from self.news
        if self.hold_after is not None:
            self._hold(context)

    # Uploads: what was sent is in `uploads`, file by file

    def StartUpload(self, request, context):
        self._enter("StartUpload", request, context)
        upload_id = f"upload{len(self.uploads)}"
        self.uploads[upload_id] = {1: bytearray(), 2: bytearray()}
        return adapter_pb2.StartUploadResponse(upload_id=upload_id)

    def GetUpload(self, request, context):
        self._enter("GetUpload", request, context)
        files = self._open(request.upload_id, context)
        return adapter_pb2.GetUploadResponse(
            config_bytes=len(files[1]), weights_bytes=len(files[2])
        )

    def ListUploads(self, request, context):
        self._enter("ListUploads", request, context)
        return adapter_pb2.ListUploadsResponse(
            uploads=[
                adapter_pb2.OpenUpload(
                    upload_id=upload_id,
                    config_bytes=len(files[1]),
                    weights_bytes=len(files[2]),
                    peer="10.0.0.7",
                    change_time={"seconds": 1_900_000_000},
                    expire_time={"seconds": 1_900_086_400},
                )
                for upload_id, files in self.uploads.items()
            ]
        )

    def AbortUpload(self, request, context):
        self._enter("AbortUpload", request, context)
        self._open(request.upload_id, context)
        del self.uploads[request.upload_id]
        return adapter_pb2.AbortUploadResponse()

    def UploadAdapter(self, requests, context):
        header = next(requests).header
        self._enter("UploadAdapter", header, context)
        files = self._open(header.upload_id, context)
        for number, request in enumerate(requests, 1):
            chunk = request.chunk
            if len(files[chunk.file]) != chunk.offset:
                code = grpc.StatusCode.FAILED_PRECONDITION
                failure(code, "UPLOAD_OFFSET").abort(context)
            files[chunk.file] += chunk.data
            if self.break_uploads and number >= 2:
                self.break_uploads.pop(0).abort(context)
        if (len(files[1]), len(files[2])) != (header.config_size, header.weights_size):
            failure(grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_OFFSET").abort(context)
        if header.stage_only:
            return adapter_pb2.UploadAdapterResponse()
        self.received[header.name] = bytes(files[1]), bytes(files[2])
        del self.uploads[header.upload_id]
        self.adapters[header.name] = adapter_pb2.Adapter(
            name=header.name, version=1, digest=header.expected_digest, labels=header.labels
        )
        if self.lose_reply:
            self.lose_reply = False
            Failure(grpc.StatusCode.UNAVAILABLE, "lost").abort(context)
        return adapter_pb2.UploadAdapterResponse(adapter=self.adapters[header.name], created=True)

    def _open(self, upload_id, context):
        if upload_id not in self.uploads:
            resource = error_details_pb2.ResourceInfo(resource_name=upload_id)
            failure(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", resource).abort(context)
        return self.uploads[upload_id]

    def _find(self, name, context) -> adapter_pb2.Adapter:
        if name not in self.adapters:
            resource = error_details_pb2.ResourceInfo(resource_name=name)
            code = grpc.StatusCode.NOT_FOUND
            failure(code, "ADAPTER_NOT_FOUND", resource, adapter=name).abort(context)
        return self.adapters[name]

    def _move(self, name, state) -> None:
        self.adapters[name].state = state
        resident = state == adapter_pb2.ADAPTER_STATE_RESIDENT
        self.adapters[name].device_bytes = 2 << 20 if resident else 0

    # Health

    def Check(self, request, context):
        self._enter("Check", request, context)
        return health_pb2.HealthCheckResponse(status=self.serving)

    # Common

    def _enter(self, method, request, context) -> None:
        metadata = {pair.key: pair.value for pair in context.invocation_metadata()}
        self.calls.append(Call(method, request, metadata, context.time_remaining()))
        if self.hold_after is not None:
            context.add_callback(self.ended.set)
        if self.failures:
            self.failures.pop(0).abort(context)

    def _hold(self, context) -> None:
        """Wait until the client ends the call."""
        over = threading.Event()
        if context.add_callback(over.set):
            self.holding.set()
            over.wait(WAIT_S)
