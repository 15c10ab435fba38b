"""What LangChain's OpenAI package hears: chains, tools and structured output as people write them."""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

url, base, adapter = sys.argv[1:4]
to = {"base_url": f"{url}/v1", "api_key": "unused", "max_retries": 0, "timeout": 120}


class Ship(BaseModel):
    """A ship."""

    name: str
    masts: int


@tool
def hoist(flag: str) -> str:
    """Hoist a flag."""
    return f"{flag} hoisted"


chat = ChatOpenAI(model=adapter, temperature=0, max_tokens=16, **to)
plain = chat.invoke("Say hello to the crew.")
streamed = "".join(str(chunk.content) for chunk in chat.stream("Say hello to the crew."))
assert streamed == plain.content, (streamed, plain.content)
assert plain.usage_metadata["output_tokens"] > 0

bound = ChatOpenAI(model=base, temperature=0, max_tokens=80, **to)
called = bound.bind_tools([hoist], tool_choice="required", parallel_tool_calls=False).invoke("Hoist the black flag.")
(call,) = called.tool_calls
assert call["name"] == "hoist" and isinstance(call["args"]["flag"], str)
answer = ToolMessage("black hoisted", tool_call_id=call["id"])
after = bound.bind_tools([hoist]).invoke([HumanMessage("Hoist the black flag."), called, answer])
assert after.response_metadata["finish_reason"] in ("stop", "length", "tool_calls")

wide = ChatOpenAI(model=adapter, temperature=0, max_tokens=100, **to)
for method in ("json_schema", "function_calling"):
    ship = wide.with_structured_output(Ship, method=method).invoke("Name a ship with its masts.")
    assert isinstance(ship, Ship), (method, ship)

text = OpenAI(model=adapter, max_tokens=4, temperature=0, **to).invoke("The sea is")
assert isinstance(text, str) and text
vectors = OpenAIEmbeddings(model=adapter, check_embedding_ctx_length=False, **to).embed_documents(["a cat", "a dog"])
assert len(vectors) == 2
responses = ChatOpenAI(model=adapter, temperature=0, max_tokens=16, use_responses_api=True, **to)
assert responses.invoke("Say hello to the crew.").text
print(json.dumps("ok"))
