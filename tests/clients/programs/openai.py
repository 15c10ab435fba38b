"""What OpenAI's own client hears, every reply checked against its types: what a chat, a text, tools and shapes are."""

import json
import sys

import openai
from pydantic import BaseModel, Field

url, base, adapter = sys.argv[1:4]
to = {"base_url": f"{url}/v1", "api_key": "unused", "max_retries": 0, "timeout": 120}
client = openai.OpenAI(**to, _strict_response_validation=True)
lenient = openai.OpenAI(**to)
HELLO = [{"role": "user", "content": "Say hello to the crew."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 3, 7]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=99_999_999)


def chats() -> None:
    plain = client.chat.completions.create(model=adapter, messages=HELLO, temperature=0, max_tokens=16)
    stream = client.chat.completions.create(
        model=adapter,
        messages=HELLO,
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == plain.choices[0].message.content, (said, plain)
    assert chunks[-1].usage == plain.usage or chunks[-1].usage.total_tokens == plain.usage.total_tokens
    several = client.chat.completions.create(
        model=adapter, messages=HELLO, n=3, seed=1, temperature=1.2, max_tokens=12, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) > 1
    assert all(choice.logprobs.content for choice in several.choices)
    banned = several.choices[0].logprobs.content[0]
    again = client.chat.completions.create(
        model=base, messages=HELLO, max_tokens=8, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={"198": -100}
    )
    assert again.choices[0].message.content and banned


def tools() -> None:
    asked = {"model": base, "messages": HELLO, "tools": [WEATHER], "temperature": 0, "max_tokens": 120}
    plain = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False)
    (call,) = plain.choices[0].message.tool_calls
    assert plain.choices[0].finish_reason == "tool_calls", plain
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["days"] in (1, 3, 7)
    with client.chat.completions.stream(**asked, tool_choice="required", parallel_tool_calls=False) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert streamed.finish_reason == "tool_calls"
    named = {"type": "function", "function": {"name": "get_weather"}}
    called = client.chat.completions.create(**asked, tool_choice=named)
    assert called.choices[0].finish_reason == "stop" and called.choices[0].message.tool_calls
    history = [
        *HELLO,
        plain.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(model=base, messages=history, tools=[WEATHER], max_tokens=8)
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


def shapes() -> None:
    parsed = client.chat.completions.parse(
        model=base, messages=HELLO, response_format=City, max_tokens=100, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    anything = client.chat.completions.create(
        model=base, messages=HELLO, response_format={"type": "json_object"}, max_tokens=200, temperature=0
    )
    choice = anything.choices[0]
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def texts() -> None:
    # A first token has no log probability: OpenAI sends null there, which its client's own types do not know.
    text = lenient.completions.create(
        model=adapter, prompt="The sea is", echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    assert text.choices[0].text == "The sea is" and text.choices[0].logprobs.token_logprobs[0] is None
    reply = client.completions.create(model=adapter, prompt="The sea is", logprobs=2, max_tokens=4, temperature=0)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == reply.choices[0].text and len(logprobs.token_logprobs) == 4
    several = client.completions.create(model=adapter, prompt=["The sea", "A ship"], n=2, max_tokens=4, best_of=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def responses() -> None:
    asked = {"model": adapter, "input": "Say hello.", "temperature": 0, "store": False}
    reply = client.responses.create(**asked, max_output_tokens=16)
    assert reply.output_text and reply.status == "incomplete"
    with client.responses.stream(**asked, max_output_tokens=16) as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == reply.output_text
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == reply.output_text

    parsed = client.responses.parse(**asked | {"model": base}, text_format=City, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, City) and parsed.status == "completed"
    function = {"type": "function", "strict": True, **WEATHER["function"]}
    called = asked | {"model": base, "tools": [function], "tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(**called, max_output_tokens=120) as stream:
        events = list(stream)
        final = stream.get_final_response()
    (call,) = final.output
    assert call.name == "get_weather" and json.loads(call.arguments)["days"] in (1, 3, 7)
    assert client.responses.create(**called, max_output_tokens=120).output[0].arguments == call.arguments
    history = [
        {"role": "user", "content": "Say hello."},
        call.model_dump(exclude={"parsed_arguments"}, exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    after = client.responses.create(model=base, input=history, tools=[function], max_output_tokens=8, store=False)
    assert after.output


def embeddings() -> None:
    # The client asks for base64 by itself, and checks the reply before it decodes it, against lists of numbers.
    found = lenient.embeddings.create(model=adapter, input=["a cat", "a dog", "an oath"])
    assert len(found.data) == 3 and abs(sum(x * x for x in found.data[0].embedding) - 1) < 1e-3
    floats = client.embeddings.create(model=adapter, input=["a cat"], encoding_format="float")
    worst = max(abs(x - y) for x, y in zip(floats.data[0].embedding, found.data[0].embedding, strict=True))
    assert worst < 1e-6, worst


for part in (chats, texts, tools, shapes, responses, embeddings):
    part()
    print(part.__name__, "ok")
print(json.dumps("ok"))
