"""A refusal reaches the client whole or shortened, but never too large for a trailer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.v1 import adapter_pb2
from loraplex_model.base.refusal import Problem, Reason, Refusal, Subject
from loraplex_server.rpc.calls.errors import TABLE, TRAILER_BYTES, Detail, status_of, trailers_of
from rpc.harness import Running, refusal, running, write_adapter
from safetensors.numpy import save_file

pytestmark = pytest.mark.fault("details-overflow")

REQUEST_ID = "r" * 128
HOSTILE = st.builds(
    lambda text, times: text * times,
    st.text(st.characters(codec=None), max_size=40),
    st.sampled_from([1, 3, 100, 1000]),
)


_UNENCODED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
"""What gRPC's protocol leaves as it is in a message: printable ASCII but the percent sign."""


def on_the_wire(error: Refusal) -> int:
    """Bytes of the trailers and the message, with the overhead that HTTP/2 counts."""
    status = status_of(error, REQUEST_ID)
    sent = [("grpc-message", quote(status.message, safe=_UNENCODED)), ("grpc-status", "13")]
    for name, value in trailers_of(status, error, REQUEST_ID):
        size = -(-len(value) // 3) * 4 if isinstance(value, bytes) else len(value)
        sent.append((name, "x" * size))
    return sum(len(name) + len(value) + 32 for name, value in sent)


@pytest.mark.parametrize("reason", list(TABLE), ids=lambda reason: reason.name)
@pytest.mark.parametrize("text", ["x", "é", "\N{PILE OF POO}", "%", "\udcff", "\n"], ids=ascii)
@pytest.mark.parametrize("count", [1, 60, 5000])
def test_the_largest_refusals_fit_a_trailer(reason: Reason, text: str, count: int) -> None:
    problems = [Problem(text * 3000, text * 3000, reason)] * count
    error = Refusal(
        reason, text * 3000, problems=problems, subject=Subject("loraplex.v1.Adapter", text * 3000)
    )
    assert on_the_wire(error) <= TRAILER_BYTES


def test_a_trailer_leaves_room_below_what_peers_accept() -> None:
    assert TRAILER_BYTES <= 6 << 10


@settings(deadline=None)
@given(
    reason=st.sampled_from(list(TABLE)),
    message=HOSTILE,
    problems=st.lists(st.builds(Problem, HOSTILE, HOSTILE), max_size=80),
    name=HOSTILE,
)
def test_hostile_texts_fit_a_trailer(
    reason: Reason, message: str, problems: list[Problem], name: str
) -> None:
    subject = Subject("loraplex.v1.Adapter", name)
    error = Refusal(reason, message, problems=problems, subject=subject)
    assert on_the_wire(error) <= TRAILER_BYTES


@pytest.mark.parametrize("count", [1, 7, 64, 65, 1000])
def test_what_is_left_out_is_counted(count: int) -> None:
    problems = [Problem(f"field[{i}]", f"is wrong in its way number {i}") for i in range(count)]
    error = Refusal(Reason.FIELD_INVALID, "many fields are wrong", problems=problems)
    bad = error_details_pb2.BadRequest()
    assert TABLE[error.reason].detail is Detail.BAD_REQUEST
    assert status_of(error, REQUEST_ID).details[1].Unpack(bad)
    listed = [v for v in bad.field_violations if v.field]
    assert [v.field for v in listed] == [p.field for p in problems[: len(listed)]]
    rest = [v.description for v in bad.field_violations if not v.field]
    assert rest == ([f"and {count - len(listed)} more"] if len(listed) < count else [])
    assert len(listed) >= min(count, 7)


@pytest_asyncio.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as server:
        yield server


async def test_an_adapter_with_many_faults_is_refused_with_its_reason(up: Running) -> None:
    folder = write_adapter(up.folder / "import" / "faulty", 1)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {f"option_{'é' * 150}_{i}": True for i in range(60)}
    file.write_text(json.dumps(config))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await up.adapters.RegisterAdapter(
            adapter_pb2.RegisterAdapterRequest(name="faulty", path="faulty")
        )
    seen = refusal(caught.value)
    assert seen.reason.startswith("ADAPTER_")
    assert seen.trailers["x-request-id"]
    unmet = seen.detail(error_details_pb2.PreconditionFailure).violations
    assert "option_" in unmet[0].subject
    assert unmet[-1].description.startswith("and ")


async def test_sixty_foreign_names_are_one_cause_with_its_reason(up: Running) -> None:
    folder = write_adapter(up.folder / "import" / "compiled", 1)
    file = folder / "adapter_model.safetensors"
    tensors = {
        f"_orig_mod.base_model.model.model.layers.{n}.self_attn.q_proj.lora_{half}.weight": a
        for n in range(30)
        for half, a in (("A", np.ones((2, 8), np.float32)), ("B", np.ones((8, 2), np.float32)))
    }
    save_file(tensors, file)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await up.adapters.RegisterAdapter(
            adapter_pb2.RegisterAdapterRequest(name="compiled", path="compiled")
        )
    seen = refusal(caught.value)
    assert seen.reason == "ADAPTER_INVALID"
    unmet = seen.detail(error_details_pb2.PreconditionFailure).violations
    assert "60 tensors" in unmet[0].description
    assert "_orig_mod." in unmet[0].description
    assert "--convert" in unmet[0].description
