"""What the server tells a service manager such as systemd about its life (sd_notify)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def ready() -> None:
    """Reports that calls are accepted."""
    _notify("READY=1")


def stopping(seconds: float) -> None:
    """Reports that the shutdown has begun and may take up to `seconds`."""
    _notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")


def _notify(*assignments: str) -> None:
    """Sends `assignments` to the socket in NOTIFY_SOCKET; does nothing without one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # An address that begins with @ has no file; its first byte is 0.
    path = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.setblocking(False)
            manager.sendto("\n".join(assignments).encode(), path)
    except OSError as error:
        log.warning("the service manager at %s cannot be told: %s", address, error)
