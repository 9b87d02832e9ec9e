"""The names of what a job makes: the adapter's, and the model ids over HTTP.

A job with the suffix "My Bot!" makes the adapter `my-bot-1a2b3c4d`. It has the model id
`ft:<base>::My Bot!:1a2b3c4d`, too, as its label `loraplex.dev/model-id`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final

from loraplex_gateway.errors import ApiError

MAX_SUFFIX: Final = 64
UNSUFFIXED: Final = "ft"

_MAX_NAME: Final = 50
"""Characters of a name that leave room for the step of a checkpoint."""
_MAX_MODEL_ID: Final = 230
"""Characters of a model id that leave room for it, too; a label's value has at most 256."""
_KEY_DIGITS: Final = 8
_OTHERS: Final = re.compile(r"[^a-z0-9]+")
_JOB: Final = re.compile(r"ftjob-([0-9a-f]{12}-[0-9a-f]{8})", re.ASCII)
_EVENT: Final = re.compile(r"ftevent-[0-9a-f]{12}-[0-9a-f]{8}-([0-9]{1,9})", re.ASCII)


def new_key(idempotency_key: str) -> str:
    """Tells the adapters of jobs with one suffix apart; equal for equal idempotency keys."""
    if idempotency_key:
        return hashlib.sha256(idempotency_key.encode()).hexdigest()[:_KEY_DIGITS]
    return secrets.token_hex(_KEY_DIGITS // 2)


def adapter_name(suffix: str, key: str) -> str:
    """The adapter's name, which the server takes whatever the suffix is."""
    room = _MAX_NAME - len(key) - 1
    legal = _OTHERS.sub("-", suffix.lower()).strip("-")[:room].strip("-")
    return f"{legal or UNSUFFIXED}-{key}"


def model_id(base: str, suffix: str, key: str) -> str:
    """The model id, in OpenAI's form; organisations do not exist here."""
    rest = f"::{suffix}:{key}"
    return f"ft:{base[: _MAX_MODEL_ID - len(rest) - 3]}{rest}"


def checkpoint_model_id(model: str, step: int) -> str:
    """The model id of a checkpoint, as the server labels it."""
    return f"{model}:ckpt-step-{step}"


def job_id(job: str) -> str:
    """The id of a job over HTTP."""
    return f"ftjob-{job}"


def server_job_id(job: str, param: str = "fine_tuning_job_id") -> str:
    """The server's id of a job. Raises ApiError (404) for what cannot be the id of one."""
    found = _JOB.fullmatch(job)
    if found is None:
        raise no_job(job, param)
    return found[1]


def event_number(event: str) -> int:
    """The number of an event within its job. Raises ApiError (404)."""
    found = _EVENT.fullmatch(event)
    if found is None:
        text = f"No such event: {event[:100]}"
        raise ApiError(404, text, param="after", code="event_not_found")
    return int(found[1])


def no_job(job: str, param: str = "fine_tuning_job_id") -> ApiError:
    """The error for a job that does not exist for the caller."""
    text = f"Could not find fine tune: {job[:100]}"
    return ApiError(404, text, param=param, code="fine_tune_not_found")
