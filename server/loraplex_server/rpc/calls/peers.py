"""The addresses of clients, by which their share of bounded things is counted."""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote


def peer_address(peer: str) -> str:
    """The address in gRPC's text for a peer, without its port; "local" for a Unix socket.

    An IPv6 address is cut to the network of 64 bits, of which one machine usually has all. All
    clients behind a proxy have the proxy's address.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return "local"
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
