"""Chat templates in the styles of well-known models, written for the tests."""

# ruff: noqa: E501  a line break would be part of the template

from __future__ import annotations

from typing import Final

STYLES: Final[dict[str, str]] = {
    "chatml": r"""{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "generation": r"""{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>
{% endgeneration %}{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "llama2": r"""{% if messages[0].role == 'system' %}
{%- set rest, first = messages[1:], '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}
{%- else %}{% set rest, first = messages, false %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- set text = first + m.content if loop.index0 == 0 and first else m.content %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    "llama3": r"""{% set loop_messages = messages %}{% for message in loop_messages %}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
    + message['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "llama3_tools": r"""{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{ 'Environment: ipython\n' }}{% endif %}
{{- 'Today: ' + date_string + '\n\n' }}
{%- if tools is not none %}
{%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}
{{- system }}<|eot_id|>
{%- for message in messages %}
{%- if not (message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim
    + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('only one call at once') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
{%- if message.content is mapping or message.content is iterable and message.content is not string %}
{{- message.content | tojson }}{% else %}{{ message.content }}{% endif %}{{ '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "mistral1": r"""{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate, beginning with user') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}""",
    "mistral3": r"""{%- if messages[0].role == 'system' %}
{%- set system, rest = messages[0].content, messages[1:] %}{% else %}{% set rest = messages %}
{%- endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}{{ bos_token }}
{%- for m in rest %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}[AVAILABLE_TOOLS] [
{%- for tool in tools %}{% set tool = tool.function %}{{ '{"type": "function", "function": {' }}
{%- for key, value in tool.items() if key != 'return' %}{{ '"' ~ key ~ '": ' }}
{%- if value is string %}{{ '"' + value + '"' }}{% else %}{{ value | tojson }}{% endif %}
{%- if not loop.last %}, {% endif %}{% endfor %}{{ '}}' }}
{%- if not loop.last %}, {% endif %}{% endfor %}][/AVAILABLE_TOOLS]{% endif %}
{%- if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}
{%- set ns.index = ns.index + 1 %}
{%- elif m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS] [
{%- for call in m.tool_calls %}{% set out = call.function | tojson %}{{ out[:-1] }}
{%- if call.id is not defined or call.id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}
{{- ', "id": "' + call.id + '"}' }}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
{%- elif m.role in ['tool_results', 'tool'] %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}' }}
{{- '[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user, assistant and tool roles, not ' ~ m.role) }}{% endif %}
{%- endfor %}""",
    "tekken": r"""{%- set default = 'Answer briefly.' %}{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- if messages[0]['content'] is string %}{% set system = messages[0]['content'] %}
{%- else %}{% set system = messages[0]['content'][0]['text'] %}{% endif %}
{%- set rest = messages[1:] %}{% else %}{% set system, rest = default, messages %}{% endif %}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- for message in rest %}
{%- if message['role'] == 'user' %}[INST]
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}{% for block in message['content'] %}
{%- if block['type'] == 'text' %}{{ block['text'] }}
{%- elif block['type'] in ['image', 'image_url'] %}{{ '[IMG]' }}
{%- else %}{{ raise_exception('Only text and image blocks are supported!') }}{% endif %}
{%- endfor %}{% endif %}[/INST]
{%- elif message['role'] == 'assistant' %}
{%- if message['content'] is string %}{{ message['content'] + eos_token }}
{%- else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}""",
    "qwen2.5": r"""{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}
{%- else %}{{- 'You are a helpful model.' }}{% endif %}
{{- "\n\n# Tools\n\n<tools>" }}
{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{% endfor %}
{{- "\n</tools>\n<tool_call>\n{\"name\": <name>, \"arguments\": <args>}\n</tool_call><|im_end|>\n" }}
{%- elif messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if (message.role == "user") or (message.role == "system" and not loop.first)
    or (message.role == "assistant" and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == "assistant" %}{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\n' + message.content }}{% endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}{% endfor %}{{- '<|im_end|>\n' }}
{%- elif message.role == "tool" %}
{%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}
{%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}""",
    "qwen3": r"""{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi_step and message.role == "user" and message.content is string
    and not(message.content.startswith('<tool_response>')
    and message.content.endswith('</tool_response>')) %}
{%- set ns.multi_step = false %}{% set ns.last = index %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == "user" or (message.role == "system" and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- elif message.role == "assistant" %}{% set thought = '' %}
{%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{{- content.lstrip('\n') }}
{%- else %}{{- '<|im_start|>assistant\n' + content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{% endif %}{{- '}\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == "tool" %}
{{- '<|im_start|>user\n<tool_response>\n' ~ content ~ '\n</tool_response><|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(', ') }}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}""",
    "gemma2": r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/model') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "gemma3": r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- if messages[0]['content'] is string %}{% set prefix = messages[0]['content'] + '\n\n' %}
{%- else %}{% set prefix = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}
{%- set rest = messages[1:] %}{% else %}{% set prefix, rest = '', messages %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception("Conversation roles must alternate") }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
{%- if message['content'] is string %}{{ message['content'] | trim }}
{%- elif message['content'] is iterable %}{% for item in message['content'] %}
{%- if item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}
{%- else %}{{ raise_exception('Invalid content type') }}{% endif %}{{ '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "phi3": r"""{% for message in messages %}
{% if message['role'] == 'system' and message['content'] %}{{ '<|system|>\n' + message['content']
    + '<|end|>\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "phi4": r"""{% for message in messages %}
{%- if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
{{- '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}
{%- else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    "smollm3": r"""{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}
{%- if messages[0].role == 'system' %}{% set text = messages[0].content %}
{%- if '/no_think' in text %}{% set mode = '/no_think' %}{% endif %}
{%- set custom = text.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}
{{- '<|im_start|>system\n## Metadata\n\nToday: ' ~ strftime_now('%d %B %Y') ~ '\nMode: ' ~ mode }}
{{- '\n\n' ~ (custom | default('You are a helpful model.', true)) }}
{%- if xml_tools or python_tools or tools %}{{ '\n\n### Tools\n' }}
{%- for tool in xml_tools or tools or [] %}{{ tool | string }}{{ '\n' }}{% endfor %}{% endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{% generation %}
{%- if mode == '/think' %}{{ '<|im_start|>assistant\n' + content.lstrip('\n') + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + content + '<|im_end|>\n' }}{% endif %}
{%- endgeneration %}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}""",
    "granite": r"""{%- macro turn(role, text='') -%}
<|start_of_role|>{{ role }}<|end_of_role|>{{ text }}{{ caller() if caller else '' }}<|end_of_text|>
{% endmacro -%}
{%- if messages[0].role != 'system' %}{{ turn('system', 'Knowledge ends in 2024.\nToday: '
    ~ strftime_now('%B %d, %Y') ~ '.') }}{% endif %}
{%- if tools %}{% call turn('available_tools') %}{{ tools | tojson(indent=4) }}{% endcall %}{% endif %}
{%- if documents %}{% for d in documents %}{{ turn('document', d.text) }}{% endfor %}{% endif %}
{%- for m in messages %}{% if m.role == 'tool' %}{{ turn('tool_response', m.content) }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- turn('assistant', '<|tool_call|>' ~ (m.tool_calls | map(attribute='function') | list | tojson)) }}
{%- else %}{{ turn(m.role, m.content) }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_of_role|>assistant{% if controls %}
{{- ' ' + controls | tojson(sort_keys=True, separators=(',', ':')) }}{% endif %}<|end_of_role|>
{%- endif %}""",
    "command_r": r"""{{ bos_token }}{%- macro kind(spec) -%}
{%- set names = {'string': 'str', 'integer': 'int', 'number': 'float', 'boolean': 'bool'} -%}
{%- if spec.type in names -%}{{ names[spec.type] }}
{%- elif spec.type == 'array' -%}List[{{ kind(spec['items']) }}]{%- else -%}Any{%- endif -%}
{%- endmacro -%}
{%- set system = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | list -%}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ system | first | default('Be kind.') }}
{%- for tool in tools or [] %}
{{ "\n```python\ndef " + tool.function.name + "(" }}
{%- for name, spec in tool.function.parameters.properties | items %}{{ name }}: {{ kind(spec) -}}
{% if not loop.last %}, {% endif %}{% endfor %}){{ ':\n    # %s\n```' % tool.function.description }}
{%- endfor -%}<|END_OF_TURN_TOKEN|>
{%- for m in messages if m.role != 'system' -%}
<|START_OF_TURN_TOKEN|>{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(
    m.role, '<|SYSTEM_TOKEN|>') }}
{%- if m.tool_calls %}{{ 'Action:' }}{% for c in m.tool_calls %}{{ '\n' }}
{{- c.function.arguments | dictsort | tojson(ensure_ascii=true) }}{% endfor %}{% endif %}
{{- m.content | default('') | trim }}<|END_OF_TURN_TOKEN|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{%- endif -%}""",
    "deepseek": r"""{% if not thinking is defined %}{% set thinking = false %}{% endif -%}
{% set ns = namespace(system='', is_first=true, is_tool=false) -%}
{% for m in messages if m['role'] == 'system' -%}
{% set ns.system = ns.system + ('' if loop.first else '\n\n') + m['content'] %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{% set ns.is_tool = false %}{{ '<|User|>' + m['content'] }}
{%- elif m['role'] == 'assistant' and m['tool_calls'] is defined and m['tool_calls'] is not none %}
{%- for call in m['tool_calls'] %}
{{- '<|Assistant|>' if loop.first else '' }}{{ '<|tool|>' + call['function']['name'] + '\n```json\n'
    + call['function']['arguments'] + '\n```' }}{% endfor %}{{ '<|end|>' }}
{%- elif m['role'] == 'assistant' %}{% set content = m['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + ('' if ns.is_tool else '</think>') + content + eos_token }}
{%- elif m['role'] == 'tool' %}{% set ns.is_tool = true %}{{ '<|output|>' + m['content'] }}{% endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|>' }}
{%- if thinking %}<think>{{ '\n' }}{% else %}</think>{% endif %}{% endif %}""",
    "zephyr": r"""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "olmo": r"""{{ eos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] }}
{% else %}{% continue %}{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>
' }}
{% endif %}
{% endfor %}""",
    "glm4": r"""[gMASK]<sop>
{%- if tools -%}<|system|>
Tools:{% for tool in tools %}

## {{ tool['function']['name'] }}

{{ tool['function'] | tojson(indent=4, ensure_ascii=False) }}{% endfor %}{%- endif -%}
{%- macro text_of(content) -%}{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for item in messages -%}
{%- if item.role == 'tool' %}<|observation|>
{{ text_of(item.content) }}
{%- elif item.tool_calls %}{% for call in item.tool_calls %}<|assistant|>{{ call.function.name }}
{% for k, v in call.function.arguments.items() %}<arg>{{ k }}={{ v if v is string else v | tojson }}
{%- endfor %}{% endfor %}
{%- else %}<|{{ item.role }}|>{{ item.metadata | default('') }}
{{ text_of(item.content) }}{% endif %}{%- endfor -%}
{% if add_generation_prompt %}<|assistant|>{{ '\n<think></think>' if enable_thinking is defined
    and not enable_thinking else '' }}{% endif %}""",
    "hermes": r"""{%- set roles = dict(system='system', user='user', assistant='assistant', tool='tool') -%}
{{ bos_token }}{% if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{%- set parts = [] %}{% for key, value in (tool.function or tool) | dictsort %}
{%- if loop.index > 9 %}{% break %}{% endif %}
{{- '%s=%s' % (key, value | tojson) }}{{ '; ' if not loop.last }}{% endfor %}
{{ '\n' if not loop.last }}{% endfor %}</tools><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ roles[m.role] }}
{% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>{% endfor %}
{%- elif m.role == 'tool' %}<tool_response>
{{ {'name': m.name, 'content': m.content} | tojson }}
</tool_response>{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "falcon": r"""{%- for message in messages -%}{% if not loop.first %}{{ '\n' }}{% endif %}
{%- if message.role == 'system' -%}{{ 'System: ' ~ message.content.strip() }}
{%- elif message.role == 'user' -%}{{ 'User: ' ~ message.content | replace('\r\n', '\n')
    | replace('\n\n', '\n') }}
{%- elif message.role == 'assistant' -%}{{ 'Falcon: ' ~ message.content }}
{%- else -%}{{ raise_exception('Unknown role: {}'.format(message.role)) }}{%- endif -%}
{%- endfor -%}{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}""",
}

SPECIAL_TOKENS: Final = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
"""The model's special tokens, as every rendering passes them."""
