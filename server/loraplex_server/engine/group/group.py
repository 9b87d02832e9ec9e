"""Several engines behind the interface of one: routes requests, sends orders where needed.

Each engine has a process, a supervisor, a socket and a restoration of its own. They share the
evidence about adapters and requests that end processes. If an engine is lost, only its own requests
fail; the others continue, and get the requests that would have been sent to it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.group.devices import EnginePlacement
from loraplex_server.engine.group.face import Engine, EngineMember, GroupObserver
from loraplex_server.engine.group.joining import (
    JoinedStats,
    join_hellos,
    join_tables,
    join_views,
)
from loraplex_server.engine.group.routing import Routes, with_room
from loraplex_server.engine.messages import (
    AdapterRef,
    AdapterStatus,
    Fatal,
    Hello,
    LoadDone,
    MergeDone,
    StepReport,
    Submit,
)
from loraplex_server.engine.process.client import EngineClient
from loraplex_server.engine.process.identity import BaseChanged, differences
from loraplex_server.engine.process.limits import SupervisionLimits
from loraplex_server.engine.process.stream import OutputStream
from loraplex_server.engine.process.supervisor import Cause
from loraplex_server.engine.process.suspects import Evidence, LossReport
from loraplex_server.engine.statistics import BatchView

OWN_FIELDS = ("model.device", "model.kernels")
"""Fields of the first message in which the engines of one server may differ."""

log = logging.getLogger(__name__)


class EngineGroup:
    """An engine process for each placement, and their replacements. See `Engine` for the methods.

    Attributes:
        members: the engines and the names of their devices.
        adapters: the joined table of adapters by digest.
        quarantined: adapters by digest that are given to no engine, each with the reason.
    """

    def __init__(
        self,
        engines: Sequence[tuple[EnginePlacement, Sequence[str]]],
        observer: GroupObserver,
        limits: SupervisionLimits | None = None,
    ) -> None:
        """`engines` has the device and the command of each engine process."""
        self._observer = observer
        self._placements = [placement for placement, _ in engines]
        self._evidence = Evidence()
        self._routes = Routes(len(engines))
        self._stats = JoinedStats(len(engines))
        self._environments: list[dict[str, str]] = [{} for _ in engines]
        self._is_started = False
        self.adapters: dict[str, AdapterStatus] = {}
        self.quarantined = self._evidence.quarantined
        self.members = [
            EngineMember(
                placement.name,
                EngineClient(
                    command,
                    _MemberEvents(self, observer, number),
                    limits=limits,
                    environment=self._environments[number],
                    evidence=self._evidence,
                    is_last=self._all_given_up,
                ),
            )
            for number, (placement, command) in enumerate(engines)
        ]

    @property
    def hello(self) -> Hello:
        """First message of the first engine; that of each other engine says the same."""
        return self.members[0].client.hello

    @property
    def ready(self) -> bool:
        """Whether an engine accepts requests now."""
        return any(member.client.ready for member in self.members)

    @property
    def pids(self) -> list[int]:
        """Process ids of the engine processes."""
        return [pid for member in self.members for pid in member.client.pids]

    # requests

    def submit(self, message: Submit) -> OutputStream:
        """Sends a request to an engine. Every failure arrives as an output.

        The caller ends each request with `abort`, even one that has finished.
        """
        engine = self._evidence.confined_to(message)
        if engine is None or self.members[engine].client.has_given_up:
            tokens = len(message.token_ids) + max(1, message.max_new_tokens)
            engine = self._choose([ref.digest for ref in message.adapters], tokens)
        self._routes.add(message, engine)
        return self.members[engine].client.submit(message)

    def abort(self, request_id: int) -> None:
        """Ends a request; its stream receives nothing more. Unknown ids are ignored."""
        engine = self._routes.end(request_id)
        if engine is not None:
            self.members[engine].client.abort(request_id)

    def _choose(self, digests: Sequence[str], tokens: int = 0) -> int:
        """The engine for these adapters and tokens; the first, which refuses, if none is up."""
        up = self._up()
        if not up:
            return 0
        up = with_room(tokens, up, {n: self.members[n].client.hello for n in up})
        tables = [member.client.adapters for member in self.members]
        return self._routes.choose(dict.fromkeys(digests).keys(), up, tables)

    def _up(self) -> Sequence[int]:
        return [number for number, member in enumerate(self.members) if member.client.ready]

    # orders

    async def load(self, ref: AdapterRef) -> None:
        """Makes an adapter resident on the device to which a request for it would go."""
        engine = self._choose([ref.digest])
        with self._routes.loading(engine, ref.digest):
            await self.members[engine].client.load(ref)

    async def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Pins an adapter on one device, the one that has it pinned or as `load`, or unpins it."""
        if not pinned:
            await self._everywhere(
                lambda client: client.pin(ref, False),
                lambda client: client.forget(ref.digest, only_pin=True),
            )
            return
        held = self._where(ref.digest, lambda status: status.pinned)
        engine = held[0] if held else self._choose([ref.digest])
        with self._routes.loading(engine, ref.digest):
            await self.members[engine].client.pin(ref, True)

    async def merge(self, ref: AdapterRef) -> None:
        """Merges an adapter on each device where it is resident; if on none, where `load` loads it.

        If it fails on one device, it may be merged on others.
        """
        engines = self._where(ref.digest, lambda status: status.state == "resident")
        engines = engines or [self._choose([ref.digest])]
        clients = [self.members[engine].client for engine in engines]
        done = await asyncio.gather(
            *(client.merge(ref) for client in clients), return_exceptions=True
        )
        _raise_first(done)

    async def unload(self, digest: str, force: bool = False, deadline: float | None = None) -> None:
        """Removes an adapter from every device; returns when it is gone from all."""
        await self._everywhere(
            lambda client: client.unload(digest, force, deadline),
            lambda client: client.forget(digest),
        )

    async def unmerge(self, digest: str) -> None:
        """Drops an adapter's dense copies on every device."""
        # Without an engine that is up this drops the order to merge again in the next ones.
        await self._everywhere(lambda client: client.unmerge(digest), lambda client: None)

    def release(self, digest: str) -> None:
        """Allows a quarantined adapter again, and drops what was counted against it."""
        self.members[0].client.release(digest)

    def _where(self, digest: str, holds: Callable[[AdapterStatus], bool]) -> list[int]:
        """The engines that are up and whose status of an adapter fulfils `holds`."""
        found = []
        for engine in self._up():
            status = self.members[engine].client.adapters.get(digest)
            if status is not None and holds(status):
                found.append(engine)
        return found

    async def _everywhere(
        self,
        order: Callable[[EngineClient], Awaitable[None]],
        forget: Callable[[EngineClient], None],
    ) -> None:
        """Gives an order to all engines and waits for their answers. Raises the first refusal.

        A lost engine holds nothing any more: `forget` makes its next process restore nothing, and
        the order counts as done for it, unless no engine is up.
        """
        is_up = self.ready

        async def one(client: EngineClient) -> None:
            try:
                await order(client)
            except Refusal as refusal:
                if not is_up or refusal.reason is not Reason.ENGINE_RESTARTED:
                    raise
                forget(client)

        clients = [member.client for member in self.members]
        _raise_first(await asyncio.gather(*map(one, clients), return_exceptions=True))

    async def look(self) -> BatchView:
        """The batches of the engines that are up, as one. Raises `Refusal` if none answers."""
        clients = [self.members[engine].client for engine in self._up() or [0]]
        looks = (client.look() for client in clients)
        found = await asyncio.gather(*looks, return_exceptions=True)
        views = [each for each in found if isinstance(each, BatchView)]
        if not views:
            _raise_first([each for each in found if isinstance(each, BaseException)])
        return join_views(views)

    # the processes

    async def start(self) -> Hello:
        """Starts the first engine, and then all others at once.

        So a base that must be converted, or kernels that must be compiled, are made only once.
        Raises `Refusal`, which names the device, and `BaseChanged` if the engines differ.
        """
        for placement, environment in zip(self._placements, self._environments, strict=True):
            environment.update(placement.environment(os.environ))
        first, *others = self.members
        try:
            await _start(first)
            async with asyncio.TaskGroup() as starts:
                for member in others:
                    starts.create_task(_start(member))
            for member in others:
                self._require_same(member)
        except BaseException as error:
            await self.stop()
            # Of several starts that failed, the first one explains enough.
            raise (
                error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
            ) from None
        self._is_started = True
        if self.ready:
            self._announce_ready()
        return self.hello

    async def stop(self) -> None:
        """Ends the engines and does not replace them. Open streams end with DRAINING."""
        await asyncio.gather(*(member.client.stop() for member in self.members))

    def _require_same(self, member: EngineMember) -> None:
        found = [
            text
            for text in differences(self.hello, member.client.hello)
            if not text.startswith(tuple(f"{name}:" for name in OWN_FIELDS))
        ]
        if found:
            first = self.members[0].device
            raise BaseChanged(
                f"the engines serve different bases ({first}, now {member.device}): "
                + "; ".join(found)
            )

    def _all_given_up(self) -> bool:
        """Whether no engine is up or may come back."""
        return all(member.client.has_given_up for member in self.members)

    # events of the engines

    def _on_step(self, engine: int, done: StepReport) -> None:
        """A step of an engine has ended."""
        for output in done.outputs:
            if output.started:
                self._routes.begin(output.id)
        table = None
        if done.adapters is not None:
            table = self._join_tables()
        stats = self._stats.join(engine, done.stats)
        self._observer.on_step(StepReport(done.outputs, stats, table))

    def _on_ready(self, engine: int) -> None:
        """An engine is up, for the first time or again."""
        member = self.members[engine]
        self._stats.on_ready(engine, member.client.hello)
        if not self._is_started:
            return
        log.info("the engine on %s is up again", member.device)
        if len(self._up()) == 1:
            self._announce_ready()
        else:
            self._observer.on_step(self._report())

    def _on_lost(self, engine: int) -> None:
        """An engine is away, and its requests have failed."""
        self._routes.lost(engine)
        self._stats.on_lost(engine)
        up = len(self._up())
        log.error(
            "the engine on %s was lost; %d of %d engines are up",
            *(self.members[engine].device, up, len(self.members)),
        )
        if up:
            self._observer.on_partial_loss(self._report())
        else:
            self._stats.restart()
            self._join_tables()
            self._observer.on_restart()

    def _announce_ready(self) -> None:
        self._observer.on_ready(join_hellos([member.client.hello for member in self.members]))
        self._observer.on_step(self._report())

    def _report(self) -> StepReport:
        """The state of all engines, without a step."""
        return StepReport([], self._stats.idle(), self._join_tables())

    def _join_tables(self) -> list[AdapterStatus]:
        devices = [member.device for member in self.members]
        self.adapters = join_tables([each.client.adapters for each in self.members], devices)
        return list(self.adapters.values())


