"""Pages of other sites cannot use a gateway through the browser of somebody who reaches it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway.adapter_gateway import gateway
from loraplex_gateway.app import build
from loraplex_gateway.settings import GatewaySettings
from rpc.harness import write_adapter

FORM = b'--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n--x--\r\n'
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}


@asynccontextmanager
async def page(**settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway whose server is away, so that what is let through is 503."""
    app = build(GatewaySettings(**{"target": "127.0.0.1:1", **settings}))
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as http,
    ):
        yield http


@pytest.mark.fault("names-of-other-sites")
@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("localhost", True),
        ("LOCALHOST.:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("10.1.2.3", True),
        ("host.docker.internal:8000", True),
        ("app.localhost", True),
        ("", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example@localhost", True),
        ("localhost@evil.example", False),
        ("xlocalhost", False),
        ("[::1", False),
        ("rebound.local", False),
    ],
)
async def test_a_gateway_of_this_machine_has_no_names_of_other_sites(
    host: str, is_own: bool
) -> None:
    async with page() as http:
        for path in ("/version", "/console/", "/nowhere"):
            answer = await http.get(path, headers={"host": host})
            assert (answer.status_code == 421) is not is_own, (path, answer.text)
    assert is_own or answer.json()["error"]["code"] == "host_not_allowed"


async def test_the_operator_adds_names_and_a_public_gateway_has_any() -> None:
    async with page(allowed_hosts=("llm.Example.com",)) as http:
        for host, status in (("LLM.example.com:443", 200), ("other.example.com", 421)):
            assert (await http.get("/version", headers={"host": host})).status_code == status
    async with page(host="0.0.0.0", insecure=True) as http:
        assert (await http.get("/version", headers={"host": "x.example"})).status_code == 200
    async with page(host="0.0.0.0", insecure=True, allowed_hosts=("a.example",)) as http:
        assert (await http.get("/version", headers={"host": "x.example"})).status_code == 421


@pytest.mark.fault("forms-of-other-sites")
@pytest.mark.parametrize(
    ("headers", "is_refused"),
    [
        ({}, False),
        ({"origin": "http://localhost:8000"}, False),
        ({"origin": "https://localhost:8000"}, False),
        ({"origin": "https://proxy.example", "sec-fetch-site": "same-origin"}, False),
        ({"origin": "http://evil.example"}, True),
        ({"origin": "http://localhost:3000"}, True),
        ({"origin": "http://evil.example", "sec-fetch-site": "cross-site"}, True),
        ({"origin": "http://evil.example", "sec-fetch-site": "same-site"}, True),
        ({"origin": "null"}, True),
        ({"origin": "http://localhost:8000.evil.example"}, True),
    ],
)
async def test_a_page_of_another_origin_changes_nothing(
    headers: dict[str, str], is_refused: bool
) -> None:
    async with page() as http:
        for path in ("/v1/files", "/v1/adapters"):
            answer = await http.post(path, content=FORM, headers={**MULTIPART, **headers})
            assert (answer.status_code == 403) is is_refused, (path, answer.text)
        for path in ("/v1/fine_tuning/jobs/ftjob-1/cancel", "/ping", "/v1/chat/completions"):
            answer = await http.post(path, headers=headers)
            assert (answer.status_code == 403) is is_refused, (path, answer.text)
        answer = await http.delete("/v1/models/x", headers=headers)
        assert (answer.status_code == 403) is is_refused


async def test_origins_that_the_operator_allows_may_change_things_and_read_the_answers() -> None:
    for allowed in ("https://Page.example/", "*"):
        async with page(cors_origins=(allowed,)) as http:
            headers = {"origin": "https://page.example", **MULTIPART}
            assert (await http.post("/v1/files", content=FORM, headers=headers)).status_code != 403
    async with page(cors_origins=("https://page.example",)) as http:
        other = {"origin": "https://other.example", **MULTIPART}
        answer = await http.post("/v1/files", content=FORM, headers=other)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


async def test_a_form_of_another_site_registers_no_adapter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "one")
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    files = {part: (name, (folder / name).read_bytes()) for part, name in names.items()}
    async with gateway(tmp_path) as site:
        send = {"files": files, "data": {"name": "evil"}}
        site.http.event_hooks = {}
        refused = await site.http.post(
            "/v1/adapters", **send, headers={"origin": "http://evil.example"}
        )
        assert refused.status_code == 403
        assert await site.models() == []
        allowed = await site.http.post("/v1/adapters", **send)
        assert allowed.status_code == 201, allowed.text


async def test_browsers_trust_the_types_of_all_answers() -> None:
    async with page() as http:
        for path in ("/version", "/metrics", "/console/", "/nowhere", "/health", "/"):
            headers = (await http.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff", path
