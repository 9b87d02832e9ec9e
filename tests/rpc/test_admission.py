"""The front's bounds on requests and tokens, by account."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.engine.messages import Submit
from loraplex_server.metrics import Metrics
from loraplex_server.rpc.services.admission import Admission
from prometheus_client import CollectorRegistry
from rpc.harness import ask, running


def admission(requests: int = 16, tokens: int = 800) -> Admission:
    return Admission(requests, tokens, Metrics(CollectorRegistry()), reserved=requests // 8)


def test_an_account_that_fills_the_server_leaves_places_to_others() -> None:
    doors, stack = admission(), ExitStack()
    with stack:
        for _ in range(16):
            stack.enter_context(doors.enter("heavy"))
        with pytest.raises(Refusal) as caught:
            doors.enter("heavy")
        assert caught.value.reason is Reason.OVERLOADED
        for _ in range(2):
            stack.enter_context(doors.enter("light"))
        for account in ("light", "heavy", "another"):
            with pytest.raises(Refusal):
                doors.enter(account)
    with doors.enter("heavy"):
        assert doors.running == 0


def test_an_account_whose_prompts_fill_the_queue_leaves_tokens_to_others() -> None:
    doors, stack = admission(), ExitStack()
    with stack:
        heavy, light = (stack.enter_context(doors.enter(name)) for name in ("heavy", "light"))
        heavy.wait(790)
        with pytest.raises(Refusal), doors.enter("heavy") as more:
            more.wait(60)
        light.wait(60)
        with pytest.raises(Refusal), doors.enter("light") as more:
            more.wait(60)  # 120 are more than the reserved eighth
        heavy.run()
        with doors.enter("heavy") as more:
            more.wait(600)
    assert not doors._account_tokens
    assert not doors._accounts


async def test_requests_are_charged_to_their_adapter_and_priorities_are_capped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, max_priority=2) as up:
        await up.register("alpha", 1)
        seen: list[Submit] = []
        submit = up.server.engine.submit

        def noting(request: Submit) -> object:
            seen.append(request)
            return submit(request)

        monkeypatch.setattr(up.server.engine, "submit", noting)
        await up.generation.Generate(ask(new=1, priority=9))
        await up.generation.Generate(ask(new=1, priority=-9, adapter="alpha"))
        await up.generation.Generate(ask(new=1, adapter="alpha@1"))
        assert [(each.account, each.priority) for each in seen] == [
            ("_base", 2),
            ("alpha", -9),
            ("alpha", 0),
        ]
