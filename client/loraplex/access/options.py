"""The options of TLS and keys that both clients take, from arguments or from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import grpc

from loraplex.access.keys import ClientKey
from loraplex.access.targets import require_target, stays_on_this_machine
from loraplex.access.tls import PathText, channel_credentials
from loraplex.errors import invalid

TLS_VARIABLE = "LORAPLEX_TLS"
_TLS_OPTIONS = {
    "ca": "LORAPLEX_CA",
    "server_name": "LORAPLEX_SERVER_NAME",
    "certificate": "LORAPLEX_CERTIFICATE",
    "private_key": "LORAPLEX_PRIVATE_KEY",
}
"""Options that ask for an encrypted connection, and their variables."""

KEY_VARIABLE = "LORAPLEX_KEY"
KEY_FILE_VARIABLE = "LORAPLEX_KEY_FILE"

_FLAGS = {"1": True, "true": True, "yes": True, "on": True,
          "0": False, "false": False, "no": False, "off": False}  # fmt: skip


class AccessOptions(TypedDict, total=False):
    """How to reach a server and prove who is calling. What is not given is taken from a variable.

    Attributes:
        tls: encrypt the connection, and accept only a server whose certificate an authority of
            this system has signed (`LORAPLEX_TLS`). Implied by `ca` and `certificate`.
        ca: PEM file with the authorities to accept in place of the system's (`LORAPLEX_CA`).
        server_name: name that the server's certificate must have, if the target's is not it
            (`LORAPLEX_SERVER_NAME`).
        certificate: PEM file with this client's certificate and its chain, for a server that asks
            for one (`LORAPLEX_CERTIFICATE`). It is read once.
        private_key: PEM file with the private key of `certificate` (`LORAPLEX_PRIVATE_KEY`).
        key: key (`lpx_...`) or signed token (JWT) that every call carries (`LORAPLEX_KEY`); "" for
            none, whatever the environment has.
        key_file: file with the key, read again for every call, so that a key can be replaced
            while the client is in use (`LORAPLEX_KEY_FILE`).
    """

    tls: bool | None
    ca: PathText | None
    server_name: str | None
    certificate: PathText | None
    private_key: PathText | None
    key: str | None
    key_file: PathText | None


@dataclass(frozen=True, slots=True)
class ClientAccess:
    """How the channel to one server is opened, and the key of its calls.

    Attributes:
        credentials: credentials of the channel; None for one that is not encrypted.
        options: channel options in addition to those that all channels have.
        key: the key of the calls; None if they carry none.
        is_private: whether the connection is encrypted or stays on this machine, so that it may
            carry keys.
    """

    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, Any], ...] = ()
    key: ClientKey | None = None
    is_private: bool = True


def open_access(
    target: str, credentials: grpc.ChannelCredentials | None, options: AccessOptions
) -> ClientAccess:
    """Reads the files of TLS and the key. Raises InvalidRequest, which names the option at fault.

    With `credentials`, which exclude all options, the environment is not read.
    """
    require_target(target)
    given = cast("Mapping[str, Any]", options)
    if credentials is not None:
        for name, value in given.items():
            if value:
                raise invalid(name, "cannot be combined with credentials; add it to these")
        return ClientAccess(credentials)
    tls = _tls_options(given, os.environ)
    key = _key(given, os.environ)
    if tls is None:
        if key is not None and not stays_on_this_machine(target):
            raise invalid(
                "key",
                f"it is not sent, because the connection to {target} would not be encrypted; use "
                "tls or ca, or an address of this machine",
            )
        is_private = stays_on_this_machine(target)
        direct = _without_proxy(os.environ) if is_private or key is not None else ()
        return ClientAccess(None, direct, key, is_private)
    name = tls.pop("server_name", None)
    arguments = (("grpc.ssl_target_name_override", name),) if name else ()
    return ClientAccess(channel_credentials(**tls), arguments, key)


def _tls_options(given: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any] | None:
    """The options of an encrypted connection; None for one that is not encrypted."""
    tls = given.get("tls")
    if tls is None and not any(given.get(name) for name in _TLS_OPTIONS):
        tls = _flag(variables.get(TLS_VARIABLE, ""))
    if tls is False:
        for name in _TLS_OPTIONS:
            if given.get(name):
                raise invalid(name, "is for encrypted connections, and tls is off")
        return None
    found = {
        name: given.get(name) or variables.get(variable) for name, variable in _TLS_OPTIONS.items()
    }
    chosen = {name: value for name, value in found.items() if value}
    for one, other in (("certificate", "private_key"), ("private_key", "certificate")):
        if one in chosen and other not in chosen:
            raise invalid(other, f"is missing; it belongs to {one}")
    return chosen if tls or chosen else None


def _key(given: Mapping[str, Any], variables: Mapping[str, str]) -> ClientKey | None:
    """The key of the calls; None for none."""
    text, file = given.get("key"), given.get("key_file")
    if text is None and not file:
        text, file = variables.get(KEY_VARIABLE), variables.get(KEY_FILE_VARIABLE)
    if text and file:
        raise invalid("key", "is given twice, as a text and as a file; give one of them")
    if file:
        return ClientKey.in_file(file)
    return ClientKey(text, "key") if text else None


def _without_proxy(variables: Mapping[str, str]) -> tuple[tuple[str, Any], ...]:
    """Channel options that bypass proxies: one would read what is for this machine alone."""
    options: tuple[tuple[str, Any], ...] = (("grpc.enable_http_proxy", 0),)
    if variables.get("GRPC_ADDRESS_HTTP_PROXY"):
        options += (("grpc.address_http_proxy", ""),)
    return options


def _flag(text: str) -> bool | None:
    """The value of an on-off variable; None if it is empty."""
    value = _FLAGS.get(text.strip().lower())
    if text.strip() and value is None:
        raise invalid(TLS_VARIABLE, f"{text!r} is neither true nor false")
    return value
