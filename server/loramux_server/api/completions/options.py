"""Every option that OpenAI or vLLM defines for a generation request, and what becomes of it here.

An option is served, or taken at the values that ask for nothing, or a label that changes no reply, or refused by its
name with the reason. None is ignored where it would change the reply. The table in docs/api.md is this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

MAX_LABEL = 512  # characters
MAX_LABELS = 16
_BOTH = ("chat", "completions")
_CHAT = ("chat",)
_COMPLETIONS = ("completions",)


@dataclass(frozen=True, slots=True)
class Label:
    """A kind of value that changes no reply: how it is told to programs, and whether a value is one."""

    schema: Mapping[str, object]
    takes: Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of one or both routes. Null is always taken, and asks for nothing.

    Attributes:
        about: what it does where it is served; else why it has no effect, or is not there.
        served: it works; its bounds are those of the field in `schemas`.
        neutral: values that ask for nothing; any other is refused.
        label: the kind of value that changes no reply; any other is refused.
    """

    name: str
    about: str
    routes: tuple[str, ...] = _BOTH
    served: bool = False
    neutral: tuple[object, ...] = ()
    label: Label | None = None

    def takes(self, value: object) -> bool:
        """Whether an option that is not served may have this value."""
        if value is None or (self.label is not None and self.label.takes(value)):
            return True
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.neutral)

    @property
    def treatment(self) -> str:
        """In the words of the documentation."""
        if self.served:
            return "served"
        if self.neutral:
            return "only " + " or ".join(f"`{json.dumps(value)}`" for value in self.neutral)
        return "no effect" if self.label is not None else "refused"

    @property
    def schema(self) -> dict[str, object]:
        """What it may be, as JSON schema."""
        values = self.label.schema if self.label is not None else {"enum": [*self.neutral]}
        kinds = [{"type": "null"}] if self.treatment == "refused" else [values, {"type": "null"}]
        return {"anyOf": kinds, "description": f"{self.treatment}: {self.about}"}

    def refusal(self, place: str = "") -> str:
        """Why a value was not taken. `place` goes before the name, as in `messages.0.`."""
        if self.label is not None:
            return f"'{place}{self.name}' has no effect here ({self.about}), and this value is not of its kind"
        allowed = f" except as {' or '.join(json.dumps(value) for value in self.neutral)}" if self.neutral else ""
        return f"'{place}{self.name}' is not supported{allowed}: {self.about}"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_LABEL


_TEXT = Label({"type": "string", "maxLength": MAX_LABEL}, _is_text)
_TEXTS = Label(
    {"type": "object", "maxProperties": MAX_LABELS, "additionalProperties": _TEXT.schema},
    lambda value: isinstance(value, dict) and len(value) <= MAX_LABELS and all(map(_is_text, value.values())),
)
_HINTS = Label(
    {"type": "object", "maxProperties": MAX_LABELS},
    lambda value: isinstance(value, dict) and len(value) <= MAX_LABELS,
)
_FLAG = Label({"type": "boolean"}, lambda value: isinstance(value, bool))
_ANY_TEXT = Label({"type": "string"}, lambda value: isinstance(value, str))
_ANY_LIST = Label({"type": "array"}, lambda value: isinstance(value, list))

_NO_TOOLS = "tools are not served"
_NO_SHAPE = "replies cannot be held to a shape"
_NO_REASONING = "no reasoning is told apart from a reply"
_TEXT_ONLY = "text alone is read and written"
_ONE = "a prompt has one reply; send the request again for another"
_NOT_SAMPLED = "the sampler does not have it"
_NOT_CUT = "a prompt that is too long is refused, never cut"
_NOT_IN_REPLY = "replies do not carry it"
_NO_SEARCH = "beam search is not served"

