"""Delivers a trained adapter to the registry: registers it, loads it, points an alias to it."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Final

from loraplex_adapters.format.files import open_directory
from loraplex_model.base.refusal import Reason, Refusal, Subject

from loraplex_server.registry.registry import Registry
from loraplex_server.registry.terms import Registered, RegistrationTerms
from loraplex_server.training.jobs import ADAPTER, JobOrder, ResultRecord

_RETRY_SECONDS: Final = (0.5, 1.0, 2.0)
"""Pauses before each retry on an unavailable store; hours of training would be lost otherwise."""


class RegistryDestination:
    """The registry as a `runner.Destination`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def check(self, order: JobOrder) -> None:
        """Raises Refusal if the adapter could not be registered later.

        ADAPTER_CONFLICT: its name or its alias is taken. SIGNATURE_INVALID: it needs a signature.
        """
        known = await self._find(order.name)
        if known is not None and known.record.name != order.name:
            raise _conflict(order.name, f"{order.name!r} is an alias")
        if known is not None and not order.replace:
            text = (
                f"there is an adapter {order.name!r}; set `replace` to register a new version of it"
            )
            raise _conflict(order.name, text)
        await self._require_signatures(order)
        if order.alias:
            known = await self._find(order.alias)
            if known is not None and known.record.name == order.alias:
                raise _conflict(order.alias, f"{order.alias!r} is an adapter, not an alias")

    async def deliver(self, folder: Path, order: JobOrder) -> ResultRecord:
        """Registers the adapter, then loads and aliases it as ordered.

        Raises Refusal if it is not registered; later failures become the result's warning.
        """
        problems = []
        loaded = order.load
        try:
            adapter = await self._register(folder, order, order.load)
        except Refusal as refusal:
            if not order.load:
                raise
            # If the store itself refuses, it refuses again here, and that refusal is raised.
            adapter = await self._register(folder, order, load=False)
            problems.append(f"the adapter was not loaded: {refusal.message}")
            loaded = False
        record = adapter.record
        if order.alias:
            try:
                await self._registry.set_alias(order.alias, record.id, None)
            except Refusal as error:
                problems.append(f"the alias was not set: {error.message}")
        return ResultRecord(
            version=record.version, digest=record.digest, loaded=loaded, warning="; ".join(problems)
        )

    async def _register(self, folder: Path, order: JobOrder, load: bool) -> Registered:
        terms = RegistrationTerms(order.name, order.replace, order.labels, load=load, trained=True)
        # Not in a lane that clients' registrations can fill.
        source, lane = partial(open_directory, folder), self._registry.lanes.training
        pauses = iter(_RETRY_SECONDS)
        while True:
            try:
                return (await self._registry.register(source, terms, lane))[0]
            except Refusal as error:
                pause = next(pauses, None) if error.reason is Reason.STORE_UNAVAILABLE else None
                if pause is None:
                    raise _refusal(error, order.name) from error
            await asyncio.sleep(pause)

    async def _require_signatures(self, order: JobOrder) -> None:
        signatures = self._registry.signatures

        def work() -> None:
            signatures.require_trained(order.name)
            if order.alias:
                signatures.require_alias(order.alias, lambda: order.name)

        try:
            await self._registry.lanes.training.run(work)
        except Refusal as error:
            raise _refusal(error, order.name) from error

    async def _find(self, name: str) -> Registered | None:
        try:
            return await self._registry.resolve(name)
        except Refusal as error:
            if error.reason is Reason.ADAPTER_NOT_FOUND:
                return None
            raise _refusal(error, name) from error


def _conflict(name: str, text: str) -> Refusal:
    return Refusal(Reason.ADAPTER_CONFLICT, text, subject=Subject(ADAPTER, name))


def _refusal(error: Refusal, name: str) -> Refusal:
    return Refusal(error.reason, error.message, subject=Subject(ADAPTER, name))
