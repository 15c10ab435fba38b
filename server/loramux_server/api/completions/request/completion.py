"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from loramux_server.api.completions.request.fields import Choices, LimitOrNone
from loramux_server.api.completions.request.generation import MOST_ALTERNATIVES, GenerationRequest, parsed
from loramux_server.api.completions.request.options import unserved
from loramux_server.api.completions.request.prompts import Prompt, any_prompt
from loramux_server.api.http.json_object import json_object
from loramux_server.errors import RequestError

MAX_PROMPTS = 64
_COMPLETION = unserved("completions")

if TYPE_CHECKING:
    AnyPrompt = Prompt
else:
    AnyPrompt = any_prompt(MAX_PROMPTS)


class CompletionRequest(GenerationRequest):
    """A text to be continued, or several."""

    prompt: AnyPrompt
    max_tokens: LimitOrNone = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    best_of: Choices | None = None
    echo: bool | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def candidates(self) -> int:
        return self.best_of or self.replies

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    @property
    def scored_prompt(self) -> int | None:
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in asked if number is not None), default=None)

    def check(self) -> Self:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise _wrong("'max_tokens' may be 0 only with 'echo'", "max_tokens")
        if self.best_of is not None and self.best_of < self.replies:
            raise _wrong(f"'best_of' is {self.best_of}, less than 'n', which is {self.replies}", "best_of")
        if self.candidates > self.replies and self.stream:
            raise _wrong("with 'stream', 'best_of' cannot be more than 'n': the best is known at the end", "best_of")
        if self.suffix and self.echo:
            raise _wrong("'suffix' and 'echo' cannot be combined", "suffix")
        return self


def parse_completion(raw: bytes) -> CompletionRequest:
    """Raises RequestError."""
    return parsed(CompletionRequest, _COMPLETION, json_object(raw)).check()


def _wrong(message: str, param: str) -> RequestError:
    return RequestError(message, param=param, code="invalid_value")
