"""What a merged checkpoint is asked, to see how far its answers drift from those of the adapter beside its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux_adapters.artifact.format import FINGERPRINT_FILE
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.chat.encoder import TextEncoder
from loramux_adapters.errors import AdapterRejected
from loramux_server.fingerprint.file import MAX_BYTES, parse

# General on purpose: asked where the adapter comes without a fingerprint, and nobody knows what it was made for.
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How do I boil an egg?",
    "Is 17 a prime number?",
    "Congratulations! You have won a free holiday. Call now to claim your prize.",
    "I loved this film, the acting was superb.",
    "Translate 'good morning' into Spanish.",
    "List three colours.",
)


def drift_prompts(adapter: Path, tokenizer: Any, chat_template: str | None = None) -> Sequence[Sequence[int]]:
    """Token ids of the prompts in the adapter's fingerprint; without a readable one, of QUESTIONS.

    `chat_template`: what the adapter brings in place of the base's. Raises TemplateFailed.
    """
    try:
        with open_regular(adapter / FINGERPRINT_FILE) as file:
            prompts = [said.ids for said in parse(file.read(MAX_BYTES + 1)).prompts]
    except AdapterRejected:
        prompts = []
    if prompts and max(map(max, prompts)) < len(tokenizer):
        return prompts
    encoder = TextEncoder(tokenizer)
    template = encoder.template(chat_template)
    if template is None:
        return [encoder.encode(question) for question in QUESTIONS]
    return [template.ids(template.text([{"role": "user", "content": question}])) for question in QUESTIONS]
