"""The command `loraplex-gateway`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from loraplex import LoraplexError
from loraplex.channel import DEFAULT_TARGET

from loraplex_gateway.settings import GatewaySettings, SettingsError

MISSING: Final = 2
"""Exit code if a package of the extra `gateway` is not installed."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _option(text: str, name: str) -> object:
    return typer.Option(f"--{name}", help=text, envvar=f"LORAPLEX_GATEWAY_{_env(name)}")


def _env(name: str) -> str:
    return name.upper().replace("-", "_")


Host = Annotated[str, _option("Address to listen on for HTTP.", "host")]
Port = Annotated[int, _option("Port for HTTP; 0 takes a free one.", "port")]
Target = Annotated[str, _option("gRPC address of the Loraplex server.", "target")]
Tls = Annotated[bool, _option("Encrypt the connection to the Loraplex server.", "tls")]
Authorities = Annotated[
    Path | None,
    _option("PEM file with the authorities of the Loraplex server's certificate.", "ca"),
]
ServerName = Annotated[
    str, _option("Name in the Loraplex server's certificate, if not the target's.", "server-name")
]
Certificate = Annotated[
    Path | None,
    _option("PEM file with the certificate with which HTTP is encrypted.", "certificate"),
]
PrivateKey = Annotated[
    Path | None, _option("PEM file with the private key of --certificate.", "private-key")
]
Insecure = Annotated[
    bool, _option("Listen for HTTP that is not encrypted where others can reach it.", "insecure")
]
ServedNames = Annotated[
    list[str] | None,
    _option("Name of the base model in requests; may be repeated.", "served-model-name"),
]
Metrics = Annotated[
    str, _option("URL of the Loraplex server's metrics, passed on as /metrics.", "metrics")
]
Origins = Annotated[
    list[str] | None,
    _option("Origin whose pages may call the gateway; may be repeated.", "cors-origin"),
]
ManagesAdapters = Annotated[
    bool,
    typer.Option(
        "--manages-adapters/--no-manages-adapters",
        help="Let callers load, change and unload adapters over HTTP, as their keys allow.",
        envvar="LORAPLEX_GATEWAY_MANAGES_ADAPTERS",
    ),
]
AdapterRoot = Annotated[
    Path | None,
    _option("Folder whose folders may be named as paths of adapters.", "adapter-root"),
]
ImportRoot = Annotated[
    str, _option("Path below which callers name folders of the server.", "import-root")
]
Sources = Annotated[
    list[str] | None,
    _option("Prefix of URIs to fetch adapters from; may be repeated.", "allow-source"),
]
MaxUpload = Annotated[int, _option("Most bytes of an adapter.", "max-upload-bytes")]
Hosts = Annotated[
    list[str] | None,
    _option("Name by which callers reach the gateway; may be repeated.", "allowed-host"),
]
MaxConnections = Annotated[int, _option("Most connections of callers.", "max-connections")]
MaxRequests = Annotated[
    int, _option("Most requests that call the Loraplex server at a time.", "max-requests")
]
MaxBody = Annotated[int, _option("Largest body of a request, in bytes.", "max-body-bytes")]
Drain = Annotated[
    float,
    _option("Seconds that running requests have to finish after SIGTERM.", "drain-seconds"),
]
WebConsole = Annotated[
    bool,
    typer.Option(
        "--console/--no-console",
        help="Serve the web console at /console/.",
        envvar="LORAPLEX_GATEWAY_CONSOLE",
    ),
]
ToolFormat = Annotated[
    str,
    _option(
        "How the model writes calls of functions, if its chat template does not tell.",
        "tool-format",
    ),
]


@app.command()
def run(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    target: Target = DEFAULT_TARGET,
    tls: Tls = False,
    ca: Authorities = None,
    server_name: ServerName = "",
    certificate: Certificate = None,
    private_key: PrivateKey = None,
    insecure: Insecure = False,
    served_model_name: ServedNames = None,
    metrics: Metrics = "",
    manages_adapters: ManagesAdapters = True,
    adapter_root: AdapterRoot = None,
    import_root: ImportRoot = "",
    allow_source: Sources = None,
    max_upload_bytes: MaxUpload = 4 << 30,
    cors_origin: Origins = None,
    allowed_host: Hosts = None,
    max_connections: MaxConnections = 1024,
    max_requests: MaxRequests = 1024,
    max_body_bytes: MaxBody = 8 << 20,
    drain_seconds: Drain = 30.0,
    tool_format: ToolFormat = "",
    console: WebConsole = True,
) -> None:
    """Serve OpenAI's HTTP interface in front of a Loraplex server."""
    settings = GatewaySettings(
        host=host,
        port=port,
        target=target,
        tls=tls,
        ca=ca,
        server_name=server_name,
        certificate=certificate,
        private_key=private_key,
        insecure=insecure,
        served_names=tuple(served_model_name or ()),
        metrics=metrics,
        manages_adapters=manages_adapters,
        adapter_root=adapter_root,
        import_root=import_root,
        allow_sources=tuple(allow_source or ()),
        max_upload_bytes=max_upload_bytes,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        max_connections=max_connections,
        max_requests=max_requests,
        max_body_bytes=max_body_bytes,
        drain_seconds=drain_seconds,
        tool_format=tool_format,
        console=console,
    )
    raise typer.Exit(serve(settings))


def serve(settings: GatewaySettings) -> int:
    """Serves until a signal ends it; returns the exit code, after one line if it cannot start."""
    # The gRPC library's own messages may hold the bytes of a peer.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    from loraplex_gateway import serving
    from loraplex_gateway.app import build

    async def served() -> None:
        application = build(settings)
        listening = serving.listen(settings)
        await serving.serve(application, settings, listening, _ready)

    try:
        asyncio.run(served())
    except serving.CannotListen as error:
        return _failed(str(error), serving.GatewayExit.PORT_IN_USE)
    except (SettingsError, LoraplexError) as error:
        return _failed(str(error), serving.GatewayExit.BAD_SETTINGS)
    return serving.GatewayExit.OK


def _ready(where: str) -> None:
    print(f"ready: http {where}", flush=True)


def _failed(text: str, code: int) -> int:
    print(f"error: {text}", file=sys.stderr, flush=True)
    return code


def main() -> None:
    """The console script. Without the packages of the extra `gateway`, it says so in one line."""
    try:
        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "loraplex_gateway":
            raise
        text = f"the gateway needs the package {error.name}: install loraplex[gateway]"
        sys.exit(_failed(text, MISSING))
