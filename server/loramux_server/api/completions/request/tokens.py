"""The bodies of POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loramux_server.api.completions.request.chat import TemplateOptions, with_messages
from loramux_server.api.completions.request.fields import ModelName, RequestPart
from loramux_server.api.completions.request.generation import parsed
from loramux_server.api.completions.request.options import unserved
from loramux_server.api.completions.request.problems import Problems
from loramux_server.api.http.json_object import json_object

_TOKENIZE = "add_special_tokens chat_template media_io_kwargs mm_processor_kwargs".split()
TOKENIZE_CHAT = {name: option for name, option in unserved("chat").items() if name in _TOKENIZE}


Shown = Annotated[bool | None, Field(description="true answers with each token's text too")]


class TokenizeChatRequest(TemplateOptions):
    """A conversation whose tokens are asked for. No model is the base."""

    model: ModelName | None = None
    return_token_strs: Shown = None


class TokenizePromptRequest(RequestPart):
    """A text whose tokens are asked for. No model is the base."""

    prompt: str
    model: ModelName | None = None
    add_special_tokens: Annotated[
        bool | None, Field(description="false leaves out what the base expects around a text")
    ] = None
    return_token_strs: Shown = None


class DetokenizeRequest(RequestPart):
    """Tokens whose text is asked for. No model is the base."""

    tokens: list[int]
    model: ModelName | None = None


def parse_tokenize(raw: bytes) -> TokenizeChatRequest | TokenizePromptRequest:
    """With messages a conversation, else a text. Raises RequestError."""
    fields = json_object(raw)
    if "messages" in fields:
        problems = Problems()
        body = parsed(TokenizeChatRequest, TOKENIZE_CHAT, with_messages(fields, problems), problems)
        body.check_last_message()
        return body
    return parsed(TokenizePromptRequest, {}, fields)


def parse_detokenize(raw: bytes) -> DetokenizeRequest:
    """Raises RequestError."""
    return parsed(DetokenizeRequest, {}, json_object(raw))
