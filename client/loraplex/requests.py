"""Builds requests from Python arguments.

The server checks ranges. Refused here is only what no message can carry, as an `InvalidRequest`
with the field's name, so that a caller handles one kind of error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from google.protobuf.message import Message as ProtoMessage

from loraplex.errors import invalid
from loraplex.v1 import adapter_pb2, generation_pb2, model_pb2

M = TypeVar("M", bound=ProtoMessage)


# One message of a conversation, as in OpenAI's API: {"role": "user", "content": "Hello"}.
#
# role               "system", "developer", "user", "assistant" or "tool"
# content            a text, or a list of {"type": "text", "text": ...}; None only with tool_calls
# tool_calls         of the assistant: [{"id": ..., "type": "function", "function": {"name": ...,
#                    "arguments": an object, or one as JSON text}}]
# tool_call_id       of the role "tool": the id of the call that it answers
# name, reasoning_content
#
# A key whose value is None counts as left out.
Message = Mapping[str, Any]


class ConversationOptions(TypedDict, total=False):
    """Keywords for conversations of `generate`, `stream` and `render_chat`.

    None means the server's default, like leaving it out.
    """

    tools: Sequence[Mapping[str, Any]] | None  # functions that the model may call
    add_generation_prompt: bool | None  # open the assistant's next message; default true
    continue_final_message: bool | None  # continue the last message; default: the assistant's
    chat_template_kwargs: Mapping[str, Any] | None  # variables, such as {"enable_thinking": False}


class StructureOptions(TypedDict, total=False):
    """Keywords of `generate` and `stream` for structured output; at most one of them.

    None means any text, like leaving it out.
    """

    json_schema: Mapping[str, Any] | bool | str | None  # a JSON schema, or the text of one
    json_object: bool | None  # true: any JSON object
    regex: str | None  # an expression in the syntax of Rust's regex crate; it matches all of it
    choices: Iterable[str] | None  # the completion is one of these texts
    grammar: str | None  # a grammar in the syntax of Lark or llama.cpp (GBNF)


class GenerateOptions(ConversationOptions, StructureOptions, total=False):
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
    max_new_tokens: int | None  # default 256; 0 only computes and scores the prompt
    min_new_tokens: int | None  # until then nothing ends the completion
    stop: Sequence[str] | str | None  # strings that end the completion; they are not returned
    include_stop_string: bool | None  # return the stop string that ended the completion
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None  # continue past the end tokens of the model or adapter
    skip_special_tokens: bool | None  # leave special tokens out of the text; default true

    # How many completions of the prompt there are.
    n: int | None  # 1 to 128; completion i is that of the seed plus i

    # What is reported, and how the request is queued.
    return_prompt_token_ids: bool | None
    logprobs: int | None  # alternatives per generated token; 0: only the chosen token
    prompt_logprobs: int | None  # alternatives per prompt token
    request_id: str | None  # appears in trailers and logs; default: chosen by the server
    priority: int | None  # [-10, 10]; higher is admitted first among requests for the same adapters
    cache_salt: str | None  # share computed prompts only with requests that send the same


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
        "structured_output": _structured_output(options),
        "sampling": part(generation_pb2.SamplingParams, "sampling.", options),
        "stop": fill(
            generation_pb2.StopConditions,
            "stop.",
            max_new_tokens=options.get("max_new_tokens"),
            strings=[stop] if isinstance(stop, str) else stop,
            token_ids=options.get("stop_token_ids"),
            ignore_eos=options.get("ignore_eos"),
            min_new_tokens=options.get("min_new_tokens"),
            include_stop_string=options.get("include_stop_string"),
        ),
    }
    chat = {name: options.get(name) for name in ConversationOptions.__annotations__}
    if messages is not None:
        values["messages"] = _chat(messages, chat)
    elif given := [name for name, value in chat.items() if value is not None]:
        raise invalid(given[0], "is only for conversations: give messages")
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


def render_chat(
    messages: Sequence[Message], adapter: str | None, options: ConversationOptions
) -> model_pb2.RenderChatRequest:
    """Returns the request to render a conversation. Raises InvalidRequest, TypeError."""
    refuse_unknown(options, ConversationOptions)
    chat = _chat(messages, options)
    return fill(model_pb2.RenderChatRequest, adapter_id=adapter, messages=chat)


def _chat(messages: Sequence[Message], options: Mapping[str, Any]) -> generation_pb2.ChatMessages:
    variables, tools = options.get("chat_template_kwargs") or {}, options.get("tools") or ()
    if not isinstance(variables, Mapping):
        raise invalid("chat_template_kwargs", "must be a mapping of names to values")
    return fill(
        generation_pb2.ChatMessages,
        messages=[_message(each, where) for each, where in _each(messages, "messages")],
        tools=[_object(tool, where) for tool, where in _each(tools, "tools")],
        add_generation_prompt=options.get("add_generation_prompt"),
        continue_final_message=options.get("continue_final_message"),
        chat_template_kwargs={name: _variable(name, value) for name, value in variables.items()},
    )


def _each(values: object, where: str) -> Iterator[tuple[Any, str]]:
    """Yields the entries of a list and their places. Raises InvalidRequest if it is no list."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise invalid(where, "must be a list")
    for i, value in enumerate(values):
        yield value, f"{where}[{i}]"


