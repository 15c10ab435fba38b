"""What a model is told of tools where its chat template has no words for them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from loramux_server.tools.calls import Tool


def system_text(tools: Sequence[Tool]) -> str:
    """Describes the tools, and how they are called: as the format "json" reads it."""
    described = "\n".join(json.dumps(described_tool(tool)["function"], ensure_ascii=False) for tool in tools)
    return (
        "You can call these functions. Each line describes one, with a JSON schema of its parameters:\n\n"
        f"{described}\n\n"
        "To call a function, answer with one line of JSON and nothing else:\n"
        '{"name": "the name of the function", "arguments": {"the name of a parameter": "its value"}}\n'
        "To call several functions, write one such line for each. You are then told their results. "
        "If no function helps, answer in words."
    )


def result_text(name: str, content: str) -> str:
    """A function's result, as a user would say it."""
    return f"Result of {name}:\n{content}" if name else f"Result:\n{content}"


def described_tool(tool: Tool) -> dict[str, dict[str, object] | str]:
    """As OpenAI's clients, and so chat templates, describe a tool."""
    function: dict[str, object] = {"name": tool.name, "description": tool.description}
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}
