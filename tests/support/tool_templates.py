"""Small chat templates that write tools and calls as the published ones of their families do."""

from __future__ import annotations

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
_GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

PLAIN = "{% for message in messages %}" + _TURN + "{% endfor %}" + _GENERATE

HERMES = (
    """{% if tools %}<|im_start|>system
# Tools
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Write each call as JSON within <tool_call></tool_call>.<|im_end|>
{% endif %}{% for message in messages %}{% if message.role == 'assistant' and message.tool_calls %}<|im_start|>assistant
{{ message.content }}{% for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {% if call.function.arguments is string %}\
{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}}
</tool_call>{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}"""
    + _TURN
    + "{% endif %}{% endfor %}"
    + _GENERATE
)

THINKING = HERMES.replace(
    _GENERATE,
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}",
)

# arguments are put into the text as they are
CONCATENATING = HERMES.replace(
    "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}",
    "{{ call.function.arguments }}",
)

QWEN3_CODER = (
    """{% if tools %}<|im_start|>system
{% for tool in tools %}<function>{{ tool.function.name }}</function>
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}{% if message.tool_calls %}<|im_start|>assistant
{{ message.content }}{% for call in message.tool_calls %}
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}<parameter={{ key }}>
{{ value | tojson if value is mapping else value | string }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
{% else %}"""
    + _TURN
    + "{% endif %}{% endfor %}"
    + _GENERATE
)

LLAMA3 = """{{ bos_token }}{% set first = messages[0] %}{% for message in messages %}\
{% if message.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ {'output': message.content} | tojson }}<|eot_id|>{% elif 'tool_calls' in message %}\
{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}\
{% set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>{% else %}\
<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if loop.first and tools %}Respond as {"name": function name, "parameters": dictionary of arguments}.
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{{ message.content }}<|eot_id|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

_MISTRAL_HEAD = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}\
{% if tools and loop.first %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
[INST] {{ message.content }}[/INST]{% elif message.tool_calls %}"""
_MISTRAL_TAIL = """{{ eos_token }}{% elif message.role == 'tool' %}\
{% if message.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}\
[TOOL_RESULTS] {{ {'content': message.content, 'call_id': message.tool_call_id} | tojson }}[/TOOL_RESULTS]\
{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}\
{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""

MISTRAL = (
    _MISTRAL_HEAD
    + """[TOOL_CALLS] [{% for call in message.tool_calls %}\
{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}\
{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]"""
    + _MISTRAL_TAIL
)
MISTRAL_ARGS = (
    _MISTRAL_HEAD
    + """{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]\
{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}{% endfor %}"""
    + _MISTRAL_TAIL
)
MISTRAL_NAMED = MISTRAL_ARGS.replace("[ARGS]", "")

GRANITE = """{% if tools %}<|start_of_role|>available_tools<|end_of_role|>
{{ tools | tojson(indent=4) }}<|end_of_text|>
{% endif %}{% for message in messages %}{% if message.tool_calls %}<|start_of_role|>assistant<|end_of_role|>\
<|tool_call|>[{% for call in message.tool_calls %}{{ call.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]\
<|end_of_text|>
{% else %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}<|end_of_text|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"""

# it describes tools, and does not write calls
GRANITE_3_0 = """{% if tools %}<|start_of_role|>system<|end_of_role|>Respond with <|tool_call|> and a list of tools.
{{ tools | tojson }}<|end_of_text|>
{% endif %}{% for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}\
<|end_of_text|>
{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"""

SMOLLM3 = (
    """<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% if xml_tools is defined %}
<tools>
{% for tool in xml_tools %}{{ tool | string }}
{% endfor %}</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>{% endif %}{% if python_tools is defined %}Write Python between <code> and </code>.{% endif %}<|im_end|>
{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant
{% if enable_thinking is false %}<think>

</think>
{% endif %}{{ message.content }}<|im_end|>
{% elif message.role in ('user', 'tool') %}<|im_start|>user
{{ message.content }}<|im_end|>
{% endif %}{% endfor %}"""
    + _GENERATE
)

# calls in a way that nobody here reads
FOREIGN = (
    HERMES.replace("<tool_call>\n{", "<|call|>{")
    .replace("}\n</tool_call>", "}<|end|>")
    .replace('{"name": "', '{"tool": "')
)

# neither system messages nor tools; turns alternate
GEMMA = """{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}\
{{ raise_exception('no system') }}{% endif %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('turns alternate') }}{% endif %}<start_of_turn>{{ message.role }}
{{ message.content }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

FAMILIES = {
    "hermes": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
    "mistral_named": MISTRAL_NAMED,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
    "json": PLAIN,
}
