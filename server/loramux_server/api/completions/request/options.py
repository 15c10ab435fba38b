"""Every option that OpenAI or vLLM defines for a generation request, and what becomes of it here.

An option is served, or taken at the values that ask for nothing, or a label that changes no reply, or refused by its
name with the reason. None is ignored where it would change the reply. The table in docs/api.md is this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loramux_server.api.completions.request.elsewhere import OPENAI, VLLM, VLLM_EARLIER

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

_TEXT_ONLY = "text alone is read and written"
_BEST_OF = "OpenAI has it in completions alone"
_NOT_SAMPLED = "the sampler does not have it"
_NOT_CUT = "a prompt that is too long is refused, never cut"
_NOT_IN_REPLY = "replies do not carry it"
NOT_TOLD = "the base is not told how long to be; ask for it in a message"
_NO_SEARCH = "beam search is not served"

OPTIONS: tuple[Option, ...] = (
    # what works
    Option(
        "model",
        "the base, an adapter, `base:adapter`, `adapter@version`, or `hub:owner/name` with --hub-adapters",
        served=True,
    ),
    Option("adapters", "ours: several adapters at once, with scales", served=True),
    Option("messages", "the conversation", _CHAT, served=True),
    Option("prompt", "text, token ids, or up to 64 of either", _COMPLETIONS, served=True),
    Option(
        "max_tokens",
        "of the reply; -1 is the default: 16 in completions, what fits in chat, up to --default-max-tokens; 0 with "
        "`echo`",
        served=True,
    ),
    Option(
        "min_tokens", "no end token before the reply has so many, and no stop string that ends in them", served=True
    ),
    Option("max_completion_tokens", "the newer name of `max_tokens`", _CHAT, served=True),
    Option("temperature", "0 to 2", served=True),
    Option("top_p", "above 0, at most 1", served=True),
    Option("top_k", "0 and -1 are all tokens", served=True),
    Option("min_p", "0 to 1", served=True),
    Option("seed", "64 bits", served=True),
    Option("stop", "a string, or up to 16; empty ones stop nothing", served=True),
    Option("logprobs", "true in chat, 0 to 20 in completions; of the model's own distribution", served=True),
    Option("top_logprobs", "0 to 20, with `logprobs`", _CHAT, served=True),
    Option("stream", "server-sent events", served=True),
    Option("stream_options", "`include_usage`, `continuous_usage_stats`; nothing without `stream`", served=True),
    Option("add_generation_prompt", "false leaves the assistant's turn unopened", _CHAT, served=True),
    Option("chat_template_kwargs", "further variables of the chat template", _CHAT, served=True),
    Option(
        "reasoning_effort", "a variable of the chat template; most templates have no use for it", _CHAT, served=True
    ),
    Option(
        "include_reasoning",
        "false leaves out `reasoning_content`: what a base that thinks says before its reply",
        _CHAT,
        served=True,
    ),
    Option("continue_final_message", "goes on with the assistant's last message", _CHAT, served=True),
    # tools
    Option(
        "tools", "up to 128 functions; a template without tools is told of them by a system text", _CHAT, served=True
    ),
    Option(
        "tool_choice",
        "`required` and a named function bind the reply to calls that match `parameters`; with `none` the prompt does "
        "not name them",
        _CHAT,
        served=True,
    ),
    Option("parallel_tool_calls", "false: at most one call", _CHAT, served=True),
    Option("functions", "the old name of `tools`; answered by `function_call`", _CHAT, served=True),
    Option("function_call", "the old name of `tool_choice`", _CHAT, served=True),
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
    Option("return_mm_kwargs", _TEXT_ONLY, label=_FLAG),
    # how many replies
    Option("n", "1 to 128 replies to each prompt, 128 in all; they share the prompt's keys and values", served=True),
    Option(
        "best_of",
        "of so many replies, the `n` with the highest mean log probability of a token; not streamed",
        _COMPLETIONS,
        served=True,
    ),
    Option("best_of", _BEST_OF, _CHAT, neutral=(1,)),
    Option("use_beam_search", _NO_SEARCH, neutral=(False,)),
    Option("length_penalty", _NO_SEARCH, neutral=(1,)),
    # sampling
    Option("presence_penalty", "-2 to 2; of tokens that the reply has", served=True),
    Option("frequency_penalty", "-2 to 2; times how often the reply has a token", served=True),
    Option("repetition_penalty", "0.01 to 100; of tokens that prompt or reply have", served=True),
    Option("logit_bias", "-100 to 100 for each of up to 1,024 token ids", served=True),
    Option("allowed_token_ids", "no other token is chosen; an empty list allows all", served=True),
    Option("bad_words", "up to 256 texts that never come, with and without a space before them", served=True),
    Option("repetition_detection", _NOT_SAMPLED),
    Option("logits_processors", "code of a caller is never run", neutral=([],)),
    Option("watermarking", _NOT_SAMPLED, neutral=(False,)),
    # where a reply ends, and what is left out of it
    Option("ignore_eos", "goes on behind an end token of the base", served=True),
    Option("stop_token_ids", "further end tokens, up to 128; `stop_reason` tells which", served=True),
    Option("include_stop_str_in_output", "the text ends with the stop string or the end token", served=True),
    Option("skip_special_tokens", "false shows special tokens in a reply", served=True),
    Option("spaces_between_special_tokens", "there are none but the tokenizer's own", label=_FLAG),
    # what a reply carries
    Option(
        "echo",
        "the text begins with the prompt, and so do `logprobs`, null for the first token",
        _COMPLETIONS,
        served=True,
    ),
    Option("echo", "the last message is not repeated", _CHAT, neutral=(False,)),
    Option("suffix", "fills in what stands before it, if the base has tokens for that", _COMPLETIONS, served=True),
    Option("prompt_logprobs", "0 to 20 alternatives beside each token of the prompt; not streamed", served=True),
    Option("return_tokens_as_token_ids", "log probabilities name tokens as `token_id:42`", served=True),
    Option("return_token_ids", "`token_ids` and `prompt_token_ids` beside the text", served=True),
    Option("logprob_token_ids", _NOT_IN_REPLY, neutral=([],)),
    Option("return_token_offsets", _NOT_IN_REPLY, neutral=(False,)),
    Option("return_prompt_text", _NOT_IN_REPLY, _CHAT, neutral=(False,)),
    Option("routed_experts_prompt_start", _NOT_IN_REPLY, neutral=(0,)),
    Option("stream_interval", "each token is sent when it is there", neutral=(1,)),
    # how a prompt is made
    Option("add_special_tokens", "false leaves out what the base expects around a text", _COMPLETIONS, served=True),
    Option("truncate_prompt_tokens", "so many tokens are kept; -1 keeps what leaves room for the reply", served=True),
    Option("truncation_side", "where tokens are cut off, `left` or `right`; left", served=True),
    Option("cache_salt", "prompts are found again by requests of the same salt alone", served=True),
    Option("add_special_tokens", "the chat template writes them", _CHAT, neutral=(False,)),
    Option("chat_template", "a template comes with the base or an adapter, never with a request", _CHAT),
    Option("documents", "the template gets messages alone", _CHAT, neutral=([],)),
    Option("prompt_embeds", "tensors are never read from a request", _COMPLETIONS),
    # shapes, reasoning, other media
    Option("web_search_options", "the server looks nothing up", _CHAT),
    Option("response_format", "`text`, `json_object` or `json_schema`; a schema is always kept to", served=True),
    Option("structured_outputs", "one of `json`, `regex`, `choice`, `grammar`, `json_object`", served=True),
    Option("guided_json", "a JSON schema, as an object or as text", served=True),
    Option("guided_regex", "a pattern that the whole reply matches", served=True),
    Option("guided_choice", "one of these texts, up to 1,024", served=True),
    Option("guided_grammar", "a grammar for the whole reply", served=True),
    Option("guided_json_object", "true for any JSON object", served=True),
    Option("guided_decoding_backend", "there is one", label=_TEXT),
    Option("guided_whitespace_pattern", "write it into the pattern or the grammar"),
    Option("structural_tag", "use `response_format` with a schema, or tools"),
    Option("thinking_token_budget", "reasoning ends where the base ends it", neutral=(-1,)),
    Option("verbosity", NOT_TOLD, _CHAT, neutral=("medium",)),
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
STREAM_OPTIONS: tuple[Option, ...] = (Option("include_obfuscation", "events are not padded", neutral=(False,)),)
MESSAGE_OPTIONS: tuple[Option, ...] = (
    Option("refusal", "an assistant's earlier reply, where its content is null", label=_ANY_TEXT),
    Option("audio", _TEXT_ONLY),
    Option("annotations", "of an earlier reply", label=_ANY_LIST),
    Option("cache_control", "prompts are found again without it", label=_HINTS),
)
PART_OPTIONS: tuple[Option, ...] = (
    Option("cache_control", "prompts are found again without it", label=_HINTS),
    Option("prompt_cache_breakpoint", "prompts are found again without it", label=_HINTS),
)
# Of /v1/embeddings, beside the fields of its schema.
EMBEDDING_OPTIONS: tuple[Option, ...] = (
    Option("dimensions", "vectors are as long as the base is wide; cut them yourself where they were trained for it"),
    Option("user", "the caller's label", label=_TEXT),
    Option("request_id", "send `x-request-id` for an id that replies and logs carry", label=_TEXT),
    Option("add_special_tokens", "a text begins as the base expects; send token ids", neutral=(True,)),
    Option("truncate_prompt_tokens", _NOT_CUT, neutral=(-1,)),
    Option("truncation_side", _NOT_CUT, neutral=("left", "right")),
    Option("use_activation", "`normalize` is its name here", neutral=(True,)),
    Option("embed_dtype", "fp32", neutral=("float32",)),
    Option("endianness", "base64 holds little-endian numbers", neutral=("native", "little")),
    Option("priority", "nobody goes first", neutral=(0,)),
)


def unserved(route: str) -> Mapping[str, Option]:
    """The options of "chat" or "completions" that are not fields of its schema, by name."""
    return {option.name: option for option in OPTIONS if route in option.routes and not option.served}


def by_name(options: Sequence[Option]) -> Mapping[str, Option]:
    return {option.name: option for option in options}


def documented() -> Iterator[str]:
    """The lines of the table in docs/api.md."""
    yield "| option | routes | OpenAI | vLLM | here | what |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for option in OPTIONS:
        openai = "yes" if any(option.name in OPENAI[route] for route in option.routes) else ""
        earlier = "earlier" if option.name in VLLM_EARLIER else ""
        vllm = "yes" if any(option.name in VLLM[route] for route in option.routes) else earlier
        cells = (f"`{option.name}`", ", ".join(option.routes), openai, vllm, option.treatment, option.about)
        yield f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")
