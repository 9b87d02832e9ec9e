"""Hostile chat templates end within the bounds and reach nothing but the conversation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from jinja2 import TemplateError
from loraplex_model.checkpoints.chat import ChatTemplate, TextRefused
from loraplex_model.checkpoints.chat_sandbox import TooMuchWork

CHAT = [{"role": "user", "content": "hello"}]

BIG = "{% set b = 'x' * 4000000 %}"
DOUBLE = "{% set ns = namespace(v=['x', 'y']) %}{% for i in range(60) %}{% set ns.v = "

ENDLESS = [
    # Loops and recursion.
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% call f(n) %}{{ caller() }}{% endcall %}{% endmacro %}{{ f(1) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% for a in range(99999) %}" + "{% set c = messages[0].content %}" * 5000 + "{% endfor %}",
    "{% macro f() %}" + "y" * 200_000 + "{% endmacro %}"
    "{% set t %}{% for a in range(99999) %}{{ f() }}{% endfor %}{% endset %}",
    "{% set t %}{% for a in range(99999) %}" + "y" * 200_000 + "{% endfor %}{% endset %}",
    # Filters over iterators, which are consumed without a loop of the template.
    "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "{% for a in range(99999) %}"
    "{% set s = range(2000) | list | sort(reverse=true) | first %}{% endfor %}",
    "{% for a in range(99999) %}{% set s = range(99999) | select('odd') | first %}"
    "{% set s = range(99999) | reject('ge', 0) | first %}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | unique | list | length }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | groupby('real') | length }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | min }}{{ range(99999) | reverse | max }}"
    "{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | batch(7) | list | length }}{% endfor %}",
    "{{ messages | slice(999999) | list | length }}{{ messages | batch(1000000, 1) | list }}"
    "{% for a in range(99999) %}{{ messages | slice(999999) | list | length }}{% endfor %}",
    "{{ range(99999) | batch(1) | sum(start=[]) | length }}",
    BIG + "{% for a in range(99999) %}{% if b == b ~ '' %}{% endif %}{% endfor %}",
    BIG + "{% for a in range(99999) %}{% if 'y' in b %}{% endif %}{% endfor %}",
    BIG + "{% for a in range(99999) %}{% set c = b[1:] %}{% endfor %}",
    BIG + "{% for a in range(99999) %}{% set c = b | upper %}{% endfor %}",
    BIG + "{% for a in range(99999) %}{% set c = b.strip('y') ~ b.count('xx') %}{% endfor %}",
    BIG + "{% for a in range(99999) %}{% set c = b is upper %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in range(99999) %}{% if -1 in r %}{% endif %}"
    "{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in range(99999) %}{% if -1 is in r %}"
    "{% endif %}{% endfor %}",
    "{% set c = cycler(*range(99999)) %}{% set d = {} %}"
    "{% for a in range(99999) %}{% set e = d[c.items] %}{% endfor %}",
    "{% for a in range(99999) %}"
    "{% set s = [3] | map(attribute='" + "a." * 90_000 + "') | list %}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | sum(attribute='" + "a." * 90_000 + "') }}"
    "{% endfor %}",
    # Doubling.
    DOUBLE + "ns.v ~ ns.v %}{% endfor %}",
    DOUBLE + "ns.v + ns.v %}{% endfor %}",
    DOUBLE + "ns.v * 2 %}{% endfor %}",
    DOUBLE + "[ns.v, ns.v] %}{% endfor %}{{ ns.v }}",
    DOUBLE + "(ns.v, ns.v) %}{% endfor %}{{ {ns.v: 1} }}",
    DOUBLE + "{'a': ns.v, 'b': ns.v} %}{% endfor %}{{ ns.v | tojson }}",
    DOUBLE + "dict(a=ns.v, b=ns.v) %}{% endfor %}{{ ns.v | pprint }}",
    DOUBLE + "dict.fromkeys(range(2), ns.v) %}{% endfor %}{{ ns.v == ns.v | list }}",
    DOUBLE + "range(2) | map(attribute='q', default=ns.v) | list %}{% endfor %}{{ ns.v }}",
    DOUBLE + "[ns.v] * 2 %}{% endfor %}{{ ns.v == [] }}",
    DOUBLE + "cycler(ns.v, ns.v).items %}{% endfor %}{{ ns.v }}",
    DOUBLE + "'{0}{0}'.format(ns.v) %}{% endfor %}",
    DOUBLE + "'%s%s' % (ns.v, ns.v) %}{% endfor %}",
    DOUBLE + "'%(a)s%(a)s' % {'a': ns.v} %}{% endfor %}",
    DOUBLE + "[ns.v, ns.v] | join %}{% endfor %}",
    DOUBLE + "ns.v | replace('x', 'xx') %}{% endfor %}",
    DOUBLE + "ns.v | tojson | tojson %}{% endfor %}",
    "{% macro d(t) %}{{ t }}{{ t }}{% endmacro %}" + DOUBLE + "d(ns.v) %}{% endfor %}",
    "{% set ns = namespace(v='x') %}{% for i in range(60) %}"
    "{% set t %}{{ ns.v }}{{ ns.v }}{% endset %}{% set ns.v = t %}{% endfor %}",
    "{% set ns = namespace(v='x') %}{% for i in range(60) %}{% set t %}"
    "{% filter upper %}{{ ns.v }}{{ ns.v }}{% endfilter %}{% endset %}{% set ns.v = t %}"
    "{% endfor %}",
    BIG + "{% macro f() %}{% for a in range(9999) %}{{ b }}{% endfor %}{% endmacro %}{{ f()[0] }}",
    BIG + "".join(f"{{% set b{n} = b[{n}:] %}}" for n in range(1, 3000)),
    # Texts made at once.
    "{{ 'a' * 100000000 }}",
    "{{ [1] * 100000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set n = namespace(v=9) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "{{ 1 | round(-1000000) }}{{ 1 | round(1000000, 'ceil') }}",
    "{% set n = ('f' * 200000) | int(0, 16) %}{% for i in range(99999) %}"
    "{% set m = n // 3 %}{% endfor %}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\n' * 1000000 | int }}{{ ('a\n' * 1000000) | indent(1000000) }}",
    "{{ ('a\n' * 1000000) | indent(width='x' * 1000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ ('%99999d' * 100000) % (1, 2) }}",
    "{{ '%d' | format(1) }}{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format('a') }}",
    "{{ '{0:{1}{1}}'.format('a', 999999) }}",
    "{{ ('{0:99999}' * 10000).format('a') }}",
    "{{ ('{a}' * 10000).format_map({'a': 'x' * 1000000}) }}",
    "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}",
    "{{ ('x' * 1000000) | replace('', 'y' * 1000000) }}",
    "{{ ''.join(['x' * 4000000] * 100000) }}",
    "{{ ('y' * 4000000).join(range(99999) | map('string')) }}",
    "{{ range(99999) | map('string') | join('y' * 4000000) }}",
    "{{ ('x' * 4000000) | join('y' * 4000000) }}",
    "{{ range(99999) | map('replace', '', 'y' * 1000000) | join }}",
    "{{ messages | tojson(indent=1000000) }}{{ messages | tojson(indent='x' * 4000000) }}",
    "{{ range(99999) | list | tojson(separators=('x' * 1000000, ':')) }}",
    "{% set ns = namespace(v=[]) %}{% for i in range(900) %}{% set ns.v = [ns.v, 1, 2, 3, 4] %}"
    "{% endfor %}{% for i in range(99999) %}{% set t = ns.v | tojson(indent=64) %}{% endfor %}",
    "{% set ns = namespace(v=[]) %}{% for i in range(99999) %}{% set ns.v = [ns.v] %}"
    "{% endfor %}{{ ns.v }}",
    "{{ ('(' * 2000000 ~ ')' * 2000000) | urlize }}",
    "{{ ('<!--' * 1000000) | striptags }}",
    "{{ ('a ' * 2000000) | wordwrap(1, true, 'x' * 1000000) }}",
    "{{ {'a': 'x' * 4000000} | xmlattr }}",
    "{{ ('ab' * 2000000).split('b') | length }}{{ ('a ' * 2000000).split() | length }}",
    "{{ ('日' * 4000000) | list | length }}",
    "{{ strftime_now('%c' * 1000000) }}",
    "{{ raise_exception('x' * 4000000) }}" + "{{ 'a' * 100000000 }}",
    "{% for i in range(10 ** 12) %}{% endfor %}",
]

UNREACHABLE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ messages | map(attribute='__class__') | map(attribute='__mro__') | list }}",
    "{{ messages['__class__']['__init__'] }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ strftime_now.__code__.co_consts }}{{ strftime_now.__globals__['x'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
    "{{ ['{0.__class__.__mro__}'] | map('format', messages) | list }}"
    "{{ '{0.__class__.__mro__}' | attr('format') }}{{ 1 / 0 }}",
    "{{ namespace.__init__.__globals__ }}{{ namespace.mro() }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(**{'_x': 1}) }}",
    "{{ cycler.__init__.__globals__['os'] }}{{ joiner.__init__.__globals__.sys.modules }}",
    "{{ dict.__call__.__globals__ }}{{ dict.__class__.__mro__[1] }}",
    "{{ self._TemplateReference__context.environment.globals.clear() }}",
    "{% for m in messages %}{{ loop._iterator.gi_frame.f_globals }}{% endfor %}",
    "{{ (messages | map('upper')).gi_frame.f_back }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 1}) }}{{ messages[0].pop('content') }}",
    "{{ messages.clear() }}",
    "{{ 'a'.encode().join([]) }}",
    "{{ (1).to_bytes(1000000, 'big') }}",
    "{{ 'a'.translate({97: 'b'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as o %}{{ o.system('x') }}",
    "{% from 'os' import system %}",
    "{% extends '/etc/passwd' %}",
    "{{ lipsum(100000) }}",
    "{{ get_flashed_messages.__globals__ }}{{ config.items() }}{{ request.application() }}",
    "{{ environment.from_string('x') }}{{ context.get_all() }}{{ caller() }}",
]

RENDER = """
import json, resource, sys, time
from loraplex_model.checkpoints.chat import ChatTemplate, TextRefused
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
chat = [{"role": "user", "content": "hello"}]
for source in json.load(sys.stdin):
    before = time.process_time()
    try:
        end = str(len(ChatTemplate(source, {})._run(chat, None, False, {})))
    except TextRefused as error:
        end = type(error).__name__
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    print(json.dumps([end, time.process_time() - before]), flush=True)
# Not ru_maxrss, which begins at the size of the process that started this one.
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(json.dumps(int(peak.split()[1])), flush=True)
"""


def test_templates_without_end_are_refused_within_the_bounds() -> None:
    """In a process of their own, with less address space than any of them wants."""
    run = subprocess.run(
        [sys.executable, "-c", RENDER],
        input=json.dumps(ENDLESS),
        text=True,
        capture_output=True,
        timeout=900,
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == len(ENDLESS) + 1, (run.returncode, run.stderr[-500:], ENDLESS[len(lines)])
    for source, (end, seconds) in zip(ENDLESS, lines[:-1], strict=True):
        assert end in ("TooMuchWork", "TextRefused"), (source[:200], end)
        assert seconds < 60, source[:200]  # of the processor, whatever else runs
    assert lines[-1] < 1 << 20, "KiB"


@pytest.mark.parametrize("source", UNREACHABLE)
def test_nothing_of_python_is_reached(source: str) -> None:
    chat = [dict(message) for message in CHAT]
    template = ChatTemplate(source, {})
    try:
        text = template._run(chat, None, False, {})
    except TextRefused as refused:
        text = str(refused)
    for inside in ("class", "<module", "<function", "built-in", "root:", "frame"):
        assert inside not in text, text
    assert chat == CHAT


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        "{{ " + "1 + " * 50_000 + "1 }}",
        "{% if a %}" * 20_000,
        "".join(f"{{% for a{n} in x %}}" for n in range(30)) + "{% endfor %}" * 30,
        "{{ " + "9" * 10_000 + " }}",
        "{{ 1e999999999999 ** 'x' }}" + "{% set = %}",
        "{% generation %}",
        "{{ 'a",
    ],
)
def test_what_is_no_program_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, {})


def test_a_refused_template_leaves_nothing_behind() -> None:
    """Each rendering has a count of its own."""
    loops = "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{{ a }}{% endfor %}"
    template = ChatTemplate(loops, {})
    for _ in range(3):
        with pytest.raises(TooMuchWork):
            template._run(CHAT, None, False, {"n": 9999})
        assert template._run(CHAT, None, False, {"n": 2}) == "01"


def test_the_message_of_a_template_is_passed_on_shortened() -> None:
    with pytest.raises(TextRefused) as refused:
        ChatTemplate("{{ raise_exception('x' * 4000000) }}", {}).render(CHAT)
    assert len(str(refused.value)) < 2000
