"""Chat templates in the styles of known models, byte for byte as transformers renders them."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate, TextRefused
from model.chat_styles import SPECIAL_TOKENS, STYLES
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template


@dataclass(frozen=True)
class Takes:
    """What a style takes, as its template reads."""

    parts: bool = False
    system: bool = True
    developer: bool = False
    calls: bool = False
    answers: bool = False
    text_arguments: bool = False
    tools: bool = False
    variables: tuple[str, ...] = ()


TAKES = {
    "chatml": Takes(developer=True, answers=True),
    "generation": Takes(developer=True, answers=True),
    "llama2": Takes(),
    "llama3": Takes(developer=True, answers=True),
    "llama3_tools": Takes(
        developer=True,
        calls=True,
        answers=True,
        tools=True,
        variables=("custom_tools", "date_string"),
    ),
    "mistral1": Takes(system=False),
    "mistral3": Takes(calls=True, answers=True, tools=True),
    "tekken": Takes(parts=True),
    "qwen2.5": Takes(calls=True, answers=True, tools=True),
    "qwen3": Takes(calls=True, answers=True, tools=True, variables=("enable_thinking",)),
    "gemma2": Takes(system=False),
    "gemma3": Takes(parts=True),
    "phi3": Takes(),
    "phi4": Takes(developer=True, answers=True),
    "smollm3": Takes(
        answers=True, tools=True, variables=("enable_thinking", "python_tools", "xml_tools")
    ),
    "granite": Takes(developer=True, calls=True, answers=True, tools=True, variables=("controls",)),
    "command_r": Takes(calls=True, answers=True, tools=True),
    "deepseek": Takes(calls=True, answers=True, text_arguments=True, variables=("thinking",)),
    "zephyr": Takes(),
    "olmo": Takes(),
    "glm4": Takes(
        parts=True,
        developer=True,
        calls=True,
        answers=True,
        tools=True,
        variables=("enable_thinking",),
    ),
    "hermes": Takes(calls=True, answers=True, tools=True),
    "falcon": Takes(),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town <now> & later, für Größe 日本",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "a 'town'"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}


def message(role: str, content: Any, **further: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **further}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def calling(arguments: dict[str, Any], content: str = "") -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return message("assistant", content, tool_calls=[call])


ANSWER = message("tool", '{"sun": "yes ☀"}', tool_call_id="abcdefghi", name="weather")
SYSTEM, HELLO = message("system", ' Be "short" & <kind>.\n'), message("user", "  Grüße, 日本 😀\n")

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [HELLO],
    "system": [SYSTEM, HELLO],
    "system /no_think": [message("system", "Be kind. /no_think"), HELLO],
    "turns": [SYSTEM, HELLO, message("assistant", "Hi \n"), message("user", "{{ 7*7 }}\r\n\n{% x")],
    "answered": [HELLO, message("assistant", "<think>\nhm\n</think>\n\nHello  ")],
    "empty": [message("user", ""), message("assistant", "")],
    "wrong order": [message("assistant", "Hi"), message("assistant", "again")],
    "late system": [HELLO, message("assistant", "Hi"), SYSTEM, HELLO],
    "reasoning": [
        HELLO,
        message("assistant", "4", reasoning_content="\n2 + 2\n"),
        message("user", "and 3 + 3?"),
        message("assistant", "6", reasoning_content="easy"),
    ],
    "other reasoning": [HELLO, message("assistant", "4", reasoning="2 + 2")],
    "thinking": [HELLO, message("assistant", "4", thinking="3 + 1")],
    "parts": [message("system", parts("Be kind.")), message("user", parts("one ", " two"))],
    "developer": [message("developer", "Be terse."), HELLO],
    "call": [HELLO, calling({"city": "Köln", "days": [1, 2]}), ANSWER],
    "call with text": [HELLO, calling({"city": "Ulm"}, "I will see."), ANSWER, ANSWER],
    "call answered": [HELLO, calling({"city": "Ulm"}), ANSWER, message("assistant", "Sunny.")],
    "call without content": [
        HELLO,
        {k: v for k, v in calling({"city": "Ulm"}).items() if k != "content"},
        ANSWER,
    ],
}

MODES: dict[str, dict[str, bool]] = {
    "closed": {"add_generation_prompt": False, "continue_final_message": False},
    "opened": {"add_generation_prompt": True, "continue_final_message": False},
    "continued": {"add_generation_prompt": False, "continue_final_message": True},
}


@cache
def template(style: str) -> ChatTemplate:
    return ChatTemplate(STYLES[style], SPECIAL_TOKENS)


@cache
def oracle(style: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
    found.chat_template = STYLES[style]
    return found


def as_taken(chat: list[dict[str, Any]], takes: Takes) -> list[dict[str, Any]] | None:
    """The messages as they must reach the template; None if they must be refused."""
    taken = copy.deepcopy(chat)
    for item in taken:
        if item["role"] == "developer" and not takes.developer:
            item["role"] = "system"
        if isinstance(item.get("content"), list) and not takes.parts:
            item["content"] = "\n".join(part["text"] for part in item["content"])
        if item.get("tool_calls") and not takes.calls:
            return None
        if item["role"] == "tool" and not takes.answers:
            return None
        for call in item.get("tool_calls", ()) if takes.text_arguments else ():
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            call["function"]["arguments"] = text
    return taken


def expected(
    style: str, chat: list[dict[str, Any]], tools: bool, mode: dict[str, bool], **kwargs: Any
) -> str | None:
    """What transformers renders; None if it raises."""
    taken = as_taken(chat, TAKES[style])
    if taken is None or (tools and not TAKES[style].tools):
        return None
    try:
        rendered = oracle(style).apply_chat_template(
            taken, tools=[WEATHER] if tools else None, tokenize=False, **mode, **kwargs
        )
    except Exception:
        return None
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_rendered_as_transformers_renders_it(style: str) -> None:
    rendered = 0
    for (name, chat), (mode_name, mode), tools in itertools.product(
        CONVERSATIONS.items(), MODES.items(), (False, True)
    ):
        wanted = expected(style, chat, tools, mode)
        options = ChatOptions(**mode, tools=[WEATHER] if tools else ())  # type: ignore[arg-type]
        before = copy.deepcopy(chat)
        try:
            found = template(style).render(chat, options)
        except TextRefused:
            found = None
        assert found == wanted, (name, mode_name, tools)
        assert chat == before, "the caller's messages are left as they were"
        rendered += wanted is not None
    assert rendered >= 15


@pytest.mark.parametrize("style", STYLES)
def test_what_a_style_takes_is_found_out(style: str) -> None:
    takes, able = TAKES[style], template(style).abilities
    assert able.parts == takes.parts
    assert able.tool_calls == takes.calls
    assert able.developer == takes.developer
    assert able.text_arguments == takes.text_arguments or not takes.calls
    assert template(style).takes_tools == takes.tools
    assert template(style).variables == takes.variables


@pytest.mark.parametrize(
    ("style", "variables"),
    [
        ("qwen3", {"enable_thinking": False}),
        ("qwen3", {"enable_thinking": True}),
        ("smollm3", {"enable_thinking": False}),
        ("smollm3", {"xml_tools": ["<a>", {"b": 1}]}),
        ("granite", {"controls": {"z": "é", "a": [1, 2.5, None, True]}}),
        ("deepseek", {"thinking": True}),
        ("glm4", {"enable_thinking": False}),
        ("llama3_tools", {"date_string": "1 May 2026"}),
        ("llama3_tools", {"custom_tools": [{"name": "own"}]}),
    ],
)
def test_variables_reach_the_template(style: str, variables: dict[str, Any]) -> None:
    mode = MODES["opened"]
    wanted = expected(style, CONVERSATIONS["system"], False, mode, **variables)
    options = ChatOptions(add_generation_prompt=True, variables=variables)
    assert template(style).render(CONVERSATIONS["system"], options) == wanted
    assert wanted != template(style).render(CONVERSATIONS["system"]) or True in variables.values()


def test_a_variable_that_the_template_does_not_read_is_refused_with_those_it_reads() -> None:
    for name in ("enable_thinkin", "messages", "bos_token", "range", "namespace", "loop"):
        with pytest.raises(TextRefused, match=rf"no variable '{name}'.*it has: enable_thinking$"):
            template("qwen3").render([HELLO], ChatOptions(variables={name: "x"}))
    with pytest.raises(TextRefused, match="it has: none"):
        template("chatml").render([HELLO], ChatOptions(variables={"enable_thinking": True}))


def test_a_template_says_itself_what_it_does_not_accept() -> None:
    with pytest.raises(TextRefused, match=r"refuses: System role not supported$"):
        template("gemma2").render([SYSTEM, HELLO])
    with pytest.raises(TextRefused, match=r"refuses: Unknown role: critic$"):
        template("falcon").render([message("critic", "x")])
    short = copy.deepcopy(CONVERSATIONS["call"])
    short[1]["tool_calls"][0]["id"] = "a"
    with pytest.raises(TextRefused, match="alphanumeric strings with length 9"):
        template("mistral3").render(short)


def test_what_a_template_would_leave_out_is_refused_with_the_reason() -> None:
    with pytest.raises(TextRefused, match="leaves messages of the role tool out"):
        template("zephyr").render([HELLO, ANSWER])
    with pytest.raises(TextRefused, match="leaves tool calls out"):
        template("chatml").render([HELLO, calling({"city": "Ulm"})])
    with pytest.raises(TextRefused, match="does not read tools"):
        template("llama3").render([HELLO], ChatOptions(tools=[WEATHER]))
    without_system = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    template_without = ChatTemplate(without_system, {})
    with pytest.raises(TextRefused, match="leaves messages of the role system out"):
        template_without.render([message("system", "Be kind."), HELLO])
    assert template_without.render([message("developer", "Be kind."), HELLO]).startswith("Be kind.")


def test_parts_are_joined_by_line_breaks_where_a_template_takes_only_texts() -> None:
    chat = [message("user", parts("one ", "two"))]
    assert "user\none \ntwo<|im_end|>" in template("chatml").render(chat)
    assert "[INST]one two[/INST]" in template("tekken").render(chat)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("text", ["Sure,", " Sure, \n", "", "  ", "</s>\n", "a\U0001fffeb"])
@pytest.mark.parametrize("as_parts", [False, True])
def test_an_answer_is_continued_as_transformers_continues_it(
    style: str, text: str, as_parts: bool
) -> None:
    chat = [HELLO, message("assistant", parts(text) if as_parts else text)]
    wanted = expected(style, chat, False, MODES["continued"])
    for options in (ChatOptions(), ChatOptions(continue_final_message=True)):
        try:
            found = template(style).render(chat, options)
        except TextRefused:
            found = None
        assert found == wanted


def test_by_itself_only_an_answer_is_continued() -> None:
    chatml = template("chatml")
    opened = chatml.render([HELLO], ChatOptions(add_generation_prompt=True))
    assert chatml.render([HELLO]) == opened
    closed = ChatOptions(add_generation_prompt=False, continue_final_message=False)
    assert opened == chatml.render([HELLO], closed) + "<|im_start|>assistant\n"
    wanted = expected("chatml", [HELLO], False, MODES["continued"])
    assert chatml.render([HELLO], ChatOptions(continue_final_message=True)) == wanted
    with pytest.raises(TextRefused, match="exclude each other"):
        chatml.render([HELLO], ChatOptions(True, True))
    with pytest.raises(TextRefused, match="no text to continue"):
        chatml.render([HELLO, {"role": "assistant"}])
    upper = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}", {})
    with pytest.raises(TextRefused, match="cannot be continued"):
        upper.render([HELLO, message("assistant", "Sure")])


EXPRESSIONS = [
    "{{ value | tojson }}",
    "{{ value | tojson(ensure_ascii=True) }}",
    "{{ value | tojson(ensure_ascii=false, indent=2) }}",
    "{{ value | tojson(indent='\t', separators=(', ', ' : ')) }}",
    "{{ value | tojson(true, 1, (';', '='), true) }}",
    "{{ value | tojson(sort_keys=True) | length }}",
    "{{ value }}{{ none }}{{ true }}{{ 1.50 }}{{ missing }}{{ value.missing }}",
    "{{ value | dictsort(true, 'key', true) | map('first') | join('-') }}",
    "{% for k, v in value | items %}{{ loop.index0 ~ k }}{% endfor %}",
    "{% for k in value if k is not in ['b'] %}{{ loop.cycle('x', 'y') ~ k }}{% else %}"
    "n{% endfor %}",
    "{{ value.list[::-1] | list }}{{ value.list[1:] }}{{ value.b[:-1] }}{{ value['b'][0] }}",
    "{{ value.list | sum }}{{ value.list | map('string') | list }}"
    "{{ value.list | batch(2) | list }}",
    "{{ [[1], [2]] | sum(start=[]) }}{{ value.list | reverse | join(',') }}{{ (1, 2)[0] }}",
    "{{ '%s|%5.2f|%(x)s' | replace('%(x)s', '') % ('a', 2) }}{{ '%(k)s' % {'k': 'v'} }}",
    "{{ '{0:>5}{b}'.format('a', b=value.b) }}{{ '{}'.format(value.list) }}{{ 'a' * 3 ~ 2 ** 5 }}",
    "{{ value.b is string }}{{ value is mapping }}{{ 1 in value.list }}{{ 2 < 3 <= 3 != 4 }}",
    "{% set ns = namespace(n=0, t='') %}{% for i in range(4) %}{% set ns.n = ns.n + i %}"
    "{% if i == 2 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
    "{% macro f(a, b='-') %}{{ a }}{{ b }}{{ varargs | length }}{% endmacro %}"
    "{{ f(1) ~ f(2, 3, 4) }}",
    "{% set x %} a {{ value.b }}{% endset %}{{ x | trim | indent(2, true) }}{{ x | length }}",
    "{% filter upper %}a{{ value.b }}{% endfilter %}{% set s = joiner('; ') %}{{ s() }}a{{ s() }}b",
    "{% for i in [1, [2, [3]]] recursive %}{% if i is iterable %}({{ loop(i) }}){% else %}{{ i }}"
    "{% endif %}{% endfor %}",
    "{{ [{'a': 1}, {'a': 1}] | groupby('a') | list | length }}{{ ['b', 'A'] | sort }}"
    "{{ [1, 1] | unique | list }}",
    "{{ ' a b '.split() }}{{ 'a,b'.split(',', 1)[1] }}{{ '-'.join(['x', 'y']) }}"
    "{{ 'abc'.replace('b', '') }}",
    "{{ value.b | title }}{{ 'a<b' | e }}{{ 'a\n\n  b' | wordwrap(3) }}{{ 'x' | center(7) }}",
    "{{ value.keys() | list }}{{ value.items() | list | length }}{{ value.get('zz', 4) }}",
    "{{ 2.567 | round(1) }}{{ '12' | int + 1 }}{{ -5 | abs }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 1 / 2 }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['x'], 0) }}{{ strftime_now('%Y') | length }}",
    "{% autoescape true %}{{ '<' }}{{ '<b>' | safe }}{{ value.list }}{% endautoescape %}{{ '<' }}",
    "{% autoescape true %}{{ value.b ~ '<' }}{{ '<b>' | safe ~ value.b }}{% endautoescape %}",
    "{{ range(3) | list }}{{ range(2) }}{{ value.b | string }}"
    "{{ 3 | string ~ value.list | string }}",
    "{% block a %}{{ value.b }}{% endblock %}{{ self.a() }}{% raw %}{{ }}{% endraw %}{# note #}",
    "a\n  {% if true %}\n  b\n  {% endif %}\n{%- if true -%}\n  c {{- 'd' -}}"
    " \n e {% endif +%}\n f\n",
]


@pytest.mark.parametrize("source", EXPRESSIONS)
def test_the_language_is_that_of_transformers(source: str) -> None:
    value = {"b": "ü '\"<&>\u2028😀", "a": {"z": [1, None, True, 2.5]}, "list": [3, 1, 2]}
    chat = [HELLO]
    wanted = render_jinja_template([chat], chat_template=source, value=value)[0][0]
    assert ChatTemplate(source, {})._run(chat, None, False, {"value": value}) == wanted
    assert wanted


def test_marks_of_the_encoder_stay_in_escaped_json() -> None:
    source = "{{ messages[0].content | tojson(ensure_ascii=True) }}"
    text = ChatTemplate(source, {}).render([message("user", "é\ufdd0\ufdef\uffff")])
    assert text == '"\\u00e9\ufdd0\ufdef\\uffff"'
    text = ChatTemplate(source, {}).render([message("user", r"\ufdd0")])
    assert text == r'"\\ufdd0"'


def test_a_continued_answer_that_is_written_twice_has_no_marks_inside() -> None:
    source = "{% for m in messages %}{{ m.content }}/{{ m.content }}{% endfor %}"
    assert ChatTemplate(source, {}).render([message("assistant", "1, 2")]) == "1, 2/1, 2"


def test_another_template_may_be_used_for_tools() -> None:
    both = ChatTemplate(STYLES["chatml"], SPECIAL_TOKENS, tool_source=STYLES["qwen2.5"])
    assert both.render([HELLO]) == template("chatml").render([HELLO])
    options = ChatOptions(tools=[WEATHER])
    assert both.render([HELLO], options) == template("qwen2.5").render([HELLO], options)


def test_the_longest_conversation_of_a_request_is_rendered_by_every_style() -> None:
    """4096 messages with four mebibytes of text are within the bounds on work."""
    turns = [message("user", "word " * 100), message("assistant", "word " * 100)] * 2047
    for style in STYLES:
        rendered = template(style).render([*turns, HELLO])
        assert len(rendered) > 2_000_000, style


def test_looking_for_a_message_at_each_message_stays_within_the_bounds() -> None:
    """What a list holds counts when something walks through it, not whenever the list is made."""
    source = (
        "{% for m in messages %}"
        "{% set users = messages | selectattr('role', 'eq', 'user') | list %}"
        "{% if loop.index0 == messages | length - 1 %}{{ users | length }}{% endif %}{% endfor %}"
    )
    chat = [message("user", "word " * 400)] * 200
    assert ChatTemplate(source, {}).render(chat) == "200"
