"""A prompt in any of OpenAI's four forms: a text, a list of texts, token ids, or a list of lists of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from loramux_server.api.completions.request.fields import is_int

Prompt = list[str] | list[list[int]]

_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def any_prompt(most: int) -> Any:
    """The type of a field that takes up to so many prompts, none of them empty, and reads as a list of them."""

    def parse(value: object) -> Prompt:
        prompts = value if isinstance(value, list) and not is_int(value[0] if value else None) else [value]
        if len(prompts) > most:
            raise ValueError(f"must be at most {most} prompts, not {len(prompts)}")
        if not prompts or any(prompt in ("", []) for prompt in prompts):
            raise ValueError("must not be empty")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) == len(prompts):
            return texts
        ids = [prompt for prompt in prompts if isinstance(prompt, list) and all(map(is_int, prompt))]
        if len(ids) == len(prompts):
            return ids
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")

    many = Field(min_length=1, max_length=most)
    written = _Text | Annotated[list[_Text], many] | _Ids | Annotated[list[_Ids], many]
    return Annotated[Prompt, PlainValidator(parse, json_schema_input_type=written)]
