"""The settings of the gateway."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from loraplex.channel import DEFAULT_TARGET


class SettingsError(Exception):
    """A setting that cannot be served with; the text says which, and what to do."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How the gateway listens, where its server is, and what it allows.

    Attributes:
        host, port: address for HTTP; port 0 takes a free one.
        target: gRPC address of the server.
        ca, server_name: authorities and name of the server's certificate; either one, or `tls`,
            encrypts the connection to it.
        certificate, private_key: PEM files with which HTTP is encrypted; both or neither.
        insecure: listen on an address that others can reach although HTTP is not encrypted.
        served_names: names of the base model in requests, the first of which is listed; the
            server's own name for it always counts, too.
        metrics: URL of the server's metrics, which `/metrics` passes on; "" for none.
        max_body_bytes: largest request body; uploads have limits of their own.
        cors_origins: origins whose pages may call; "*" for all.
        allowed_hosts: names by which callers reach the gateway, besides addresses and `localhost`;
            if none are given, all names are allowed where others can reach it.
        max_connections: most connections of callers. A few more are taken for health, metrics, and
            for requests that are refused; further ones are closed at once.
        max_requests: most requests that call the server at a time; further ones are refused.
        request_seconds: longest time of a request on the server.
        drain_seconds: seconds that running requests have to finish after SIGTERM.
        manages_adapters: whether adapters can be loaded and unloaded over HTTP.
        adapter_root: folder of this machine, whose folders may be named as adapters' paths and are
            sent to the server; None for none.
        import_root: absolute path below which callers know the server's import root, if they name
            adapters by absolute paths; "" if they do not.
        allow_sources: prefixes of the URIs from which adapters may be fetched; none are by default.
        max_upload_bytes: largest adapter that is received, fetched or sent.
        pull_seconds: longest time in which an adapter is fetched.
        console: whether the console's page is served.
        tool_format: how the model writes calls of functions, a name of `tools/formats/known.py`; ""
            finds it out from the chat template.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    target: str = DEFAULT_TARGET
    tls: bool = False
    ca: Path | None = None
    server_name: str = ""
    certificate: Path | None = None
    private_key: Path | None = None
    insecure: bool = False
    served_names: tuple[str, ...] = ()
    metrics: str = ""
    max_body_bytes: int = 8 << 20
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_connections: int = 1024
    max_requests: int = 1024
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    manages_adapters: bool = True
    adapter_root: Path | None = None
    import_root: str = ""
    allow_sources: tuple[str, ...] = ()
    max_upload_bytes: int = 4 << 30
    pull_seconds: float = 600.0
    console: bool = True
    tool_format: str = ""

    def check(self) -> None:
        """Raises SettingsError for settings that exclude each other or expose callers."""
        if (self.certificate is None) != (self.private_key is None):
            missing = "private_key" if self.private_key is None else "certificate"
            raise SettingsError(f"{missing}: is missing; certificate and private_key go together")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port: {self.port} is no port; ports are 0 to 65535")
        if self.metrics and not self.metrics.startswith(("http://", "https://")):
            raise SettingsError("metrics: must be a URL that begins with http:// or https://")
        from loraplex_gateway.tools.formats.known import FORMATS  # needs the extra `gateway`

        if self.tool_format and self.tool_format not in FORMATS:
            known = ", ".join(FORMATS)
            raise SettingsError(f"tool_format: {self.tool_format} is not one of {known}")
        if self.max_body_bytes < 1:
            raise SettingsError("max_body_bytes: must be at least 1")
        if not 1 <= self.max_connections <= 1 << 20:
            raise SettingsError("max_connections: must be 1 to 1048576")
        if not 1 <= self.max_requests <= 1 << 16:
            raise SettingsError("max_requests: must be 1 to 65536")
        if not 0 <= self.drain_seconds <= 86_400:
            raise SettingsError("drain_seconds: must be 0 to 86400")
        if self.certificate is None and not self.insecure and not is_loopback(self.host):
            raise SettingsError(
                f"host: {self.host} can be reached by others, and HTTP would not be encrypted; "
                "give certificate and private_key, or insecure if something in front encrypts"
            )
        if self.import_root and not os.path.isabs(self.import_root):
            raise SettingsError("import_root: must be an absolute path")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise SettingsError(f"adapter_root: {self.adapter_root} is not a folder")


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