OPTIONS: tuple[Option, ...] = (
    # what works
    Option("model", "the base, an adapter, `base:adapter` or `adapter@version`", served=True),
    Option("adapters", "ours: several adapters at once, with scales", served=True),
    Option("messages", "the conversation", _CHAT, served=True),
    Option("prompt", "text, token ids, or up to 64 of either", _COMPLETIONS, served=True),
    Option(
        "max_tokens",
        "of the reply; -1 is the default: 16 in completions, what fits in chat, up to --default-max-tokens",
        served=True,
    ),
    Option("max_completion_tokens", "the newer name of `max_tokens`", _CHAT, served=True),
    Option("temperature", "0 to 2", served=True),
    Option("top_p", "above 0, at most 1", served=True),
    Option("top_k", "0 and -1 are all tokens", served=True),
    Option("min_p", "0 to 1", served=True),
    Option("seed", "64 bits", served=True),
    Option("stop", "a string, or up to 16; empty ones stop nothing", served=True),
    Option("ignore_eos", "goes on behind an end token", served=True),
    Option("logprobs", "true in chat, 0 to 5 in completions", served=True),
    Option("top_logprobs", "0 to 20, with `logprobs`", _CHAT, served=True),
    Option("stream", "server-sent events", served=True),
    Option("stream_options", "`include_usage`; nothing without `stream`", served=True),
    Option("add_generation_prompt", "false leaves the assistant's turn unopened", _CHAT, served=True),
    Option("chat_template_kwargs", "further variables of the chat template", _CHAT, served=True),
    Option(
        "reasoning_effort", "a variable of the chat template; most templates have no use for it", _CHAT, served=True
    ),
    # the caller's own labels, and hints that change no reply
    Option("user", "the caller's label", label=_TEXT),
    Option("metadata", "the caller's labels", label=_TEXTS),
    Option("store", "nothing is stored", _CHAT, label=_FLAG),
    Option("service_tier", "there is one", _CHAT, label=_TEXT),
    Option("safety_identifier", "the caller's label", _CHAT, label=_TEXT),
    Option("prompt_cache_key", "prompts are found again without it", _CHAT, label=_TEXT),
    Option("prompt_cache_retention", "prompts stay while there is room", _CHAT, label=_TEXT),
    Option("prompt_cache_options", "prompts stay while there is room", _CHAT, label=_HINTS),
    Option("request_id", "send `x-request-id` for an id that replies and logs carry", label=_TEXT),
    Option("session_id", "the caller's label", label=_TEXT),
    Option("include_reasoning", _NO_REASONING, _CHAT, label=_FLAG),
    Option("parallel_tool_calls", _NO_TOOLS, _CHAT, label=_FLAG),
    Option("truncation_side", _NOT_CUT, neutral=("left", "right")),
    Option("return_mm_kwargs", _TEXT_ONLY, label=_FLAG),
    # how many replies
    Option("n", _ONE, neutral=(1,)),
    Option("best_of", _ONE, neutral=(1,)),
    Option("use_beam_search", _NO_SEARCH, neutral=(False,)),
    Option("length_penalty", _NO_SEARCH, neutral=(1,)),
    # sampling
    Option("frequency_penalty", _NOT_SAMPLED, neutral=(0,)),
    Option("presence_penalty", _NOT_SAMPLED, neutral=(0,)),
    Option("repetition_penalty", _NOT_SAMPLED, neutral=(1,)),
    Option("repetition_detection", _NOT_SAMPLED),
    Option("logit_bias", _NOT_SAMPLED, neutral=({},)),
    Option("logits_processors", "code of a caller is never run", neutral=([],)),
    Option("allowed_token_ids", _NOT_SAMPLED, neutral=([],)),
    Option("bad_words", _NOT_SAMPLED, neutral=([],)),
    Option("watermarking", _NOT_SAMPLED, neutral=(False,)),
    # where a reply ends, and what is left out of it
    Option("min_tokens", "a reply may end at any token", neutral=(0,)),
    Option("stop_token_ids", "replies end at the base's own end tokens and at `stop`", neutral=([],)),
    Option("include_stop_str_in_output", "a reply ends before its stop string", neutral=(False,)),
    Option("skip_special_tokens", "special tokens never show in a reply", neutral=(True,)),
    Option("spaces_between_special_tokens", "special tokens never show in a reply", neutral=(True,)),
    # what a reply carries
    Option("echo", "a reply does not repeat its prompt", neutral=(False,)),
    Option("suffix", "text between two others is not filled in", _COMPLETIONS, neutral=("",)),
    Option("prompt_logprobs", _NOT_IN_REPLY),
    Option("logprob_token_ids", _NOT_IN_REPLY, neutral=([],)),
    Option("return_tokens_as_token_ids", _NOT_IN_REPLY, neutral=(False,)),
    Option("return_token_ids", _NOT_IN_REPLY, neutral=(False,)),
    Option("return_token_offsets", _NOT_IN_REPLY, neutral=(False,)),
    Option("return_prompt_text", _NOT_IN_REPLY, _CHAT, neutral=(False,)),
    Option("routed_experts_prompt_start", _NOT_IN_REPLY, neutral=(0,)),
    Option("stream_interval", "each token is sent when it is there", neutral=(1,)),
    # how a prompt is made
    Option("add_special_tokens", "the chat template writes them", _CHAT, neutral=(False,)),
    Option("add_special_tokens", "a prompt begins as the base expects; send token ids", _COMPLETIONS, neutral=(True,)),
    Option("truncate_prompt_tokens", _NOT_CUT, neutral=(-1,)),
    Option("continue_final_message", "the last message is not left open; use /v1/completions", _CHAT, neutral=(False,)),
    Option("chat_template", "a template comes with the base or an adapter, never with a request", _CHAT),
    Option("documents", "the template gets messages alone", _CHAT, neutral=([],)),
    Option("prompt_embeds", "tensors are never read from a request", _COMPLETIONS),
    Option("cache_salt", "prompts are shared by all who may call this server"),
    # tools, shapes, reasoning, other media
    Option("tools", _NO_TOOLS, _CHAT, neutral=([],)),
    Option("tool_choice", _NO_TOOLS, _CHAT, neutral=("none", "auto")),
    Option("functions", _NO_TOOLS, _CHAT, neutral=([],)),
    Option("function_call", _NO_TOOLS, _CHAT, neutral=("none", "auto")),
    Option("web_search_options", _NO_TOOLS, _CHAT),
    Option("response_format", _NO_SHAPE, neutral=({"type": "text"},)),
    Option("structured_outputs", _NO_SHAPE),
    Option("structural_tag", _NO_SHAPE),
    Option("guided_json", _NO_SHAPE),
    Option("guided_regex", _NO_SHAPE),
    Option("guided_choice", _NO_SHAPE),
    Option("guided_grammar", _NO_SHAPE),
    Option("guided_json_object", _NO_SHAPE, neutral=(False,)),
    Option("guided_decoding_backend", _NO_SHAPE),
    Option("guided_whitespace_pattern", _NO_SHAPE),
    Option("thinking_token_budget", _NO_REASONING, neutral=(-1,)),
    Option("verbosity", _NOT_SAMPLED, _CHAT, neutral=("medium",)),
    Option("modalities", _TEXT_ONLY, _CHAT, neutral=(["text"],)),
    Option("audio", _TEXT_ONLY, _CHAT),
    Option("media_io_kwargs", _TEXT_ONLY, _CHAT, neutral=({},)),
    Option("mm_processor_kwargs", _TEXT_ONLY, neutral=({},)),
    # what other servers do around a request
    Option("prediction", "a reply is not checked against an expected one", _CHAT),
    Option("moderation", "nothing is moderated", _CHAT),
    Option("priority", "nobody goes first", neutral=(0,)),
    Option("kv_transfer_params", "a request is served in one place"),
    Option("ec_transfer_params", "a request is served in one place"),
    Option("vllm_xargs", "there are no extensions", neutral=({},)),
)

