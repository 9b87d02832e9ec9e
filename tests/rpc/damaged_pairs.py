"""Wrong pairs of a certificate's files, in place of one that is in use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from rpc.certificates import Pair

Damage = Callable[[Pair, Pair], None]


def half_chain(new: Pair, place: Pair) -> None:
    place.chain.write_bytes(new.chain.read_bytes()[:-100])
    shutil.copy(new.key, place.key)


def chain_first(new: Pair, place: Pair) -> None:
    shutil.copy(new.chain, place.chain)


def key_first(new: Pair, place: Pair) -> None:
    shutil.copy(new.key, place.key)


def half_key(new: Pair, place: Pair) -> None:
    shutil.copy(new.chain, place.chain)
    place.key.write_bytes(new.key.read_bytes()[:60])


def no_key(new: Pair, place: Pair) -> None:
    shutil.copy(new.chain, place.chain)
    place.key.unlink()


def locked_key(new: Pair, place: Pair) -> None:
    key = load_pem_private_key(new.key.read_bytes(), None)
    lock = BestAvailableEncryption(b"secret")
    place.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    shutil.copy(new.chain, place.chain)


def empty(new: Pair, place: Pair) -> None:
    place.chain.write_bytes(b"")


def noise(new: Pair, place: Pair) -> None:
    place.chain.write_bytes(os.urandom(5000))


def pipe(new: Pair, place: Pair) -> None:
    place.key.unlink()
    os.mkfifo(place.key)


def folder(new: Pair, place: Pair) -> None:
    place.chain.unlink()
    place.chain.mkdir()


DAMAGES: tuple[Damage, ...] = (
    *(half_chain, chain_first, key_first, half_key, no_key, locked_key),
    *(empty, noise, pipe),
)
"""Those that end when whole files are put in their place; not so `folder`."""
