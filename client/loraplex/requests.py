"""Turns Python arguments into requests; shared by both clients.

Ranges are the server's to judge. Refused here is only what no message can carry, as
`InvalidRequest` with the field's name, so that a caller handles one kind of error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, TypeVar, Unpack

from google.protobuf.message import Message as ProtoMessage

from loraplex.errors import invalid
from loraplex.v1 import adapter_pb2, generation_pb2

M = TypeVar("M", bound=ProtoMessage)


# One turn of a conversation: {"role": "system" | "user" | "assistant", "content": ...}.
Message = Mapping[str, str]


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate` and `stream`. None, like leaving out, is the server's default."""

    # The prompt, when it is not the first argument: exactly one of the three.
    messages: Sequence[Message] | None  # a conversation, for the model's chat template
    token_ids: Sequence[int] | None  # ids of the base model's vocabulary

    # The weights: at most one of the two; neither is the bare base model.
    adapter: str | None  # "name", "name@3" or "name@sha256:<hex>"
    mix: Mapping[str, float | None] | None  # adapter id -> factor on its delta; None is 1

    # How the next token is chosen.
    temperature: float | None  # 0 is greedy; default 1
    top_p: float | None  # (0, 1]
    top_k: int | None  # 0 keeps all
    min_p: float | None  # [0, 1]
    repetition_penalty: float | None  # (0, 100]; 1 is none
    presence_penalty: float | None  # [-2, 2]
    frequency_penalty: float | None  # [-2, 2]
    logit_bias: Mapping[int, float] | None  # token id -> addend, [-100, 100]
    seed: int | None  # same seed, prompt and adapter: same tokens

    # When to stop.
    max_new_tokens: int | None  # default 256
    stop: Sequence[str] | str | None  # strings that end the completion, not returned
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None

    # What to report, and how to queue.
    logprobs: int | None  # alternatives per generated token; 0: the chosen one only
    prompt_logprobs: int | None  # the same for the prompt
    request_id: str | None  # echoed in trailers and logs; default: the server's choice
    priority: int | None  # [-100, 100], higher first


def generate(
    prompt: str | None = None, **options: Unpack[GenerateOptions]
) -> generation_pb2.GenerateRequest:
    """The request for `prompt` (or `messages`, or `token_ids`).

    Raises InvalidRequest for arguments that exclude each other or do not fit their field, TypeError
    for an unknown keyword.
    """
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    messages, token_ids = options.get("messages"), options.get("token_ids")
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise invalid("input", "give exactly one of prompt, messages and token_ids")
    if options.get("adapter") and options.get("mix"):
        raise invalid("mix", "give either adapter or mix, not both")
    stop = options.get("stop")
    return fill(
        generation_pb2.GenerateRequest,
        "",
        adapter_id=options.get("adapter"),
        mix=[_weight(name, weight) for name, weight in (options.get("mix") or {}).items()],
        prompt=prompt,
        messages=None if messages is None else _conversation(messages),
        token_ids=(
            None
            if token_ids is None
            else fill(generation_pb2.TokenIds, "token_ids.", ids=token_ids)
        ),
        sampling=fill(
            generation_pb2.SamplingParams,
            "sampling.",
            temperature=options.get("temperature"),
            top_p=options.get("top_p"),
            top_k=options.get("top_k"),
            min_p=options.get("min_p"),
            repetition_penalty=options.get("repetition_penalty"),
            presence_penalty=options.get("presence_penalty"),
            frequency_penalty=options.get("frequency_penalty"),
            logit_bias=options.get("logit_bias"),
            seed=options.get("seed"),
        ),
        stop=fill(
            generation_pb2.StopConditions,
            "stop.",
            max_new_tokens=options.get("max_new_tokens"),
            strings=[stop] if isinstance(stop, str) else stop,
            token_ids=options.get("stop_token_ids"),
            ignore_eos=options.get("ignore_eos"),
        ),
        logprobs=options.get("logprobs"),
        prompt_logprobs=options.get("prompt_logprobs"),
        request_id=options.get("request_id"),
        priority=options.get("priority"),
    )


def register(
    name: str, path: str, replace: bool, load: bool, labels: Mapping[str, str]
) -> adapter_pb2.RegisterAdapterRequest:
    return fill(
        adapter_pb2.RegisterAdapterRequest,
        "",
        name=name,
        path=path,
        replace=replace,
        load=load,
        labels=labels,
    )


def page(size: int, token: str, labels: Mapping[str, str]) -> adapter_pb2.ListAdaptersRequest:
    return fill(
        adapter_pb2.ListAdaptersRequest, "", page_size=size, page_token=token, labels=labels
    )


def unload(adapter_id: str, force: bool, drain: float | None) -> adapter_pb2.UnloadAdapterRequest:
    request = adapter_pb2.UnloadAdapterRequest(adapter_id=adapter_id, force=force)
    if drain is not None:
        try:
            request.drain.FromMilliseconds(round(drain * 1000))
        except (ValueError, OverflowError):
            raise invalid("drain", "must be a number of seconds") from None
    return request


def label(
    adapter_id: str, labels: Mapping[str, str], remove: Sequence[str]
) -> adapter_pb2.LabelAdapterRequest:
    return fill(
        adapter_pb2.LabelAdapterRequest, "", adapter_id=adapter_id, set=labels, remove=remove
    )


def alias(alias: str, adapter_id: str, expected: str | None) -> adapter_pb2.SetAliasRequest:
    return fill(
        adapter_pb2.SetAliasRequest, "", alias=alias, adapter_id=adapter_id, expected=expected
    )


def validate(path: str, upload_id: str) -> adapter_pb2.ValidateAdapterRequest:
    if bool(path) == bool(upload_id):
        raise invalid("source", "give either path or upload_id")
    given = {"path": path} if path else {"upload_id": upload_id}
    return fill(adapter_pb2.ValidateAdapterRequest, "", **given)


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


def fill(kind: type[M], path: str, /, **fields: object) -> M:
    """A message with these fields, None meaning unset; one at a time, to name the one at fault."""
    message = kind()
    for name, value in fields.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            raise invalid(path + name, str(error)) from None
    return message
