"""What the server does about the events of its engine: metrics, health, the feed of adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from loraplex_server.device_series import DeviceSeries
from loraplex_server.engine.group.face import EngineMember
from loraplex_server.engine.messages import AdapterStatus, Fatal, Hello, StepReport
from loraplex_server.engine.process.supervisor import Cause
from loraplex_server.engine.process.suspects import LossReport
from loraplex_server.metrics import Metrics
from loraplex_server.rpc.server import RpcServer

log = logging.getLogger(__name__)


class ServerObserver:
    """Observer of one engine or of several.

    Updates the metrics and the health status, and passes each table of adapters to `on_table`.
    """

    def __init__(self, metrics: Metrics, rpc: RpcServer) -> None:
        self.on_table: Callable[[Sequence[AdapterStatus]], None] = lambda table: None
        self.on_quarantine: Callable[[], None] = lambda: None
        self.devices = DeviceSeries(metrics.series)
        self.on_load = metrics.on_load
        self.on_merge = metrics.on_merge
        self._metrics = metrics
        self._rpc = rpc

    def watch(self, members: Sequence[EngineMember]) -> None:
        """Shows the state of each of these engines from now on."""
        self.devices.watch(members)
        self._metrics.residency.watch(members)

    def on_step(self, done: StepReport) -> None:
        self._metrics.on_step(done)
        if done.adapters is not None:
            self.on_table(done.adapters)

    def on_restart(self) -> None:
        self._metrics.on_restart()
        self.devices.count_restarts()
        self.on_table([])
        self._rpc.set_serving(False)

    def on_partial_loss(self, report: StepReport) -> None:
        self._metrics.on_partial_loss()
        self.devices.count_restarts()
        self.on_step(report)

    def on_death(self, cause: Cause, report: LossReport) -> None:
        self._metrics.on_death(cause.value)
        if report.quarantined:
            self.on_quarantine()

    def on_ready(self, hello: Hello) -> None:
        self._metrics.on_ready(hello)
        self._rpc.set_serving(True)

    def on_fatal(self, fatal: Fatal) -> None:
        log.error("the engine does not start: %s", fatal.message, extra={"reason": fatal.reason})
