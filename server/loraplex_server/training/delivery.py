"""Delivers a trained adapter to the registry: registers it, loads it, points an alias to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from loraplex_adapters.format.files import open_directory
from loraplex_adapters.store import Allotment, LabelSelector, Record
from loraplex_adapters.store.index.labels import MAX_VALUE
from loraplex_model.base.refusal import Reason, Refusal, Subject

from loraplex_server.access.limits.allotting import allotment_of
from loraplex_server.access.principals import EVERYBODY, Principal
from loraplex_server.registry.registry import Registry
from loraplex_server.registry.terms import Registered, RegistrationTerms
from loraplex_server.training.jobs import (
    ADAPTER,
    CheckpointRecord,
    JobOrder,
    JobOwner,
    ResultRecord,
)

MODEL_ID: Final = "loraplex.dev/model-id"
"""Label of an adapter whose id in requests over HTTP is not its name."""

_RETRY_SECONDS: Final = (0.5, 1.0, 2.0)
"""Pauses before each retry on an unavailable store; hours of training would be lost otherwise."""


class RegistryDestination:
    """The registry as a `runner.Destination`."""

    def __init__(
        self, registry: Registry, principals: Callable[[], Mapping[str, Principal]] = dict
    ) -> None:
        """`principals` returns those that there are now, whose limits hold for deliveries."""
        self._registry = registry
        self._principals = principals

    async def check(self, order: JobOrder, principal: Principal) -> None:
        """Raises Refusal if the adapter could not be registered later.

        ADAPTER_CONFLICT: its name or its alias is taken; PERMISSION_DENIED: by a version that the
        principal does not see. SIGNATURE_INVALID: it needs a signature. QUOTA_EXCEEDED: the
        principal may not have so many adapters.
        """
        known = await self._find(order.name, principal)
        if known is not None and known.record.name != order.name:
            raise _conflict(order.name, f"{order.name!r} is an alias")
        if known is not None and not order.replace:
            text = (
                f"there is an adapter {order.name!r}; set `replace` to register a new version of it"
            )
            raise _conflict(order.name, text)
        await self._require_signatures(order)
        if order.alias:
            known = await self._find(order.alias, principal)
            if known is not None and known.record.name == order.alias:
                raise _conflict(order.alias, f"{order.alias!r} is an adapter, not an alias")
        if (allotment := self._allotment(principal)) is not None:
            allowed = self._registry.store.allotments.require
            await self._registry.read(allowed, allotment, order.name, order.labels)

    async def deliver(self, folder: Path, order: JobOrder, owner: JobOwner) -> ResultRecord:
        """Registers the adapter, then loads and aliases it as ordered by `owner`.

        Raises Refusal if it is not registered; later failures become the result's warning.
        """
        problems = []
        loaded = order.load
        principal = self._principals().get(owner.name)
        terms = RegistrationTerms(
            order.name,
            order.replace,
            order.labels,
            load=order.load,
            seen=LabelSelector.parse(owner.seen),
            copies=owner.copies,
            allotment=None if principal is None else self._allotment(principal),
            trained=True,
        )
        try:
            adapter = await self._register(folder, terms)
        except Refusal as refusal:
            if not order.load:
                raise
            # If the store itself refuses, it refuses again here, and that refusal is raised.
            adapter = await self._register(folder, replace(terms, load=False))
            problems.append(f"the adapter was not loaded: {refusal.message}")
            loaded = False
        record = adapter.record
        if order.alias:
            try:
                await self._registry.set_alias(order.alias, record.id, None, terms.seen)
            except Refusal as error:
                problems.append(f"the alias was not set: {error.message}")
        return ResultRecord(
            version=record.version, digest=record.digest, loaded=loaded, warning="; ".join(problems)
        )

    async def keep(
        self, folder: Path, order: JobOrder, owner: JobOwner, step: int, again: bool
    ) -> Record:
        """Registers a job's adapter as it is after `step`, while the job runs on.

        `again` says that the job has registered that step before. Raises Refusal.
        """
        principal = self._principals().get(owner.name)
        terms = RegistrationTerms(
            checkpoint_name(order.name, step),
            order.replace or again,
            _checkpoint_labels(order.labels, step),
            seen=LabelSelector.parse(owner.seen),
            allotment=None if principal is None else self._allotment(principal),
            trained=True,
        )
        return (await self._register(folder, terms)).record

    async def drop(self, checkpoint: CheckpointRecord, owner: JobOwner) -> None:
        """Deletes an adapter that `keep` registered, unless its name means another one now."""
        seen = LabelSelector.parse(owner.seen)
        found = await self._registry.resolve(checkpoint.name, EVERYBODY)
        kept = (checkpoint.name, checkpoint.version, checkpoint.digest)
        if (found.record.name, found.record.version, found.record.digest) == kept:
            await self._registry.delete(checkpoint.name, seen)

    def _allotment(self, principal: Principal) -> Allotment | None:
        return allotment_of(principal, 0, self._registry.data_bytes(principal.name))

    async def _register(self, folder: Path, terms: RegistrationTerms) -> Registered:
        # Not in a lane that clients' registrations can fill.
        source, lane = partial(open_directory, folder), self._registry.lanes.training
        pauses = iter(_RETRY_SECONDS)
        while True:
            try:
                return (await self._registry.register(source, terms, lane))[0]
            except Refusal as error:
                pause = next(pauses, None) if error.reason is Reason.STORE_UNAVAILABLE else None
                if pause is None:
                    raise _refusal(error, terms.name) from error
            await asyncio.sleep(pause)

    async def _require_signatures(self, order: JobOrder) -> None:
        signatures = self._registry.signatures

        def work() -> None:
            signatures.require_trained(order.name)
            if order.checkpoints:
                signatures.require_trained(checkpoint_name(order.name, 1))
            if order.alias:
                signatures.require_alias(order.alias, lambda: order.name)

        try:
            await self._registry.lanes.training.run(work)
        except Refusal as error:
            raise _refusal(error, order.name) from error

    async def _find(self, name: str, principal: Principal) -> Registered | None:
        """What a name or an alias means. Raises Refusal(PERMISSION_DENIED) if that is hidden."""
        try:
            found = await self._registry.resolve(name, EVERYBODY)
        except Refusal as error:
            if error.reason is Reason.ADAPTER_NOT_FOUND:
                return None
            raise _refusal(error, name) from error
        if not principal.sees(found.record.labels):
            raise Refusal(Reason.PERMISSION_DENIED, f"{name} is not available to this caller")
        return found


def checkpoint_name(name: str, step: int) -> str:
    """The name of a job's adapter as it was after a step."""
    return f"{name}-step-{step}"


def _checkpoint_labels(labels: Mapping[str, str], step: int) -> dict[str, str]:
    """The labels of a checkpoint. No two adapters must have one id in requests over HTTP."""
    own = dict(labels)
    if model := own.pop(MODEL_ID, ""):
        suffix = f":ckpt-step-{step}"
        own[MODEL_ID] = model[: MAX_VALUE - len(suffix)] + suffix
    return own


def _conflict(name: str, text: str) -> Refusal:
    return Refusal(Reason.ADAPTER_CONFLICT, text, subject=Subject(ADAPTER, name))


def _refusal(error: Refusal, name: str) -> Refusal:
    return Refusal(error.reason, error.message, subject=Subject(ADAPTER, name))
