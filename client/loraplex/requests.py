"""Builds requests from Python arguments.

The server checks ranges. Refused here is only what no message can carry, as an `InvalidRequest`
with the field's name, so that a caller handles one kind of error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from google.protobuf.message import Message as ProtoMessage

from loraplex.errors import invalid
from loraplex.v1 import adapter_pb2, generation_pb2

M = TypeVar("M", bound=ProtoMessage)


# One message of a conversation: {"role": "system" | "user" | "assistant", "content": ...}.
Message = Mapping[str, str]


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate` and `stream`. None means the server's default, like leaving it out."""

    # The prompt, unless it is the first argument: exactly one of the three.
    messages: Sequence[Message] | None  # a conversation, for the model's chat template
    token_ids: Sequence[int] | None  # ids of the base model's vocabulary

    # The adapter or a mix of adapters, not both; the bare base model without either.
    adapter: str | None  # "name", "name@3" or "name@sha256:<hex>"
    mix: Mapping[str, float | None] | None  # adapter id -> factor on its delta; None means 1

    # How the next token is chosen.
    temperature: float | None  # 0 means greedy; default 1
    top_p: float | None  # (0, 1]
    top_k: int | None  # 0 keeps all tokens
    min_p: float | None  # [0, 1]
    repetition_penalty: float | None  # (0, 100]; 1 means no penalty
    presence_penalty: float | None  # [-2, 2]
    frequency_penalty: float | None  # [-2, 2]
    logit_bias: Mapping[int, float] | None  # token id -> addend, [-100, 100]
    seed: int | None  # the same seed, prompt and adapter give the same tokens

    # When the completion ends.
    max_new_tokens: int | None  # default 256
    stop: Sequence[str] | str | None  # strings that end the completion; they are not returned
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None  # continue past the end-of-sequence token

    # What is reported, and how the request is queued.
    logprobs: int | None  # alternatives per generated token; 0: only the chosen token
    prompt_logprobs: int | None  # alternatives per prompt token
    request_id: str | None  # appears in trailers and logs; default: chosen by the server
    priority: int | None  # [-100, 100]; higher is admitted first


def generate(
    prompt: str | None = None, **options: Unpack[GenerateOptions]
) -> generation_pb2.GenerateRequest:
    """Returns the request for `prompt`, or for the options `messages` or `token_ids`.

    Raises InvalidRequest for arguments that exclude each other or do not fit their field, and
    TypeError for an unknown keyword.
    """
    refuse_unknown(options, GenerateOptions)
    messages, token_ids = options.get("messages"), options.get("token_ids")
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise invalid("input", "give exactly one of prompt, messages and token_ids")
    if options.get("adapter") and options.get("mix"):
        raise invalid("mix", "give either adapter or mix, not both")
    stop = options.get("stop")
    values: dict[str, Any] = {
        **options,
        "prompt": prompt,
        "adapter_id": options.get("adapter"),
        "mix": [_weight(name, weight) for name, weight in (options.get("mix") or {}).items()],
        "sampling": part(generation_pb2.SamplingParams, "sampling.", options),
        "stop": fill(
            generation_pb2.StopConditions,
            "stop.",
            max_new_tokens=options.get("max_new_tokens"),
            strings=[stop] if isinstance(stop, str) else stop,
            token_ids=options.get("stop_token_ids"),
            ignore_eos=options.get("ignore_eos"),
        ),
    }
    if messages is not None:
        values["messages"] = _conversation(messages)
    if token_ids is not None:
        values["token_ids"] = fill(generation_pb2.TokenIds, "token_ids.", ids=token_ids)
    return part(generation_pb2.GenerateRequest, "", values)


def unload(adapter_id: str, force: bool, drain: float | None) -> adapter_pb2.UnloadAdapterRequest:
    """Returns the request; `drain` is in seconds. Raises InvalidRequest."""
    request = adapter_pb2.UnloadAdapterRequest(adapter_id=adapter_id, force=force)
    if drain is not None:
        try:
            request.drain.FromMilliseconds(round(drain * 1000))
        except (ValueError, OverflowError):
            raise invalid("drain", "must be a number of seconds") from None
    return request


def validate(
    path: str, upload_id: str, other_files: Sequence[str] = ()
) -> adapter_pb2.ValidateAdapterRequest:
    """Returns the request for a path or an upload. Raises InvalidRequest unless one is given."""
    if bool(path) == bool(upload_id):
        raise invalid("source", "give either path or upload_id")
    given = {"path": path} if path else {"upload_id": upload_id}
    return fill(adapter_pb2.ValidateAdapterRequest, other_files=other_files, **given)


def _conversation(messages: Sequence[Message]) -> generation_pb2.ChatMessages:
    turns = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise invalid(where, 'must be {"role": ..., "content": ...}')
        turns.append(fill(generation_pb2.ChatMessage, where + ".", **message))
    return generation_pb2.ChatMessages(messages=turns)


def _weight(adapter_id: str, weight: float | None) -> generation_pb2.AdapterWeight:
    return fill(
        generation_pb2.AdapterWeight, f"mix[{adapter_id}].", adapter_id=adapter_id, weight=weight
    )


def refuse_unknown(options: Mapping[str, object], known: type) -> None:
    """Raises TypeError for a keyword that is not a key of the TypedDict `known`."""
    unknown = options.keys() - known.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")


def part(kind: type[M], within: str, values: Mapping[str, Any]) -> M:
    """Returns a message of those `values` that are named like its fields, as `fill` does."""
    names = kind.DESCRIPTOR.fields_by_name
    return fill(kind, within, **{name: values.get(name) for name in names})


def fill(kind: type[M], within: str = "", /, **fields: object) -> M:
    """Returns a message with these fields; those that are None stay unset.

    Raises InvalidRequest that names the field at fault, with the prefix `within`.
    """
    message = kind()
    for name, value in fields.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            raise invalid(within + name, str(error)) from None
    return message
