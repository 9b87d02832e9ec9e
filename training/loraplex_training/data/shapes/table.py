"""The shapes of an example, as rows: which keys each has, and what they become.

`markdown` prints them; docs/training.md quotes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loraplex_training.data.shapes.conversation import LEARN_KEYS, ROLES

CHATS: Final = ("messages", "conversations", "conversation", "dialogue", "dialog")
"""Keys that hold a conversation; each is also the name of its shape."""

EXCHANGES: Final[Mapping[str, str]] = {
    "prompt": "completion",
    "instruction": "output",
    "question": "answer",
    "query": "response",
    "problem": "solution",
    "user": "assistant",
    "input": "output",
}
"""Keys of what is asked, each with the usual key of its answer; each is the name of its shape."""
ANSWERS: Final = tuple(dict.fromkeys(EXCHANGES.values()))
"""Keys of an answer; each may stand beside each key of what is asked."""
CONTEXTS: Final = ("input", "context")
"""Keys of a further text, which follows what is asked after an empty line."""
SYSTEMS: Final = ("system", "system_prompt", "system_message")
"""Keys of a system message; an empty one is none."""
HISTORY: Final = "history"
"""Key of earlier exchanges, [[asked, answered], …], which are given, not learned."""
TOOLS: Final = ("tools", "functions")
"""Keys of descriptions of tools, as a list or as JSON in a string."""
VARIABLES: Final = "chat_template_kwargs"
"""Key of further variables of the chat template."""
TEXT: Final = "text"
"""Key of a raw text. Beside another shape it may be a rendered copy, which is ignored."""

NOTES: Final = frozenset(
    {
        *("id", "uid", "uuid", "idx", "index", "meta", "metadata", "source", "origin", "tags"),
        *("category", "comment", "note", "license", "url", "lang", "language", "split"),
        *("prompt_id", "question_id", "conversation_id", "dataset", "subset", "timestamp"),
        *("created_at", "model_name", "turn", "redacted", "openai_moderation", "difficulty"),
    }
)
"""Keys with information about an example, which are ignored; also all that start with "_"."""
REQUEST: Final = frozenset(
    {
        *("model", "temperature", "top_p", "n", "seed", "stop", "stream", "max_tokens", "store"),
        *("max_completion_tokens", "parallel_tool_calls", "tool_choice", "function_call"),
        *("response_format", "frequency_penalty", "presence_penalty", "logprobs", "logit_bias"),
        *("reasoning_effort", "top_logprobs", "service_tier", "stream_options", "user"),
    }
)
"""Keys of a request for a conversation, which are ignored beside one."""

PAIRS: Final = ("chosen", "rejected")
MEDIA: Final = ("image", "images", "audio", "audios", "video", "videos")
TOKENISED: Final = "input_ids"

NAMES: Final = (*CHATS, *EXCHANGES, TEXT)
"""Names of the shapes."""
KEYS: Final = frozenset({*NAMES, *ANSWERS, *CONTEXTS, *PAIRS, TOKENISED})
"""Keys by which an example, or a table of examples, is recognised."""
WANTED: Final = (
    '{"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "input", '
    '"output"}, {"question", "answer"} or {"text"}'
)


@dataclass(frozen=True, slots=True)
class _Row:
    line: str
    read: str
    learned: str


_TURN: Final = '{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}'
_SHARED: Final = '{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}'


def markdown() -> str:
    """Returns the shapes as Markdown: a table, and what may stand beside them."""
    answers, contexts = _or(ANSWERS), _or(CONTEXTS)
    chats = "every answer of the assistant"
    rows = [
        _Row(f'{{"messages": [{_TURN}]}}', "a conversation", chats),
        _Row(f'{{"conversations": [{_SHARED}]}}', "the same (ShareGPT)", chats),
        _Row(
            '{"instruction": "…", "input": "…", "output": "…"}',
            "an instruction with a text and its answer (Alpaca)",
            "`output`",
        ),
        _Row(
            '{"instruction": "…", "context": "…", "response": "…", "category": "…"}',
            "the same (Dolly)",
            "`response`",
        ),
        *(
            _Row(f'{{"{asked}": "…", "{answer}": "…"}}', "a question and its answer", f"`{answer}`")
            for asked, answer in EXCHANGES.items()
        ),
        _Row('{"prompt": […], "completion": […]}', "lists of messages", "`completion`"),
        _Row('{"text": "…"}', "raw text", "all of it"),
    ]
    lines = ["| line | read as | learned with `--learn auto` |", "|---|---|---|"]
    lines += [f"| `{row.line}` | {row.read} | {row.learned} |" for row in rows]
    roles = "; ".join(
        f"{_or(names)} → {'a call of a tool as JSON' if role == 'call' else f'`{role}`'}"
        for role, names in ROLES.items()
        if names != (role,)
    )
    beside = [
        f"- **Conversations** may be under {_or(CHATS)}. A message has `role` or `from`, and "
        "`content` or `value`.",
        f"- **Roles**: `system`, `developer`; {roles}.",
        "- **Content** is a string, or a list of parts of the type `text`. It may be absent beside "
        "`tool_calls` (or `function_call`). `name`, `tool_call_id` and `reasoning_content` are "
        "given to the template.",
        f"- **Messages that are not learned** have 0 or false under {_or(LEARN_KEYS)}.",
        f"- **Answers** of questions may each be under {answers}, and a further text under "
        f"{contexts}: it follows the question after an empty line.",
        f"- **A system message** may be under {_or(SYSTEMS)}; earlier exchanges under `{HISTORY}`, "
        "as `[[question, answer], …]`; tools under "
        f"{_or(TOOLS)}; variables of the template under `{VARIABLES}`.",
        "- **Copies** are ignored: `prompt` beside a conversation whose first question it is, and "
        "`text` that contains the question and the answer.",
        f"- **Ignored and counted**: {_and(NOTES)}, keys that start with `_`, and beside a "
        f"conversation {_and(REQUEST)}.",
        f"- **Refused**: preference pairs ({_and(PAIRS)}) and `completion` with `label`, tokenised "
        f"examples (`{TOKENISED}`), {_and(MEDIA)}, and parts of content that are not text.",
    ]
    return "\n".join([*lines, "", *beside])


def _or(names: tuple[str, ...]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _and(names: frozenset[str] | tuple[str, ...]) -> str:
    ordered = sorted(names) if isinstance(names, frozenset) else names
    return ", ".join(f"`{name}`" for name in ordered)
