"""What requests for chat and for completions have in common, and how a body of either is read.

A field of a model here is an option that works; `options` says what becomes of the others. Counts are bounded before
anything is validated, and all that is wrong with a request is told at once, up to a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from loramux_server.api.completions.request.fields import (
    INT32_MAX,
    INT64_MAX,
    INT64_MIN,
    MAX_ALLOWED_IDS,
    MAX_CHOICES,
    MAX_STOP_IDS,
    MAX_WORDS,
    Biases,
    Choices,
    Limit,
    ModelName,
    RequestPart,
    Stop,
    TokenId,
    Tokens,
    Word,
)
from loramux_server.api.completions.request.options import STREAM_OPTIONS, Option, by_name
from loramux_server.api.completions.request.problems import Model, Problems
from loramux_server.api.completions.request.shapes import (
    AskedShape,
    ChoiceOption,
    FormatOption,
    GrammarOption,
    JsonObjectOption,
    JsonOption,
    RegexOption,
    StructuredOption,
)
from loramux_server.errors import RequestError

MAX_ADAPTERS = 8  # of one request
MAX_SCALE = 100.0
MOST_ALTERNATIVES = 20
_SHAPES = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
)
STREAM = by_name(STREAM_OPTIONS)


class StreamOptions(RequestPart):
    """How a stream is sent."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AdapterPart(RequestPart):
    """One adapter of a sum: its delta counts `scale` times."""

    name: ModelName
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0


class GenerationRequest(RequestPart):
    """What chat and completions have in common. Null stands for the default everywhere."""

    model: ModelName
    adapters: Annotated[list[AdapterPart], Field(min_length=1, max_length=MAX_ADAPTERS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None = None
    n: Choices | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Biases = None
    allowed_token_ids: Annotated[list[TokenId], Field(max_length=MAX_ALLOWED_IDS, fail_fast=True)] | None = None
    bad_words: Annotated[list[Word], Field(max_length=MAX_WORDS)] | None = None
    max_tokens: Limit = None
    min_tokens: Tokens | None = None
    stop: Stop = ()
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: FormatOption = None
    structured_outputs: StructuredOption = None
    guided_json: JsonOption = None
    guided_regex: RegexOption = None
    guided_choice: ChoiceOption = None
    guided_grammar: GrammarOption = None
    guided_json_object: JsonObjectOption = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk tells the usage so far, and not the last one alone."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report beside each token; None for no log probabilities at all."""
        raise NotImplementedError

    @property
    def replies(self) -> int:
        """So many replies to each prompt are sent."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """So many are written, of which the best are sent."""
        return self.replies

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def scored_prompt(self) -> int | None:
        """How many alternatives to report beside each token of the prompt; None if nothing of it is asked for."""
        return self.prompt_logprobs

    @property
    def shape(self) -> AskedShape | None:
        """What a reply shall be; None leaves it free. `check` has found it to be one."""
        return next(iter(self._shapes()), None)

    def _shapes(self) -> list[AskedShape]:
        asked = [(getattr(self, name), name) for name in _SHAPES]
        return [AskedShape(shape, name) for shape, name in asked if shape is not None]

    def check(self) -> Self:
        """What no single field can tell. Raises RequestError."""
        shapes = self._shapes()
        if len(shapes) > 1:
            names = " and ".join(f"'{asked.param}'" for asked in shapes)
            raise _wrong(f"{names} both say what the reply shall be; give one", shapes[1].param)
        if shapes and self.ignore_eos:
            raise _wrong(f"'ignore_eos' would go on behind the end of what '{shapes[0].param}' asks for", "ignore_eos")
        if self.prompt_logprobs is not None and self.stream:
            raise _wrong("'prompt_logprobs' is not available with 'stream'", "prompt_logprobs")
        if self.num_prompts * self.candidates > MAX_CHOICES:
            param = "n" if self.candidates == self.replies else "best_of"
            raise _wrong(
                f"'{param}' is {self.candidates}, and with {self.num_prompts} prompts that makes "
                f"{self.num_prompts * self.candidates} replies; a request has at most {MAX_CHOICES}",
                param,
            )
        return self


def _wrong(message: str, param: str) -> RequestError:
    return RequestError(message, param=param, code="invalid_value")


def parsed(
    kind: type[Model], options: Mapping[str, Option], fields: Mapping[str, Any], problems: Problems | None = None
) -> Model:
    """The fields of a body that are served; the others must be options that are taken. Raises RequestError.

    `problems`: that were found before.
    """
    problems = problems or Problems()
    fields = problems.known(fields, frozenset(kind.model_fields), options)
    # What is null is unsaid, and `model_fields_set` holds what is said.
    fields = {name: value for name, value in fields.items() if value is not None or _is_required(kind, name)}
    if isinstance(streaming := fields.get("stream_options"), dict):
        names = frozenset(StreamOptions.model_fields)
        fields["stream_options"] = problems.known(streaming, names, STREAM, "stream_options.")
    if isinstance(adapters := fields.get("adapters"), list):
        names = frozenset(AdapterPart.model_fields)
        fields["adapters"] = objects(adapters, MAX_ADAPTERS, "adapters", names, {}, problems)
    return problems.validated(kind, fields)


def _is_required(kind: type[Model], name: str) -> bool:
    return kind.model_fields[name].is_required()


def objects(
    items: list[Any],
    limit: int,
    place: str,
    names: frozenset[str],
    options: Mapping[str, Option],
    problems: Problems,
) -> list[Any]:
    """Items of a list that are objects, less the options that are taken; one more than the limit, to be refused."""
    return [
        problems.known(item, names, options, f"{place}.{index}.") if isinstance(item, dict) else item
        for index, item in enumerate(items[: limit + 1])
    ]
