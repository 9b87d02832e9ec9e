"""The engine process: `python -m loraplex_server.engine.process.main SETUP`.

SETUP is an `EngineSetup` as JSON. The socket to the front is an inherited descriptor that the
environment names. The engine lives as long as the front's end of that socket is open, and not a
moment longer.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import cast

from loraplex_model.base.process.core_dumps import forbid_core_dumps
from loraplex_model.base.process.descriptors import raise_descriptor_limit
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.adapters.attempts import Announcements
from loraplex_server.engine.adapters.loader import ThreadLoader
from loraplex_server.engine.core import EngineCore
from loraplex_server.engine.messages import (
    Fatal,
    FromEngine,
    Hello,
    Shutdown,
    Submit,
)
from loraplex_server.engine.process import wire
from loraplex_server.engine.process.handling import Handler
from loraplex_server.engine.process.inbox import Inbox
from loraplex_server.engine.process.pulse import Pulse
from loraplex_server.engine.process.setup import EngineSetup
from loraplex_server.engine.runner.config import CustomRunner, RunnerConfig
from loraplex_server.engine.runner.protocol import DeviceLost, ModelRunner
from loraplex_server.logs import configure_engine

log = logging.getLogger(__name__)

EXIT_START_FAILED = 3
EXIT_BROKEN = 4
EXIT_BAD_FRAME = 5

SWITCH_SECONDS = 5e-4
"""Longest wait of the main loop for the interpreter while a loader thread runs Python code.

The default, 5 ms, could occur several times in a step.
"""


def main() -> int:
    """Runs the engine until the front is gone; returns the exit status."""
    gc.disable()  # importing torch leaves no garbage, but looking for it takes time
    # The front decides when the engine ends: a Ctrl-C in the terminal must not cut its drain short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (argument,) = sys.argv[1:]
    setup = EngineSetup.parse(argument)
    configure_engine(os.environ.get(wire.DEVICE_VARIABLE, ""), setup.log_format)
    if not setup.core_dumps:
        forbid_core_dumps()
    # A signal such as SIGBUS, which a mapped file that is cut short causes, is reported with the
    # Python code that was running.
    faulthandler.enable()
    threading.excepthook = _on_lost_thread
    raise_descriptor_limit()
    # Adapters and caches are many megabytes with scattered access: on pages of 4 KiB every other
    # access would miss the TLB. torch reads this variable at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    front = socket.socket(fileno=int(os.environ[wire.SOCKET_VARIABLE]))
    outbox = Outbox(front)
    inbox = Inbox()
    _start_thread("front", _receive, front, inbox)
    try:
        runner = _build(setup.runner)
        attempts = Announcements(outbox.send)
        loader = ThreadLoader(runner, wake=inbox.wake, attempts=attempts)
        core = EngineCore(runner, setup.limits, loader=loader, attempts=attempts, meanwhile=inbox)
    except (Exception, DeviceLost) as error:
        if not isinstance(error, Refusal):  # the front reports refusals to the operator
            log.exception("the engine cannot start")
        outbox.send(_fatal(error))
        return EXIT_START_FAILED
    outbox.send(_hello(runner))
    pulse = Pulse()
    _start_thread("pulse", pulse.beat, outbox.send, setup.beat_seconds)
    gc.collect()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()  # the model's objects are never freed; no later collection visits them
    gc.enable()
    try:
        return serve(core, inbox, outbox, pulse)
    except DeviceLost:
        log.critical("the device is lost; this process ends and is replaced", exc_info=True)
        logging.shutdown()
        os._exit(EXIT_BROKEN)  # an orderly end would use the device
    except Exception:
        log.exception("the main loop failed; this process ends and is replaced")
        return EXIT_BROKEN


class Outbox:
    """Sends messages to the front, from any thread. Ends this process if the front is gone."""

    def __init__(self, front: socket.socket) -> None:
        self._front = front
        self._lock = threading.Lock()

    def send(self, *messages: FromEngine) -> None:
        """Sends messages, in their order and without others between them."""
        data = b"".join(wire.encode(message) for message in messages)
        try:
            with self._lock:
                self._front.sendall(data)
        except OSError:
            os._exit(0)  # the front is gone


def serve(core: EngineCore, inbox: Inbox, outbox: Outbox, pulse: Pulse) -> int:
    """The main loop: receive, step, send; waits while there is nothing to do."""
    handler = Handler(core)

    def add(message: Submit) -> None:
        handler.handle(message)
        refused = core.take_refusals()
        if refused is not None:
            outbox.send(refused)

    inbox.open_to(add)
    while True:
        pulse.turns += 1
        wait = core.wait_seconds()
        pulse.waiting = wait != 0.0
        messages = inbox.take(wait)
        pulse.waiting = False
        for message in messages:
            if isinstance(message, Shutdown):
                return 0
            answer = handler.handle(message)
            if answer is not None:
                outbox.send(answer)
        refused = core.take_refusals()
        if refused is not None:
            outbox.send(refused)
        done = core.step()
        if done:
            outbox.send(*done)
        if core.broken or handler.broken:
            log.critical("the engine fails repeatedly; this process ends and is replaced")
            return EXIT_BROKEN
        if core.idle:
            core.check()


def _receive(front: socket.socket, inbox: Inbox) -> None:
    """Reads the socket until it ends, and then ends this process, whatever it is doing."""
    frames = wire.Frames()
    status = 0
    try:
        while data := front.recv(1 << 20):
            for payload in frames.feed(data):
                inbox.put(wire.decode(payload, wire.TO_ENGINE))
    except wire.WireError as error:
        log.error("the front sent bytes that are not a message: %s", error)
        status = EXIT_BAD_FRAME
    except ConnectionResetError:
        pass  # the front ended without reading all: it says itself why
    except OSError as error:
        log.error("the socket to the front failed: %s", error)
    os._exit(status)


def _start_thread(name: str, work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, name=name, daemon=True).start()


def _on_lost_thread(lost: threading.ExceptHookArgs) -> None:
    """Ends the process when a thread does: none of them ends while the engine works."""
    name = lost.thread.name if lost.thread is not None else "unknown"
    log.critical(
        "the thread %r failed; this process ends and is replaced", name, exc_info=lost.exc_value
    )
    os._exit(EXIT_BROKEN)


def _build(config: RunnerConfig | CustomRunner) -> ModelRunner:
    if isinstance(config, RunnerConfig):
        from loraplex_server.engine.runner.local import build  # imports torch

        return cast(ModelRunner, build(config))
    module, _, function = config.factory.partition(":")
    return cast(ModelRunner, getattr(importlib.import_module(module), function)(**config.options))


def _hello(runner: ModelRunner) -> Hello:
    return Hello(
        model=runner.info,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        adapter_budget_bytes=runner.adapter_budget_bytes,
        host_budget_bytes=runner.host_budget_bytes,
        merge_budget_bytes=runner.merge_budget_bytes,
        prefix_blocks=runner.prefix_blocks,
        num_slots=runner.num_slots,
    )


def _fatal(error: BaseException) -> Fatal:
    """The refusal's own words for the operator; for any other error a pointer to the log."""
    if isinstance(error, Refusal):
        return Fatal(error.reason, error.message)
    return Fatal(Reason.ENGINE_FAULT, "the engine could not start; see its log")


if __name__ == "__main__":
    sys.exit(main())
