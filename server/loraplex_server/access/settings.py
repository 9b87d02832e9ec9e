"""Checks that the settings of addresses, TLS and principals agree with each other."""

from __future__ import annotations

import ipaddress

from loraplex_server.settings import ServerSettings


def require_coherent(settings: ServerSettings) -> None:
    """Raises ValueError if callers could reach the server unidentified or in clear by mistake."""
    if bool(settings.tls_certificate) != bool(settings.tls_key):
        raise ValueError("tls_certificate and tls_key belong together; set both or neither")
    if settings.tls_client_ca and not settings.tls_certificate:
        raise ValueError("tls_client_ca needs tls_certificate")
    if settings.jwks and not settings.principals:
        raise ValueError("jwks needs principals, which say what the owner of a token may do")
    if settings.gateway:
        host, _ = gateway_address(settings.gateway)
        if settings.tls_client_ca:
            raise ValueError(
                "gateway cannot be combined with tls_client_ca, since callers over HTTP show no "
                "certificate; run loraplex-gateway by itself, with a certificate of its own"
            )
        if not settings.insecure:
            _require_safe(settings, "gateway", host)
    if not settings.insecure:
        _require_safe(settings, "host", settings.host)  # an empty host is every address
        if settings.manage_host:
            _require_safe(settings, "manage_host", settings.manage_host)
        if not (settings.public_metrics or is_loopback(settings.admin_host)):
            raise ValueError(
                f"admin_host {settings.admin_host!r} can be reached from other machines, and "
                "nobody is authenticated there; listen on 127.0.0.1, or allow it with "
                "--public-metrics"
            )


def _require_safe(settings: ServerSettings, name: str, host: str) -> None:
    if is_loopback(host):
        return
    lacking = []
    if not settings.principals:
        lacking.append("callers are not authenticated (principals)")
    if not settings.tls_certificate:
        lacking.append("nothing is encrypted (tls_certificate)")
    if lacking:
        raise ValueError(
            f"{name} {host!r} can be reached from other machines, and {' and '.join(lacking)}; "
            "set these, listen on 127.0.0.1, or allow it with --insecure"
        )


def gateway_address(text: str) -> tuple[str, int]:
    """The host and port of `HOST:PORT`. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"gateway {text!r} is no address; give HOST:PORT, such as 127.0.0.1:8000")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
