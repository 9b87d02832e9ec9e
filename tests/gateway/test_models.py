"""Models by every form of id, for callers with different rights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from urllib.parse import quote

import pytest
import pytest_asyncio
from gateway.harness import Web, error_of, web
from loraplex.v1 import adapter_pb2 as pb
from loraplex_gateway.models.ids import FOREIGN_ID
from loraplex_server.access.roles import Role
from rpc.harness import Running
from security.callers import OPS, Callers, guarded, key, principal, register

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
HUB, PATH, NEST = "org/name@main", "/mnt/adapters/x y", "publishers/ns/models/é"


@dataclass
class Shop:
    """A server for several principals and a gateway.

    `red` sees what is labelled so; `plain` may only infer; `bare` may only read, `noone` nothing.
    """

    up: Running
    web: Web
    digest: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    known = [
        principal(OPS),
        principal("red", adapters="team=red"),
        principal("plain", [Role.INFER]),
        principal("bare", [Role.READ]),
        principal("noone", []),
        replace(principal("without-base"), base=False),
    ]
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("models")
        async with (
            guarded(folder, patch, Callers(*known)) as up,
            web(str(up.server.address), served_names=("main", "org/base")) as found,
        ):
            first = await register(up, OPS, "one", 1, labels={"team": "red"})
            await register(up, OPS, "one", 2, replace=True, labels={"team": "red"})
            await register(up, OPS, "two", 3, labels={FOREIGN_ID: HUB})
            await register(up, OPS, "three", 4, labels={FOREIGN_ID: PATH, "team": "red"})
            await register(up, OPS, "four", 5, labels={FOREIGN_ID: NEST})
            await register(up, OPS, "oracle", 6)  # as the base is called
            for alias, version in (("live", 1), ("now", 2)):
                moved = pb.SetAliasRequest(alias=alias, adapter_id=f"one@{version}")
                await up.adapters.SetAlias(moved, metadata=key(OPS))
            yield Shop(up, found, first.digest)


def body(model: str) -> dict[str, object]:
    talk = [{"role": "user", "content": "hi"}]
    return {"model": model, "messages": talk, "max_tokens": 1, "temperature": 0}


@pytest.mark.parametrize(
    ("model", "served"),
    [
        ("main", ""),
        ("org/base", ""),
        ("oracle", ""),
        ("one", "one@2"),
        ("one@1", "one@1"),
        ("one@2", "one@2"),
        ("live", "one@1"),
        ("main:one", "one@2"),
        ("org/base:one@1", "one@1"),
        ("oracle:live", "one@1"),
        ("main:oracle", "oracle@1"),
        (HUB, "two@1"),
        (PATH, "three@1"),
        (NEST, "four@1"),
        (f"main:{HUB}", "two@1"),
        (f"org/base:{PATH}", "three@1"),
    ],
)
async def test_an_id_means_the_base_or_one_adapter(shop: Shop, model: str, served: str) -> None:
    answer = await shop.web.post(CHAT, body(model), key=OPS)
    assert answer.status_code == 200, answer.text
    shown = answer.headers.get("x-loraplex-adapter", "")
    assert shown.partition(" ")[0] == served
    assert answer.json()["model"] == model


async def test_an_id_with_a_digest_means_those_bytes(shop: Shop) -> None:
    answer = await shop.web.post(CHAT, body(f"one@{shop.digest}"), key=OPS)
    assert answer.headers["x-loraplex-adapter"] == f"one@1 {shop.digest}"


@pytest.mark.parametrize(
    "model",
    [
        "nobody", "one@9", "one@0", "one@x", "one@" + "sha256:" + "0" * 64, "two@1@2", "ONE",
        "main:", "main:nobody", "main:main:one", "main:org/nothing", "org/nothing", "", " one",
        "one\n", "x" * 300, "x/" * 4000, "😀", "one@sha256:ab", "..", "team=red", "\u0000",
    ],
)  # fmt: skip
async def test_other_ids_do_not_exist(shop: Shop, model: str) -> None:
    error = await shop.web.refused(CHAT, body(model), 404, key=OPS)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert len(error["message"]) < 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["two", HUB, "nobody", "org/nothing", f"main:{HUB}"])
async def test_what_a_caller_does_not_see_does_not_exist(
    shop: Shop, model: str, stream: bool
) -> None:
    for _ in range(2):
        await shop.web.ok(CHAT, body(HUB), key=OPS)  # so that the gateway knows it
        error = await shop.web.refused(CHAT, {**body(model), "stream": stream}, 404, key="red")
        assert error["message"] == f"The model `{model}` does not exist."
        assert error["code"] == "model_not_found"
    assert (await shop.web.post(CHAT, body(PATH), key="red")).status_code == 200


@pytest.mark.parametrize("form", ["{}", "main:{}"])
@pytest.mark.parametrize(("foreign", "missing"), [("two", "nobody"), (HUB, "org/nothing")])
async def test_a_foreign_id_costs_the_same_calls_as_a_missing_one(
    shop: Shop, form: str, foreign: str, missing: str
) -> None:
    def calls() -> dict[tuple[str, ...], float]:
        return {
            tuple(sorted(sample.labels.items())): sample.value
            for family in shop.up.server.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "loraplex_requests_total"
        }

    async def ended() -> dict[tuple[str, ...], float]:
        """The calls when all of them are counted, which is after their answers have gone."""
        seen, quiet = calls(), 0
        while quiet < 10:
            await asyncio.sleep(0.01)
            now = calls()
            seen, quiet = now, quiet + 1 if now == seen else 0
        return seen

    await shop.web.ok(CHAT, body(PATH), key="red")  # so that the gateway knows the base
    made = []
    for model in (foreign, missing, foreign, missing):
        await shop.web.ok(CHAT, body(HUB), key=OPS)
        before = await ended()
        await shop.web.refused(CHAT, body(form.format(model)), 404, key="red")
        after = await ended()
        made.append({k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k)})
    assert made[0]
    assert all(each == made[0] for each in made)


async def test_who_must_not_list_adapters_uses_them_by_name_alone(shop: Shop) -> None:
    assert (await shop.web.post(CHAT, body("two"), key="plain")).status_code == 200
    await shop.web.refused(CHAT, body(HUB), 404, key="plain")
    answer = await shop.web.get("/v1/models", key="plain")
    assert answer.status_code == 403
    assert error_of(answer)["type"] == "permission_error"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/one", "/tokenizer_info"])
async def test_nothing_is_told_without_a_key(shop: Shop, path: str) -> None:
    await shop.web.get(path, key=OPS)
    for given in ("", "stranger"):
        answer = await shop.web.get(path, key=given)
        assert answer.status_code == 401
        assert error_of(answer)["code"] == "invalid_api_key"
        assert "oracle" not in answer.text


async def test_rights_are_the_servers_to_decide(shop: Shop) -> None:
    await shop.web.refused(CHAT, body("one"), 401)
    await shop.web.refused(CHAT, body("one"), 401, key="stranger")
    await shop.web.refused(CHAT, body("one"), 403, key="bare")
    await shop.web.refused(CHAT, body("one"), 403, key="noone")
    await shop.web.refused(CHAT, body("main"), 403, key="without-base")
    assert (await shop.web.post(CHAT, body("one"), key="without-base")).status_code == 200


async def test_the_list_has_the_base_first_and_what_the_caller_sees(shop: Shop) -> None:
    found = (await shop.web.get("/v1/models", key=OPS)).json()
    assert found["object"] == "list"
    ids = [card["id"] for card in found["data"]]
    assert ids == ["main", "org/base", NEST, "one", "now", "oracle", PATH, HUB]
    base, *_ = found["data"]
    assert (base["root"], base["parent"]) == ("oracle", None)
    for card in found["data"]:
        assert card["object"] == "model"
        assert card["owned_by"] == "loraplex"
        assert 0 < card["created"] <= time.time()
        assert card["max_model_len"] == 256
    (two,) = [card for card in found["data"] if card["id"] == HUB]
    assert (two["root"], two["parent"]) == ("two", "main")
    mine = (await shop.web.get("/v1/models", key="red")).json()["data"]
    assert {card["id"] for card in mine} == {"main", "org/base", "one", "now", PATH}


@pytest.mark.parametrize("model", ["main", "oracle", "one", "one@1", "live", "main:one", HUB, PATH])
async def test_one_model_is_described_by_every_id(shop: Shop, model: str) -> None:
    answer = await shop.web.get(f"/v1/models/{quote(model, safe='')}", key=OPS)
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == model
    answer = await shop.web.get(f"/v1/models/{quote(model)}", key=OPS)
    assert answer.json()["id"] == model


@pytest.mark.parametrize("model", ["two", HUB, "nobody", "no/thing"])
async def test_one_model_is_described_only_to_those_who_see_it(shop: Shop, model: str) -> None:
    answer = await shop.web.get(f"/v1/models/{model}", key="red")
    assert answer.status_code == 404
    assert error_of(answer)["message"] == f"The model `{model}` does not exist."
