"""The addresses of clients: for records, and to count each client's share of bounded things."""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote

LOCAL = "local"
"""Stands for the address of a client on a Unix socket."""

UNKNOWN = "unknown"
"""Stands for what is no address."""


def peer_host(peer: str) -> str:
    """The address in gRPC's text for a peer, without its port; `LOCAL` for a Unix socket."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return LOCAL
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return UNKNOWN
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def peer_address(peer: str) -> str:
    """The address by which a peer's share of bounded things is counted.

    An IPv6 address is cut to the network of 64 bits, of which one machine usually has all. All
    clients behind a proxy have the proxy's address.
    """
    host = peer_host(peer)
    if host in {LOCAL, UNKNOWN} or ":" not in host:
        return host
    return str(ipaddress.ip_network((host, 64), strict=False))
