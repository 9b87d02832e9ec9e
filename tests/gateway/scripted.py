"""A server whose model says a given text, behind a gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.harness import Web, gateway
from openai import AsyncOpenAI
from rpc.harness import EOS, HARMLESS, VOCAB, make_tokenizer

MARK = VOCAB - 1
"""The token after which the model says its text; the template ends with it."""

TEMPLATE = """{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>
{{- {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</tool_call>
{%- endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>MARK{% endif %}"""


def tokens(text: str, ends: bool = True) -> list[int]:
    """The tokens of a text, and the one that ends it."""
    return [*make_tokenizer().encode(text).ids, *([EOS] if ends else [])]


@asynccontextmanager
async def saying(
    folder: Path,
    text: str,
    ends: bool = True,
    template: str = TEMPLATE,
    engine: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Web]:
    """A gateway before a model that says `text`, and then stops if it `ends`.

    `engine` has further options of the oracle.
    """
    mark = make_tokenizer().id_to_token(MARK)
    file = folder / "template.jinja"
    file.write_text(template.replace("MARK", mark))
    options = {
        "scripts": {MARK: tokens(text, ends)},
        "num_blocks": 512,
        **HARMLESS,
        **(engine or {}),
    }
    settings = {"chat_template": file, "engine_options": options, **settings}
    async with gateway(folder, **settings) as (_, web):
        yield web


def openai_client(web: Web, **options: Any) -> AsyncOpenAI:
    """OpenAI's own client, which does not repeat requests by itself."""
    return AsyncOpenAI(base_url=f"{web.url}/v1", api_key="x", max_retries=0, **options)
