"""What LiteLLM's library hears: a proxy's view of an OpenAI server."""

import json
import sys

import litellm

litellm.telemetry = False

url, base, adapter = sys.argv[1:4]
HELLO = [{"role": "user", "content": "Say hello to the crew."}]
to = {"api_base": f"{url}/v1", "api_key": "unused", "num_retries": 0, "timeout": 120}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "hoist",
            "parameters": {
                "type": "object",
                "properties": {"flag": {"enum": ["black", "white"]}},
                "required": ["flag"],
            },
        },
    }
]

plain = litellm.completion(model=f"openai/{adapter}", messages=HELLO, temperature=0, max_tokens=16, **to)
chunks = list(
    litellm.completion(model=f"openai/{adapter}", messages=HELLO, temperature=0, max_tokens=16, stream=True, **to)
)
rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
assert rebuilt.choices[0].message.content == plain.choices[0].message.content, (rebuilt, plain)
assert rebuilt.choices[0].finish_reason == plain.choices[0].finish_reason

asked = {"model": f"openai/{base}", "messages": HELLO, "tools": TOOLS, "tool_choice": "required", "temperature": 0}
called = litellm.completion(**asked, max_tokens=80, parallel_tool_calls=False, **to).choices[0]
assert called.finish_reason == "tool_calls" and len(called.message.tool_calls) == 1, called
assert json.loads(called.message.tool_calls[0].function.arguments)["flag"] in ("black", "white")
streamed = litellm.stream_chunk_builder(
    list(litellm.completion(**asked, max_tokens=80, parallel_tool_calls=False, stream=True, **to)), messages=HELLO
).choices[0]
assert streamed.message.tool_calls[0].function.arguments == called.message.tool_calls[0].function.arguments

shape = {
    "type": "json_schema",
    "json_schema": {"name": "ship", "strict": True, "schema": TOOLS[0]["function"]["parameters"]},
}
shaped = litellm.completion(
    model=f"openai/{adapter}", messages=HELLO, response_format=shape, temperature=0, max_tokens=60, **to
)
assert json.loads(shaped.choices[0].message.content)["flag"] in ("black", "white")

text = litellm.text_completion(model=f"text-completion-openai/{adapter}", prompt="The sea is", max_tokens=4, **to)
assert text.choices[0].text
found = litellm.embedding(model=f"openai/{adapter}", input=["a cat"], **to)
assert len(found.data) == 1
print(json.dumps("ok"))