_MESSAGE_KEYS = frozenset(
    ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
)


def _message(message: Message, where: str) -> generation_pb2.ChatMessage:
    if not isinstance(message, Mapping):
        raise invalid(where, 'must be {"role": ..., "content": ...}')
    given = {key: value for key, value in message.items() if value is not None}
    if unknown := given.keys() - _MESSAGE_KEYS:
        raise invalid(where, f"has an unknown key: {', '.join(sorted(map(str, unknown)))}")
    calls, content = given.pop("tool_calls", ()), given.pop("content", None)
    if "role" not in given:
        raise invalid(where, 'has no "role"')
    if content is None and not calls:
        text = 'has no "content"; only a message of the assistant with "tool_calls" may have none'
        raise invalid(where, text)
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        given["parts"] = [_part(each, at) for each, at in _each(content, f"{where}.content")]
        if not content:
            raise invalid(f"{where}.content", "has no part")
    else:
        given["content"] = content
    given["tool_calls"] = [_call(call, at) for call, at in _each(calls, f"{where}.tool_calls")]
    return fill(generation_pb2.ChatMessage, where + ".", **given)


def _part(value: object, where: str) -> generation_pb2.ContentPart:
    if isinstance(value, str):
        value = {"type": "text", "text": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        kind = value.get("type") if isinstance(value, Mapping) else None
        text = f"is of the type {kind}" if kind and kind != "text" else "is not a text"
        raise invalid(where, f'{text}; only {{"type": "text", "text": ...}} is supported')
    return fill(generation_pb2.ContentPart, where + ".", text=value["text"])


def _call(call: object, where: str) -> generation_pb2.ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise invalid(where, 'must be {"function": {"name": ..., "arguments": ...}}')
    return fill(
        generation_pb2.ToolCall,
        where + ".",
        id=call.get("id"),
        name=function.get("name"),
        arguments=_object(function.get("arguments") or {}, where + ".arguments"),
    )


def _object(value: object, where: str) -> str:
    """Returns an object as JSON text, and a text as it is. Raises InvalidRequest."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise invalid(where, "must be an object, or the JSON text of one")
    return _json(value, where)


def _json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(where, f"cannot be written as JSON: {error}") from None


def _variable(name: str, value: object) -> generation_pb2.TemplateValue:
    where = f"chat_template_kwargs[{name}]"
    kind = next((kind for of, kind in _KINDS if isinstance(value, of)), "json_value")
    given = _json(value, where) if kind == "json_value" else value
    return fill(generation_pb2.TemplateValue, where + ".", **{kind: given})


_KINDS = (
    (bool, "bool_value"),  # before int, of which bool is a kind
    (int, "int_value"),
    (float, "double_value"),
    (str, "string_value"),
)


def _structured_output(options: Mapping[str, Any]) -> generation_pb2.StructuredOutput | None:
    """Returns what `options` ask for, of which only those of StructureOptions are looked at.

    None if they ask for nothing. Raises InvalidRequest.
    """
    given = {
        name: value
        for name in StructureOptions.__annotations__
        if (value := options.get(name)) is not None
    }
    if given.get("json_object") is False:
        del given["json_object"]
    if not given:
        return None
    if len(given) > 1:
        raise invalid("structured_output", f"give only one of {' and '.join(given)}")
    ((name, value),) = given.items()
    if name == "json_schema":
        value = _schema_text(value)
    elif name == "choices":
        value = _choices(value)
    return fill(generation_pb2.StructuredOutput, "structured_output.", **{name: value})


def _schema_text(value: object) -> str:
    if isinstance(value, str):
        return value
    where = "structured_output.json_schema"
    if not isinstance(value, Mapping | bool):
        raise invalid(where, "must be a JSON schema: a mapping, or the text of one")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(where, f"cannot be written as JSON: {error}") from None


def _choices(value: object) -> generation_pb2.Choices:
    where = "structured_output.choices"
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise invalid(where, "must be a list of texts")
    try:
        return generation_pb2.Choices(texts=value)
    except (TypeError, ValueError) as error:
        raise invalid(where, str(error)) from None


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
