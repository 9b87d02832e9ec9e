"""Every status of the error table arrives as the one exception that says what to do."""

from __future__ import annotations

import pickle

import grpc
import loraplex
import pytest
from client.fake_server import Failure, FakeServer, failure
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from loraplex import AsyncClient, Client, FieldViolation, LoraplexError

Code = grpc.StatusCode

BAD = error_details_pb2.BadRequest(
    field_violations=[
        error_details_pb2.BadRequest.FieldViolation(
            field="sampling.top_p", description="must be in (0, 1]"
        )
    ]
)
UNMET = error_details_pb2.PreconditionFailure(
    violations=[
        error_details_pb2.PreconditionFailure.Violation(
            type="BASE", subject="adapters/pirate", description="made for another base"
        )
    ]
)
QUOTA = error_details_pb2.QuotaFailure(
    violations=[
        error_details_pb2.QuotaFailure.Violation(subject="tenant", description="8 requests")
    ]
)
WAIT = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
RESOURCE = error_details_pb2.ResourceInfo(resource_name="pirate")

TOP_P = (FieldViolation("sampling.top_p", "must be in (0, 1]"),)
BASE = (FieldViolation("adapters/pirate", "made for another base"),)

TABLE = [
    (Code.INVALID_ARGUMENT, "FIELD_INVALID", (BAD,), "InvalidRequest", {"violations": TOP_P}),
    (Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG", (BAD,), "InvalidRequest", {"violations": TOP_P}),
    (Code.INVALID_ARGUMENT, "REQUEST_MALFORMED", (), "InvalidRequest", {}),
    (Code.NOT_FOUND, "ADAPTER_NOT_FOUND", (RESOURCE,), "AdapterNotFound", {"resource": "pirate"}),
    (Code.ALREADY_EXISTS, "ADAPTER_CONFLICT", (RESOURCE,), "AdapterConflict", {}),
    (
        Code.FAILED_PRECONDITION,
        "BASE_MODEL_MISMATCH",
        (UNMET,),
        "AdapterRejected",
        {"violations": BASE},
    ),
    (Code.FAILED_PRECONDITION, "RANK_TOO_LARGE", (UNMET,), "AdapterRejected", {}),
    (Code.FAILED_PRECONDITION, "ADAPTER_TOO_LARGE", (), "AdapterRejected", {}),
    (Code.FAILED_PRECONDITION, "SOMETHING_ELSE", (), "FailedPrecondition", {}),
    (Code.INVALID_ARGUMENT, "ADAPTER_INVALID", (), "AdapterRejected", {}),
    (Code.INVALID_ARGUMENT, "ADAPTER_UNSUPPORTED", (), "AdapterRejected", {}),
    (Code.ABORTED, "ADAPTER_UNLOADED", (), "AdapterUnloaded", {}),
    (Code.NOT_FOUND, "JOB_NOT_FOUND", (RESOURCE,), "JobNotFound", {"resource": "pirate"}),
    (Code.ALREADY_EXISTS, "JOB_CONFLICT", (RESOURCE,), "JobConflict", {}),
    (Code.FAILED_PRECONDITION, "TRAINING_DISABLED", (UNMET,), "FailedPrecondition", {}),
    (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", (), "DeadlineExceeded", {}),
    (Code.CANCELLED, "", (), "Cancelled", {}),
    (Code.PERMISSION_DENIED, "PERMISSION_DENIED", (), "PermissionDenied", {}),
    (Code.UNAUTHENTICATED, "CREDENTIALS_MISSING", (), "Unauthenticated", {}),
    (Code.UNAUTHENTICATED, "CREDENTIALS_INVALID", (), "Unauthenticated", {}),
    (Code.UNAUTHENTICATED, "", (), "Unauthenticated", {}),
    (
        Code.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
        (QUOTA, WAIT),
        "QuotaExceeded",
        {"retry_after": 1.5},
    ),
    (Code.RESOURCE_EXHAUSTED, "QUOTA", (QUOTA, WAIT), "ResourceExhausted", {"retry_after": 1.5}),
    (Code.UNIMPLEMENTED, "", (), "Unsupported", {}),
    (Code.INTERNAL, "NON_FINITE_LOGITS", (), "ServerFault", {}),
    (Code.INTERNAL, "ENGINE_FAULT", (), "ServerFault", {}),
    (Code.UNKNOWN, "", (), "ServerFault", {}),
    (Code.ABORTED, "", (), "LoraplexError", {}),
]


@pytest.mark.parametrize(("code", "reason", "details", "kind", "known"), TABLE)
async def test_a_status_becomes_its_error(
    server: FakeServer, client: Client, code, reason, details, kind, known
):
    scripted = failure(code, reason, *details, adapter="pirate")
    scripted = Failure(code, scripted.message, scripted.details, (("x-request-id", "request-7"),))
    server.failures = [scripted] * 4
    caught: list[LoraplexError] = []
    for call in (client.generate, lambda text: list(client.stream(text))):
        with pytest.raises(LoraplexError) as raised:
            call("x")
        caught.append(raised.value)
    async with AsyncClient(server.target) as async_client:
        with pytest.raises(LoraplexError) as raised:
            await async_client.generate("x")
        caught.append(raised.value)
        with pytest.raises(LoraplexError) as raised:
            await async_client.stream("x").completion()
        caught.append(raised.value)
    for error in caught:
        assert type(error) is getattr(loraplex, kind)
        assert (error.code, error.reason) == (code, reason)
        assert error.message == f"this is {reason}"
        assert error.metadata == {"adapter": "pirate"}
        assert error.request_id == "request-7"
        for name, value in known.items():
            assert getattr(error, name) == value
    assert all(error.details == caught[0].details for error in caught)


@pytest.mark.parametrize("reason", ["OVERLOADED", "DRAINING", "ENGINE_RESTARTED"])
def test_an_unavailable_server_says_when_to_come_back(server: FakeServer, client: Client, reason):
    server.failures = [failure(Code.UNAVAILABLE, reason, WAIT)] * 4
    with pytest.raises(loraplex.Unavailable) as caught:
        client.generate("x")
    assert (caught.value.reason, caught.value.retry_after) == (reason, 1.5)


def test_no_server_is_unavailable_without_a_reason():
    with Client("127.0.0.1:1") as client, pytest.raises(loraplex.Unavailable) as caught:
        client.generate("x")
    assert caught.value.reason == ""
    assert caught.value.retry_after is None


def test_waiting_for_a_server_ends_at_the_deadline():
    with (
        Client("127.0.0.1:1", wait_for_ready=True) as client,
        pytest.raises(loraplex.DeadlineExceeded),
    ):
        client.generate("x", timeout=0.3)


def test_a_bare_status_needs_no_details(server: FakeServer, client: Client):
    server.failures = [Failure(Code.NOT_FOUND, "no such thing")]
    with pytest.raises(loraplex.NotFound) as caught:
        client.generate("x")
    assert (caught.value.reason, str(caught.value)) == ("", "no such thing")


@pytest.mark.parametrize(
    "trailer",
    [
        b"\xff\xff\xff not a status",
        status_pb2.Status(code=5, message="another message").SerializeToString(),
        status_pb2.Status(code=3, message="scripted").SerializeToString(),
    ],
)
def test_unsound_details_are_ignored(server: FakeServer, client: Client, trailer):
    server.failures = [Failure(Code.NOT_FOUND, trailers=(("grpc-status-details-bin", trailer),))]
    with pytest.raises(loraplex.NotFound) as caught:
        client.generate("x")
    assert caught.value.reason == ""


def test_unknown_details_are_skipped(server: FakeServer, client: Client):
    server.failures = [failure(Code.NOT_FOUND, "NEW", error_details_pb2.Help(), RESOURCE)]
    with pytest.raises(loraplex.NotFound) as caught:
        client.generate("x")
    assert (caught.value.reason, caught.value.resource) == ("NEW", "pirate")


def test_an_error_reads_well_and_says_each_thing_once(server: FakeServer, client: Client):
    server.failures = [failure(Code.INVALID_ARGUMENT, "FIELD_INVALID", BAD)]
    with pytest.raises(loraplex.InvalidRequest) as caught:
        client.generate("x")
    expected = "this is FIELD_INVALID [sampling.top_p: must be in (0, 1]] (FIELD_INVALID)"
    assert str(caught.value) == expected


def test_an_error_survives_pickling(server: FakeServer, client: Client):
    server.failures = [failure(Code.NOT_FOUND, "ADAPTER_NOT_FOUND", RESOURCE)]
    with pytest.raises(loraplex.AdapterNotFound) as caught:
        client.generate("x")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is loraplex.AdapterNotFound
    assert copy.details == caught.value.details
