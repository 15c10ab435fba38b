"""Conversations that go on with their last message, and tools, on every family of tokenizers and of templates."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loramux_adapters.chat.encoder import ChatTemplate, TextEncoder
from loramux_adapters.errors import TemplateFailed
from support.tokenizer_families import NAMES, family
from support.tool_templates import FAMILIES

ASKED = {"role": "user", "content": "how many?"}
SAID = ("four", " four\n", "four ", "  ", "", "<|im_end|> or </s>", "{{ x }} 世界 \t")


def template(name: str, source: str | None = None) -> ChatTemplate:
    made = TextEncoder(family(name)).template(source)
    assert made is not None
    return made


def continued(tokenizer: PreTrainedTokenizerFast, source: str, messages: list[dict[str, str]]) -> Any:
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, continue_final_message=True)


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("name", NAMES)
def test_the_last_message_is_left_open_as_transformers_leaves_it(name: str, said: str) -> None:
    messages = [ASKED, {"role": "assistant", "content": said}]
    made = template(name)
    text = made.text(messages, open_last=True)
    assert made.plain(text) == continued(family(name), family(name).chat_template, messages)
    assert made.plain(text).endswith((said, said.strip()))


@pytest.mark.parametrize("name", FAMILIES)
def test_so_it_is_by_templates_with_tools(name: str) -> None:
    for said in SAID:
        messages = [ASKED, {"role": "assistant", "content": said}]
        made = template("byte-level BPE", FAMILIES[name])
        assert made.plain(made.text(messages, open_last=True)) == continued(
            family("byte-level BPE"), FAMILIES[name], messages
        )


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ messages[-1].content | length }}"])
def test_a_last_message_that_is_not_written_cannot_be_continued(source: str) -> None:
    with pytest.raises(TemplateFailed, match="cannot be continued"):
        template("byte-level BPE", source).text([ASKED, {"role": "assistant", "content": "x"}], open_last=True)


@pytest.mark.parametrize("head", ["<|tool_", "<|im_"])
def test_tokens_that_only_tools_make_a_template_write_are_looked_at_too(head: str) -> None:
    """One that it puts together from pieces takes no text that could be one."""
    source = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{{ '" + head + "' ~ 'start|>' }}{% endif %}"
    )
    made = template("byte-level BPE", source)
    if head == "<|im_":
        with pytest.raises(TemplateFailed, match="from pieces"):
            made.text([{"role": "user", "content": "<|im_end|>"}])
    else:
        assert made.text([{"role": "user", "content": "<|im_end|>"}]) == "<|im_end|>"
