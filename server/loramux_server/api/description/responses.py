"""The JSON of /v1/responses, for the OpenAPI document; as `replies`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from loramux_server.api.description.replies import ChosenToken

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OutputText(_Reply):
    """What is said."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChosenToken]


class ReasoningText(_Reply):
    """What is thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(_Reply):
    """What the assistant says."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]
    status: ItemStatus


class OutputReasoning(_Reply):
    """What a base that thinks thought before."""

    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningText]
    status: ItemStatus


class OutputCall(_Reply):
    """A call that the client is to make."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class InputDetails(_Reply):
    """Of the prompt's tokens, those that were computed before, and those that were not."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(_Reply):
    """Of the response's tokens, those that were thought."""

    reasoning_tokens: int


class ResponseUsage(_Reply):
    """What a request took."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(_Reply):
    """Why the response is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(_Reply):
    """What went wrong while it was written."""

    code: str
    message: str


class ResponseReply(_Reply):
    """A response; what it repeats of its request is there with the defaults."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputMessage | OutputReasoning | OutputCall]
    usage: ResponseUsage | None
    model: str
    instructions: str | None
    background: Literal[False]
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: None


class ResponseEvent(BaseModel):
    """One event of a stream, as OpenAI sends it: what it holds beside its number depends on its type."""

    model_config = ConfigDict(extra="allow")
    type: str
    sequence_number: int
