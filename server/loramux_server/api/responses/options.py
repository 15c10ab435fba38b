"""Every option of OpenAI's for a response that is not served, and what becomes of it; as for other routes."""

from __future__ import annotations

from collections.abc import Mapping

from loramux_server.api.completions.request.options import NOT_TOLD, Label, Option, by_name

_STATE = "the client holds the conversation: send all of it in `input`"
_CALLER = "the caller's label"
_LIMIT = "`max_output_tokens` is its name here"
_ROUTE = ("responses",)
MAX_LABEL, MAX_LABELS = 512, 16
TEXT = Label(
    {"type": "string", "maxLength": MAX_LABEL}, lambda value: isinstance(value, str) and len(value) <= MAX_LABEL
)
HINTS = Label(
    {"type": "object", "maxProperties": MAX_LABELS},
    lambda value: isinstance(value, dict) and len(value) <= MAX_LABELS,
)
_COUNT = Label({"type": "integer"}, lambda value: isinstance(value, int) and not isinstance(value, bool))
_LIST = Label({"type": "array"}, lambda value: isinstance(value, list))

OPTIONS: tuple[Option, ...] = (
    Option("store", _STATE, _ROUTE, neutral=(False,)),
    Option("previous_response_id", _STATE, _ROUTE),
    Option("conversation", _STATE, _ROUTE),
    Option("background", "a response is sent to who asked for it", _ROUTE, neutral=(False,)),
    Option("background_options", "a response is sent to who asked for it", _ROUTE),
    Option("context_management", _STATE, _ROUTE, neutral=([],)),
    Option("prompt", "templates of prompts are not kept", _ROUTE),
    Option("truncation", "a prompt that is too long is refused, never cut", _ROUTE, neutral=("disabled",)),
    Option("max_tool_calls", "the server calls no tools", _ROUTE, label=_COUNT),
    Option("moderation", "nothing is moderated", _ROUTE),
    Option("access_programs", "there are none", _ROUTE),
    Option("image", "text alone is read and written", _ROUTE),
    # what chat completions call something that is served here
    Option("messages", "`input` is its name here", _ROUTE),
    Option("max_tokens", _LIMIT, _ROUTE),
    Option("max_completion_tokens", _LIMIT, _ROUTE),
    Option("response_format", "`text.format` is its name here", _ROUTE),
    Option("reasoning_effort", "`reasoning.effort` is its name here", _ROUTE),
    Option("user", _CALLER, _ROUTE, label=TEXT),
    Option("safety_identifier", _CALLER, _ROUTE, label=TEXT),
    Option("service_tier", "there is one", _ROUTE, label=TEXT),
    Option("prompt_cache_key", "prompts are found again without it", _ROUTE, label=TEXT),
    Option("prompt_cache_retention", "prompts stay while there is room", _ROUTE, label=TEXT),
    Option("prompt_cache_options", "prompts stay while there is room", _ROUTE, label=HINTS),
)
# Of a message, a call and its output, and a part of a message's content: the same, one level down.
_ID, _STATUS = (Option(name, "of an earlier response", label=TEXT) for name in ("id", "status"))
ITEM_OPTIONS = by_name(
    (
        _ID,
        _STATUS,
        Option("phase", "of an earlier response", label=TEXT),
        Option("namespace", "functions have none"),
        Option("caller", "of an earlier response", label=HINTS),
        Option("async", "the server calls no tools", neutral=(False,)),
        Option("created_by", "of an earlier response", label=TEXT),
    )
)
PART_OPTIONS = by_name(
    (
        Option("annotations", "of an earlier response", label=_LIST),
        Option("logprobs", "of an earlier response", label=_LIST),
        Option("prompt_cache_breakpoint", "prompts are found again without it", label=HINTS),
    )
)
TOOL_OPTIONS = by_name(
    (
        Option("defer_loading", "the server looks for no tools", neutral=(False,)),
        Option("allowed_callers", "the model calls them", neutral=(["direct"],)),
        Option("output_schema", "what a function gives is not looked at", label=HINTS),
        Option("async", "the server calls no tools", neutral=(False,)),
    )
)
REASONING_OPTIONS = by_name(
    (
        Option("summary", "reasoning is told in full", label=TEXT),
        Option("generate_summary", "reasoning is told in full", label=TEXT),
        Option("context", "reasoning of earlier turns is what `input` has of it", label=TEXT),
        Option("mode", "there is one", neutral=("standard",)),
    )
)
STREAM_OPTIONS = by_name((Option("include_obfuscation", "events are not padded", neutral=(False,)),))
TEXT_OPTIONS = by_name((Option("verbosity", NOT_TOLD, neutral=("medium",)),))
BESIDE: Mapping[str, Option] = by_name(OPTIONS)
