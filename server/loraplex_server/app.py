"""The server process: builds its parts from the settings, and runs them from start to exit."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from importlib.metadata import version
from typing import Any, Final

from loraplex_adapters.store import Store
from loraplex_model.base.process.descriptors import raise_descriptor_limit
from loraplex_model.ops import build
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from loraplex_server.access.limits.quotas import Quotas
from loraplex_server.access.principals import Principal
from loraplex_server.config import Config
from loraplex_server.declared.providing import provide_declared
from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.group.group import members
from loraplex_server.engine.messages import Hello, ModelInfo
from loraplex_server.engine.process.child import SpawnedEngine
from loraplex_server.engine.process.identity import BaseChanged
from loraplex_server.exits import ServerExit
from loraplex_server.metrics import Metrics
from loraplex_server.observing import ServerObserver
from loraplex_server.registry.quarantine import QuarantineKeeper
from loraplex_server.registry.registry import Registry
from loraplex_server.registry.signatures import Signatures
from loraplex_server.registry.texts import AdapterTexts
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.calls.interceptor import CallPath, Interceptor
from loraplex_server.rpc.server import Address, RpcServer
from loraplex_server.rpc.services.adapters import AdapterService
from loraplex_server.rpc.services.admission import Admission
from loraplex_server.rpc.services.generation import GenerationService
from loraplex_server.rpc.services.live.engine import EngineService
from loraplex_server.rpc.services.model import ModelService
from loraplex_server.rpc.services.prompts import Prompts
from loraplex_server.rpc.services.training import TrainingService
from loraplex_server.rpc.services.upload_room import UploadRoom
from loraplex_server.rpc.transport import server_tls
from loraplex_server.runtime import parts, service_manager
from loraplex_server.runtime.admin import MetricsServer
from loraplex_server.runtime.ending import CLOSE_SECONDS, unexpected_end
from loraplex_server.runtime.failures import StartFailure, needed
from loraplex_server.runtime.following import follow_principals
from loraplex_server.runtime.gateway import GatewayProcess
from loraplex_server.runtime.lanes import Lanes
from loraplex_server.runtime.loop_lag import watch_event_loop
from loraplex_server.runtime.shutdown import (
    ENGINE_SECONDS,
    EXIT_SECONDS,
    PART_SECONDS,
    TRAINING_SECONDS,
    exit_within,
    within,
)
from loraplex_server.runtime.watched import WatchedTask, while_alive
from loraplex_server.telemetry.states import watch_front
from loraplex_server.text.tokenizer import TextTokenizer
from loraplex_server.training.opening import job_queue
from loraplex_server.training.queue import JobQueue

STOP_GRACE: Final = 2.0
"""Seconds that finished calls have to reach their clients before connections are closed."""

log = logging.getLogger(__name__)


class Server:
    """The front process: `start`, then `drain`. `close` undoes a start, even an incomplete one."""

    def __init__(self, config: Config, engine: SpawnedEngine | None = None) -> None:
        """`engine` is the engine's process, if it was started already. Raises StartFailure."""
        self._config = config
        self._closing = AsyncExitStack()
        collectors = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=collectors)
        self.metrics = Metrics(collectors, version("loraplex"))
        self._gate = CallGate()
        self._directory = parts.principals_of(config)
        self._audit = parts.audit_log_of(config, self.metrics)
        self._close_later(PART_SECONDS, "the audit log does not close", self._close_audit)
        self._path = CallPath(self._gate, self.metrics, self._audit, config.write_stall_timeout)
        checks = parts.access_checks_of(config, self._directory)
        self._rpc = RpcServer(
            [Interceptor(self._path, check) for check in checks],
            self._gate,
            config.max_connections,
            config.reflection,
        )
        self._observer = ServerObserver(self.metrics, self._rpc)
        self.engine: Engine = parts.engine_of(config, self._observer, engine)
        self._pressure = parts.memory_pressure_of(config, lambda: self.engine, self.metrics.series)
        self._gate.require_memory = self._pressure.require
        self._quotas = Quotas(config.max_requests, config.max_waiting_tokens)
        self._lanes = Lanes()
        watch_front(self.metrics, self._lanes, self._gate)
        self._training: JobQueue | None = None
        self._accepting: WatchedTask | None = None
        self._gateway = GatewayProcess()
        self.addresses = parts.addresses_of(config)
        self.admin_address = Address(config.admin_host, config.admin_port)

    @property
    def address(self) -> Address:
        """Address of the services, for all callers."""
        return self.addresses[0]

    @property
    def manage_address(self) -> Address | None:
        """Address for calls that manage adapters and training jobs, if it is apart."""
        return self.addresses[1] if len(self.addresses) > 1 else None

    def __str__(self) -> str:
        """Where it listens, as the line that tells that it is ready has it."""
        manage = f" manage {self.manage_address}" if self.manage_address is not None else ""
        return f"grpc {self.address} admin {self.admin_address}{manage}{self._gateway}"

    async def start(self) -> None:
        """Starts all parts; the server is ready when it returns. Raises StartFailure.

        Steps that can fail quickly come first.
        """
        config = self._config
        self._bind()
        self._close_later(PART_SECONDS, "the gateway does not stop", self._gateway.stop)
        await self._gateway.start(config, self._rpc, self.admin_address)
        self.metrics.trace_to(config.otlp_endpoint)
        self._close_later(PART_SECONDS, "the last spans stay behind", self.metrics.tracing.close)
        if self._directory is not None:
            following = WatchedTask(self._directory.watch(self.metrics.series), "principals")
            self._closing.push_async_callback(following.stop)
        watching = asyncio.create_task(watch_event_loop(self.metrics.series), name="event loop lag")
        self._closing.callback(watching.cancel)
        store = await self._open_store()
        self._closing.push_async_callback(self._lanes.close, STOP_GRACE)
        hello = await self._start_engine()
        self._close_later(ENGINE_SECONDS, "the engine does not stop", self.engine.stop)
        model = hello.model
        context = min(
            config.max_context or model.max_context,
            model.max_context,
            hello.num_blocks * hello.block_size,
        )
        with needed(ServerExit.NO_MODEL, "cannot read"):
            tokenizer = await asyncio.to_thread(
                parts.tokenizer_of, config, model, context, self._lanes.text
            )
        limits = parts.adapter_limits_of(config, hello, context)
        texts = AdapterTexts(tokenizer.special_tokens, config.adapter_chat_templates)
        with needed(ServerExit.BAD_CONFIG, "cannot read"):
            signatures = await asyncio.to_thread(Signatures.open, config.adapter_signatures)
        shared = (config.import_root, limits, self._lanes, texts, signatures)
        registry = Registry(store, self.engine, self.metrics, *shared)
        self._closing.push_async_callback(registry.close)
        with needed(ServerExit.STORE_UNUSABLE, "cannot read the store"):
            await registry.open()
        self._observer.on_table = registry.feed.on_table
        self._keep_running(registry)
        watch = await provide_declared(config, registry, self.metrics.series)
        if watch is not None:
            following = WatchedTask(watch.run(), "adapter directory")
            self._closing.push_async_callback(following.stop)
        self._training = await self._open_training(registry)
        await self._accept_calls(model, registry, tokenizer, context)

    async def _accept_calls(
        self, model: ModelInfo, registry: Registry, tokenizer: TextTokenizer, context: int
    ) -> None:
        config = self._config
        admission = Admission(
            config.max_requests,
            config.max_waiting_tokens,
            self.metrics,
            reserved=config.reserved_requests,
        )
        prompts = Prompts(tokenizer, self._lanes.text)
        forms = parts.form_checker_of(config, model, self.metrics.series)
        self._close_later(PART_SECONDS, "the checks of structures do not end", forms.close)
        bounds = parts.bounds_of(config, model, context, tokenizer)
        generation = GenerationService(
            self.engine,
            registry,
            prompts,
            admission,
            self._quotas,
            self.metrics,
            bounds,
            config.stream_writes,
            forms,
            config.max_priority,
        )
        template_source = "model" if config.chat_template is None else "operator"
        await self._rpc.start(
            generation,
            AdapterService(registry, self._gate),
            TrainingService(self._training, self._gate, UploadRoom(registry)),
            ModelService(model, registry, prompts, admission, bounds, template_source),
            EngineService(self.engine, registry.feed, generation.in_flight, self._gate),
        )
        self._accepting = WatchedTask(self._rpc.stopped(), "acceptance of calls")
        # Stopped before engine and store are closed, because running calls use them.
        self._close_later(PART_SECONDS, "the connections do not close", self._stop_rpc)
        self._close_later(PART_SECONDS, "the gateway does not stop", self._gateway.stop)

    async def drain(self) -> None:
        """Refuses new calls and waits for running ones, which end at the drain timeout."""
        self._rpc.lame_duck()
        self._gate.close()
        # The trainer saves its checkpoint meanwhile.
        training = asyncio.create_task(self._stop_training(self._config.drain_timeout))
        try:
            await asyncio.wait_for(self._gate.drained(), self._config.drain_timeout)
        except TimeoutError:
            log.warning("drain timeout: ending the calls that still run")
            # Their streams fail with DRAINING, which the handlers report to the clients.
            await within(ENGINE_SECONDS, "the engine does not stop", self.engine.stop())
        await training

    async def close(self) -> None:
        """Stops all parts that were started. Idempotent."""
        await self._closing.aclose()

    async def _start_engine(self) -> Hello:
        """Starts the engine, one process or several. Raises StartFailure."""
        with needed(ServerExit.NO_MODEL, "cannot start the engine"):
            try:
                hello = await self.engine.start()
            except BaseChanged as error:
                raise StartFailure(ServerExit.BASE_CHANGED, str(error)) from error
        self._observer.watch(members(self.engine))
        return hello

    def _keep_running(self, registry: Registry) -> None:
        """Starts the tasks that run as long as the server."""
        store = registry.store
        keeper = QuarantineKeeper(
            partial(self._lanes.survey.run, store.quarantined),
            lambda digest, reason: registry.change(store.quarantine, digest, reason),
            self.engine,
            self.metrics,
        )
        self._observer.on_quarantine = keeper.wake
        following = follow_principals(self._principals, self._quotas, self.metrics.principals)
        for work, name in (
            (registry.census.run(), "census"),
            (keeper.run(), "quarantines"),
            (self._pressure.watch(), "memory"),
            (following, "principals"),
        ):
            self._closing.push_async_callback(WatchedTask(work, name).stop)

    def _bind(self) -> None:
        admin = self.admin_address
        with needed(ServerExit.PORT_IN_USE, f"cannot listen on {admin} for metrics"):
            metrics = MetricsServer(admin.host, admin.port, self.metrics.registry)
        stop = partial(asyncio.to_thread, metrics.stop)
        self._close_later(PART_SECONDS, "the metrics endpoint does not stop", stop)
        watch = WatchedTask(while_alive(metrics.thread), "metrics endpoint")
        self._closing.push_async_callback(watch.stop)
        self.admin_address = Address(admin.host, metrics.port)
        with needed(ServerExit.BAD_CONFIG, "cannot read"):
            tls = server_tls(self._config, self.metrics.series)
        self._close_later(PART_SECONDS, "the connections do not close", self._stop_rpc)
        for which, address in enumerate(self.addresses):
            with needed(ServerExit.PORT_IN_USE, f"cannot listen on {address}"):
                self.addresses[which] = self._rpc.bind(address, tls, which)

    async def _open_training(self, registry: Registry) -> JobQueue | None:
        """Opens the queue of training jobs; None if training is off. Raises StartFailure."""
        if not self._config.training:
            return None
        queue = job_queue(self._config, registry, self.metrics, self._principals)
        registry.data_bytes = queue.data_bytes
        with needed(ServerExit.STORE_UNUSABLE, "cannot use"):
            await queue.open()
        stop = partial(self._stop_training, STOP_GRACE)
        self._close_later(TRAINING_SECONDS, "the training does not stop", stop)
        return queue

    def _principals(self) -> Mapping[str, Principal]:
        """The principals by name; none where callers are not authenticated."""
        return {} if self._directory is None else self._directory.principals

    async def _close_audit(self) -> None:
        self._audit.finish()
        await asyncio.to_thread(self._audit.sink.close)

    async def _stop_rpc(self) -> None:
        if self._accepting is not None:
            self._accepting.release()
        await self._rpc.stop(STOP_GRACE)

    async def _stop_training(self, patience: float) -> None:
        if self._training is not None:
            stopping = self._training.stop(patience)
            await within(patience + TRAINING_SECONDS, "the training does not stop", stopping)

    def _close_later(
        self, seconds: float, complaint: str, close: Callable[[], Awaitable[None]]
    ) -> None:
        """Registers a step of `self.close`, which waits at most `seconds` for `close`."""

        async def bounded() -> None:
            await within(seconds, complaint, close())

        self._closing.push_async_callback(bounded)

    async def _open_store(self) -> Store:
        with needed(ServerExit.STORE_UNUSABLE, "cannot use"):
            store = await asyncio.to_thread(parts.store_of, self._config)
        close = partial(asyncio.to_thread, store.close)
        self._close_later(PART_SECONDS, "the store does not close", close)
        return store