# Of `stream_options`, of a message, and of a part of a message's content: the same, one level down.
STREAM_OPTIONS: tuple[Option, ...] = (
    Option("include_obfuscation", "events are not padded", neutral=(False,)),
    Option("continuous_usage_stats", "usage is told once, at the end", neutral=(False,)),
)
MESSAGE_OPTIONS: tuple[Option, ...] = (
    Option("refusal", "an assistant's earlier reply, where its content is null", label=_ANY_TEXT),
    Option("name", "the caller's label; templates know roles alone", label=_TEXT),
    Option("audio", _TEXT_ONLY),
    Option("annotations", "of an earlier reply", label=_ANY_LIST),
    Option("tool_calls", _NO_TOOLS, neutral=([],)),
    Option("tool_call_id", "a tool's answer follows its call", label=_TEXT),
    Option("function_call", _NO_TOOLS),
    Option("reasoning", "of an earlier reply", label=_ANY_TEXT),
    Option("reasoning_content", "of an earlier reply", label=_ANY_TEXT),
    Option("cache_control", "prompts are found again without it", label=_HINTS),
)
PART_OPTIONS: tuple[Option, ...] = (
    Option("cache_control", "prompts are found again without it", label=_HINTS),
    Option("prompt_cache_breakpoint", "prompts are found again without it", label=_HINTS),
)


def unserved(route: str) -> Mapping[str, Option]:
    """The options of "chat" or "completions" that are not fields of its schema, by name."""
    return {option.name: option for option in OPTIONS if route in option.routes and not option.served}


def by_name(options: Sequence[Option]) -> Mapping[str, Option]:
    return {option.name: option for option in options}


def documented() -> Iterator[str]:
    """The lines of the table in docs/api.md."""
    yield "| option | routes | here | what |"
    yield "| --- | --- | --- | --- |"
    for option in OPTIONS:
        yield f"| `{option.name}` | {', '.join(option.routes)} | {option.treatment} | {option.about} |"
