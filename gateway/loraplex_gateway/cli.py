"""The command `loraplex-gateway`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from loraplex import LoraplexError
from loraplex.channel import DEFAULT_TARGET

from loraplex_gateway.app import build
from loraplex_gateway.settings import GatewaySettings, SettingsError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def _option(text: str, name: str) -> object:
    return typer.Option(f"--{name}", help=text, envvar=f"LORAPLEX_GATEWAY_{_env(name)}")


def _env(name: str) -> str:
    return name.upper().replace("-", "_")


@app.command()
def run(
    host: Annotated[str, _option("Address to listen on for HTTP.", "host")] = "127.0.0.1",
    port: Annotated[int, _option("Port for HTTP; 0 takes a free one.", "port")] = 8000,
    target: Annotated[
        str, _option("gRPC address of the Loraplex server.", "target")
    ] = DEFAULT_TARGET,
    tls: Annotated[bool, _option("Encrypt the connection to the Loraplex server.", "tls")] = False,
    ca: Annotated[
        Path | None,
        _option("PEM file with the authorities of the Loraplex server's certificate.", "ca"),
    ] = None,
    server_name: Annotated[
        str,
        _option("Name in the Loraplex server's certificate, if not the target's.", "server-name"),
    ] = "",
    certificate: Annotated[
        Path | None,
        _option("PEM file with the certificate with which HTTP is encrypted.", "certificate"),
    ] = None,
    private_key: Annotated[
        Path | None, _option("PEM file with the private key of --certificate.", "private-key")
    ] = None,
    insecure: Annotated[
        bool,
        _option("Listen for HTTP that is not encrypted where others can reach it.", "insecure"),
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        _option("Name of the base model in requests; may be repeated.", "served-model-name"),
    ] = None,
    metrics: Annotated[
        str, _option("URL of the Loraplex server's metrics, passed on as /metrics.", "metrics")
    ] = "",
    manages_adapters: Annotated[
        bool,
        typer.Option(
            "--manages-adapters/--no-manages-adapters",
            help="Let callers load, change and unload adapters over HTTP, as their keys allow.",
            envvar="LORAPLEX_GATEWAY_MANAGES_ADAPTERS",
        ),
    ] = True,
    adapter_root: Annotated[
        Path | None,
        _option("Folder whose folders may be named as paths of adapters.", "adapter-root"),
    ] = None,
    import_root: Annotated[
        str,
        _option("Path below which callers name folders of the server.", "import-root"),
    ] = "",
    allow_source: Annotated[
        list[str] | None,
        _option("Prefix of URIs to fetch adapters from; may be repeated.", "allow-source"),
    ] = None,
    max_upload_bytes: Annotated[int, _option("Most bytes of an adapter.", "max-upload-bytes")] = 4
    << 30,
    cors_origin: Annotated[
        list[str] | None,
        _option("Origin whose pages may call the gateway; may be repeated.", "cors-origin"),
    ] = None,
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
    )
    try:
        serve(settings)
    except (SettingsError, LoraplexError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def serve(settings: GatewaySettings) -> None:
    """Serves until a signal ends it. Raises SettingsError."""
    uvicorn.run(
        build(settings),
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
        access_log=False,  # a path may hold the name of another tenant's adapter
        server_header=False,
        log_level="warning",
    )


def main() -> None:
    app()
