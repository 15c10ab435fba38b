"""The body of POST /v1/embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from loramux_server.api.completions.request.fields import ModelName, RequestPart
from loramux_server.api.completions.request.generation import MAX_ADAPTERS, AdapterPart, parsed
from loramux_server.api.completions.request.options import EMBEDDING_OPTIONS, by_name
from loramux_server.api.completions.request.prompts import Prompt, any_prompt
from loramux_server.api.http.json_object import json_object
from loramux_server.engine.scheduling.sequence import Pooling

MAX_INPUTS = 2048  # OpenAI's limit, and clients send as many
OPTIONS = by_name(EMBEDDING_OPTIONS)

if TYPE_CHECKING:
    Inputs = Prompt
else:
    Inputs = any_prompt(MAX_INPUTS)


class EmbeddingRequest(RequestPart):
    """Texts whose vectors are asked for. Null stands for the default everywhere."""

    model: ModelName
    adapters: Annotated[list[AdapterPart], Field(min_length=1, max_length=MAX_ADAPTERS)] | None = None
    input: Annotated[Inputs, Field(description="a text or token ids, or up to 2,048 of either")]
    encoding_format: Annotated[
        Literal["float", "base64"] | None, Field(description="`base64` is of little-endian fp32; `float`")
    ] = None
    pooling: Annotated[
        Pooling | None, Field(description="of the `last` token, or the `mean` over all of them; `last`")
    ] = None
    normalize: Annotated[bool | None, Field(description="to a length of 1; true")] = None


def parse_embedding(raw: bytes) -> EmbeddingRequest:
    """Raises RequestError."""
    return parsed(EmbeddingRequest, OPTIONS, json_object(raw))
