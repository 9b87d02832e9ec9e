"""How the console's files are served, and that nothing else is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from gateway.harness import Web, web
from loraplex_gateway.app import build
from loraplex_gateway.settings import GatewaySettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

STATIC = Path(__file__).parents[2] / "gateway" / "loraplex_gateway" / "console" / "static"
FILES = [str(path.relative_to(STATIC)) for path in STATIC.rglob("*") if path.is_file()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page() -> AsyncIterator[Web]:
    async with web("127.0.0.1:1", compared=False) as found:  # no server is needed
        yield found


@pytest.mark.parametrize("path", ["/", "/console"])
async def test_short_addresses_lead_to_the_page_below_any_prefix(page: Web, path: str) -> None:
    answer = await page.get(path)
    assert (answer.status_code, answer.headers["location"]) == (307, "console/")


async def test_the_page_and_all_its_files_are_served_with_types_that_browsers_run(
    page: Web,
) -> None:
    first = await page.get("/console/")
    assert first.headers["content-type"].startswith("text/html")
    types = {"js": "text/javascript", "mjs": "text/javascript", "css": "text/css"}
    for name in FILES:
        answer = await page.get(f"/console/{name}")
        assert answer.status_code == 200, name
        assert answer.content == (STATIC / name).read_bytes(), name
        wanted = types.get(name.rpartition(".")[2])
        assert wanted is None or answer.headers["content-type"].startswith(wanted), name


async def test_browsers_are_told_to_load_and_call_nothing_else(page: Web) -> None:
    for path in ("/console/", "/console/app/main.js"):
        headers = (await page.get(path)).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


async def test_a_file_that_the_browser_has_is_not_sent_again(page: Web) -> None:
    first = await page.get("/console/app/main.js")
    again = await page.http.get(
        "/console/app/main.js", headers={"if-none-match": first.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    plain = await page.http.get("/console/app/main.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == first.content


@pytest.mark.parametrize(
    "path",
    [
        "nothing.js",
        "../routes.py",
        "%2e%2e/routes.py",
        "..%2froutes.py",
        "app",
        "app/",
        "/etc/passwd",
        "app/main.js%00",
    ],
)
async def test_nothing_but_the_console_is_served(page: Web, path: str) -> None:
    answer = await page.get(f"/console/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


async def test_there_is_no_console_where_the_operator_wants_none() -> None:
    paths = {getattr(route, "path", "") for route in build(GatewaySettings(console=False)).routes}
    assert not {path for path in paths if path == "/" or path.startswith("/console")}