class _MemberEvents:
    """Passes the events of one engine on, with its number."""

    def __init__(self, group: EngineGroup, observer: GroupObserver, number: int) -> None:
        self._group = group
        self._observer = observer
        self._number = number

    def on_step(self, done: StepReport) -> None:
        self._group._on_step(self._number, done)

    def on_load(self, done: LoadDone) -> None:
        self._observer.on_load(done)

    def on_merge(self, done: MergeDone) -> None:
        self._observer.on_merge(done)

    def on_restart(self) -> None:
        self._group._on_lost(self._number)

    def on_death(self, cause: Cause, report: LossReport) -> None:
        self._observer.on_death(cause, report)

    def on_ready(self, hello: Hello) -> None:
        self._group._on_ready(self._number)

    def on_fatal(self, fatal: Fatal) -> None:
        device = self._group.members[self._number].device
        self._observer.on_fatal(Fatal(fatal.reason, f"{device}: {fatal.message}"))


def members(engine: Engine) -> list[EngineMember]:
    """The engines of a server that has started, one or several."""
    if isinstance(engine, EngineGroup):
        return engine.members
    assert isinstance(engine, EngineClient)
    return [EngineMember(engine.hello.model.device, engine)]


async def _start(member: EngineMember) -> None:
    """Starts an engine. Raises a `Refusal` that names the device."""
    try:
        await member.client.start()
    except Refusal as refusal:
        text = f"{member.device}: {refusal.message}"
        raise Refusal(refusal.reason, text, problems=refusal.problems) from refusal


def _raise_first(done: Sequence[BaseException | None]) -> None:
    for error in done:
        if error is not None:
            raise error
