"""Targets of gRPC: which are addresses at all, and which certainly lead to this machine."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address

from loraplex.errors import invalid

_SCHEMES = frozenset({"dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds"})

_LOOPBACK = re.compile(
    r"(?:localhost|(?P<four>[0-9.]+)|\[(?P<six>[0-9A-Fa-f:.]+)\])(?::[0-9]{1,5})?"
)
_SIX = IPv6Address("::1")


def require_target(target: str) -> None:
    """Raises InvalidRequest for a target that is empty or an address of the web."""
    if not target.strip():
        raise invalid("target", "is empty; give HOST:PORT")
    scheme, marked, _ = target.partition("://")
    if marked and scheme.lower() not in _SCHEMES:
        # Not repeated here, since such an address may have a password in it.
        raise invalid(
            "target",
            "is an address of the web; give HOST:PORT alone, and ask for encryption with tls",
        )


def stays_on_this_machine(target: str) -> bool:
    """Whether what is sent to a target certainly stays on this machine; False if in doubt.

    Only spellings that every resolver reads alike count: `localhost`, addresses of 127.0.0.0/8 in
    four decimal numbers, `[::1]`, and Unix sockets.
    """
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return bool(rest) and (rest.startswith("///") or not rest.startswith("//"))
    if scheme in ("ipv4", "ipv6"):
        return all(_is_loopback(address) for address in rest.split(","))
    if scheme == "dns":
        # What stands between // and / is the name server to ask, which may answer anything.
        return _is_loopback(rest.removeprefix("///"))
    return _is_loopback(target)


def _is_loopback(address: str) -> bool:
    found = _LOOPBACK.fullmatch(address)
    if found is None:
        return False
    try:
        if found["four"]:
            return IPv4Address(found["four"]).is_loopback
        return not found["six"] or IPv6Address(found["six"]) == _SIX
    except ValueError:
        return False