async def run(config: Config, engine: SpawnedEngine | None = None) -> ServerExit:
    """Serves until SIGTERM or SIGINT, then drains. A second signal ends the process at once.

    `engine` is the process of the one engine, if it was started already.
    Also ends when the server cannot go on; the exit code gives the reason.
    """
    raise_descriptor_limit()
    try:
        with needed(ServerExit.BAD_CONFIG, "cannot read"):
            build.chosen_isa()
        return await _serve(config, engine)
    except StartFailure as failure:
        print(f"error: {failure.message}", file=sys.stderr, flush=True)
        return failure.code


async def _serve(config: Config, engine: SpawnedEngine | None) -> ServerExit:
    began = time.monotonic()
    stop = asyncio.Event()
    server: Server | None = None

    def kill_engine() -> None:
        for pid in server.engine.pids if server is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def on_signal(number: int) -> None:
        if stop.is_set():
            kill_engine()
            os._exit(128 + number)
        log.info("%s: draining", signal.Signals(number).name)
        limit = config.drain_timeout + EXIT_SECONDS
        exit_within(limit, ServerExit.OK, kill_engine)
        service_manager.stopping(limit)
        stop.set()

    loop = asyncio.get_running_loop()
    failing = unexpected_end(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    for line in config.lines():
        log.info("config: %s", line)
    server = Server(config, engine)
    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(server.start())
    ends: set[asyncio.Future[Any]] = {stopping, failing}
    try:
        await asyncio.wait({starting, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set() or failing.done():
            starting.cancel()
            await asyncio.wait({starting})
            if not starting.cancelled() and (failure := starting.exception()) is not None:
                log.warning("the start failed while it was being cancelled: %s", failure)
            return failing.result() if failing.done() else ServerExit.OK
        starting.result()
        parts.announce(server.engine, str(server), time.monotonic() - began)
        service_manager.ready()
        gc.collect()
        gc.freeze()  # imported modules are never freed, so collections need not visit them
        # Python collects fully only once new objects are a quarter of those that the last full
        # collection left. This one leaves almost none.
        gc.collect()
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not failing.done():
            await server.drain()
        return failing.result() if failing.done() else ServerExit.OK
    finally:
        stopping.cancel()
        if failing.done():
            exit_within(CLOSE_SECONDS, failing.result(), kill_engine)
        await server.close()
        log.info("stopped")
