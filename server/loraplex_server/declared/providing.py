"""Registers the adapters that the settings name, before the server takes calls."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import partial
from typing import Final

from loraplex.sources.foreign_ids import SOURCE_LABEL, name_of
from loraplex_adapters.format.digest import AdapterDigest
from loraplex_adapters.format.files import Directory, opened
from loraplex_adapters.signing import MAX_BUNDLE_BYTES
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.access.principals import EVERYBODY
from loraplex_server.config import Config
from loraplex_server.declared.directory import DirectoryWatch
from loraplex_server.declared.named import NamedAdapter
from loraplex_server.exits import ServerExit
from loraplex_server.registry.registry import Registry
from loraplex_server.registry.sources import Source
from loraplex_server.registry.terms import Registered, RegistrationTerms, usable
from loraplex_server.runtime.failures import StartFailure, for_operator
from loraplex_server.series import Series

SIGNATURE_FILE: Final = "model.sig"
"""Name of a signature's file beside the adapter's files."""

_PIECE: Final = 1 << 20

log = logging.getLogger(__name__)


async def provide_declared(
    config: Config, registry: Registry, series: Series
) -> DirectoryWatch | None:
    """Registers what the settings declare; returns the watch of the directory, if there is one.

    Raises StartFailure for an adapter that the settings name, unless they allow it to be left out.
    """
    for each in config.adapters:
        try:
            await _provide(registry, each)
        except (Refusal, ValueError) as error:
            reason = for_operator(error) if isinstance(error, Refusal) else str(error)
            text = f"the adapter {each.name} cannot be taken from {each.path}: {reason}"
            if config.adapters_required:
                advice = "correct it, or set adapters_required to false to go on without it"
                raise StartFailure(ServerExit.BAD_CONFIG, f"{text}; {advice}") from error
            log.error("%s", text)
    if config.adapter_directory is None:
        return None
    labels = config.directory_labels
    return await DirectoryWatch.begin(
        config.adapter_directory,
        partial(ensure, registry, chosen=labels.own),
        partial(_remove, registry),
        series,
        config.adapter_directory_seconds,
        config.adapter_directory_removes,
        labels,
    )


async def _provide(registry: Registry, each: NamedAdapter) -> None:
    """Registers, loads and aliases an adapter. Raises Refusal; ValueError for its name."""
    name, labels = name_of(each.name)
    source = partial(opened, each.path)
    adapter = await ensure(registry, name, source, {**each.labels, **labels})
    record = adapter.record
    if each.pin:
        await registry.engine.pin(usable(adapter).ref, True)
    elif each.load:
        await registry.engine.load(usable(adapter).ref)
    if each.alias:
        await registry.set_alias(each.alias, record.id, None, EVERYBODY.seen)
    log.info("the adapter %s is %s", each.name, record.id)


async def ensure(
    registry: Registry,
    name: str,
    source: Source,
    labels: Mapping[str, str],
    owner: str = "",
    chosen: Collection[str] = (),
) -> Registered:
    """The version of `name` with the bytes in `source`: the current one, or else a new one.

    Nothing is copied if the name has these bytes; its version then gets the labels, and loses those
    with the keys `chosen` that are not among them. With `owner`, a name moves to other bytes, and
    its version is labelled, only if that has this text as its source.
    Raises Refusal: ADAPTER_CONFLICT, and as a registration does.
    """
    lane = registry.lanes.registrations
    digest, signature = await lane.run(_identity, source)
    known = await _current(registry, name)
    if known is not None and await lane.run(_is_stored, registry, known, digest):
        there = known.record.labels
        missing = {k: v for k, v in labels.items() if there.get(k) != v}
        gone = [key for key in chosen if key in there and key not in labels]
        is_ours = not owner or there.get(SOURCE_LABEL) == owner
        if is_ours and (missing or gone):
            await registry.label(known.record.id, missing, gone, EVERYBODY)
        return known
    if known is not None and owner and known.record.labels.get(SOURCE_LABEL) != owner:
        text = f"{name} is an adapter that came from elsewhere; delete it, or rename the folder"
        raise Refusal(Reason.ADAPTER_CONFLICT, text, name)
    given = {**labels, SOURCE_LABEL: owner} if owner else labels
    terms = RegistrationTerms(name, True, given, signature=signature)
    return (await registry.register(source, terms))[0]


async def _remove(registry: Registry, name: str, owner: str) -> bool:
    """Deletes a name whose version came from `owner`; False if there is none. Raises Refusal."""
    known = await _current(registry, name)
    if known is None or known.record.name != name:
        return False
    if known.record.labels.get(SOURCE_LABEL) != owner:
        return False
    await registry.delete(name, EVERYBODY.seen)
    return True


async def _current(registry: Registry, name: str) -> Registered | None:
    """The version that a name means now; None if there is none. Raises Refusal."""
    try:
        return await registry.resolve(name, EVERYBODY)
    except Refusal as refusal:
        if refusal.reason is Reason.ADAPTER_NOT_FOUND:
            return None
        raise


def _is_stored(registry: Registry, known: Registered, digest: str) -> bool:
    """Whether a version has this digest, its files, and may be served."""
    if known.record.digest != digest or known.obstacle is not None:
        return False
    try:
        registry.store.path(digest)
    except Refusal:
        return False
    return True


def _identity(source: Source) -> tuple[str, bytes]:
    """The digest of the adapter in `source`, and the signature beside it, b"" if there is none."""
    with source() as folder:
        config = folder.read_config()
        with folder.open_weights(1 << 62) as weights:
            digest = AdapterDigest(config, weights.size)
            for offset in range(0, weights.size, _PIECE):
                digest.update(weights.read(offset, min(_PIECE, weights.size - offset)))
        return digest.text(), _signature(folder)


def _signature(folder: Directory) -> bytes:
    if SIGNATURE_FILE not in folder.names(1000):
        return b""
    with folder.open(SIGNATURE_FILE, MAX_BUNDLE_BYTES) as file:
        return file.read(0, file.size)
