"""What an adapter's tokenizer files are to a base: the same, then they are not needed; or more, then it is refused.

A chat template is the exception: another one than the base's is kept with the adapter and used for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from loramux_adapters.artifact.format import CHAT_TEMPLATE_FILE, TOKENIZER_FILES, read_chat_template
from loramux_adapters.artifact.own_tokens import parse_own_tokens
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.base_info import AdapterText
from loramux_adapters.chat import compare
from loramux_adapters.chat.encoder import TextEncoder, trial_conversations
from loramux_adapters.chat.template import normal, same_template
from loramux_adapters.digests import sha256_of_file
from loramux_adapters.errors import AdapterRejected, TemplateFailed, TemplateRefuses

_MIB = 2**20
_MAX_BYTES = {"tokenizer.json": 64 * _MIB, "vocab.json": 32 * _MIB, "merges.txt": 32 * _MIB, "vocab.txt": 32 * _MIB}
_MAX_BYTES_ELSE = 4 * _MIB
_CHUNK = _MIB


class TokenizerFiles:
    """Any thread may call its methods; they may take seconds, and hold up no other thread."""

    def __init__(self, tokenizer: Any, directory: Path | None = None, encoder: TextEncoder | None = None) -> None:
        """
        Args:
            tokenizer: the base's, as transformers loaded it.
            directory: the base's own files.
            encoder: of this tokenizer, where there is one already.
        """
        self._tokenizer = tokenizer
        self._directory = directory
        self._given = encoder

    def own_text(self, directory: Path) -> AdapterText:
        """The chat template and the tokens that the adapter in `directory` brings.

        Raises AdapterRejected: its tokenizer is another one, or its template cannot be used.
        """
        compared = self._compare(directory)
        if compared.reasons:
            raise AdapterRejected(compared.reasons)
        own = read_chat_template(directory)
        source = normal(compared.chat_template if own is None else own)
        if source is None or same_template(source, self._encoder.base_template):
            return AdapterText(None, compared.tokens)
        try:
            self._try(source)
        except TemplateFailed as error:
            raise AdapterRejected([f"its chat template cannot be used: {error}"]) from error
        return AdapterText(source, compared.tokens)

    def _compare(self, directory: Path) -> compare.Compared:
        """In a process of its own, if there is anything to compare."""
        there = [name for name in TOKENIZER_FILES if name != CHAT_TEMPLATE_FILE and (directory / name).exists()]
        for name in there:
            with open_regular(directory / name) as file:
                limit = _MAX_BYTES.get(name, _MAX_BYTES_ELSE)
                if file.seek(0, 2) > limit:
                    raise AdapterRejected([f"{name} is larger than {limit // _MIB} MiB"])
        if all(self._is_the_bases(directory / name) for name in there):
            return compare.Compared()
        ends: Mapping[str, str | None] = {
            key: getattr(self._tokenizer, key, None) for key in ("bos_token", "eos_token")
        }
        asked = {
            "directory": str(directory.absolute()),
            "base_directory": None if self._directory is None else str(self._directory.absolute()),
            "ends": ends,
        }
        command = [sys.executable, "-P", "-m", compare.__name__]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(asked).encode() + b"\n" + self._encoder.tokens.description.encode(),
                capture_output=True,
                timeout=2 * compare.SECONDS,
                check=True,
            )
            found = json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError) as error:
            raise AdapterRejected([f"its tokenizer files cannot be read ({', '.join(there)})"]) from error
        tokens = found["tokens"]
        own = None if tokens is None else parse_own_tokens(tokens.encode())
        return compare.Compared(found["reasons"], found["chat_template"], own)

    def _is_the_bases(self, path: Path) -> bool:
        """Byte for byte."""
        own = self._directory / path.name if self._directory is not None else None
        if own is None or not own.is_file() or own.stat().st_size != path.stat().st_size:
            return False
        return sha256_of_file(own) == sha256_of_file(path)

    def _try(self, source: str) -> None:
        """Raises TemplateFailed if the template cannot write an ordinary conversation; it may refuse a system's."""
        template = self._encoder.template(source)
        assert template is not None
        for messages in trial_conversations():
            try:
                text = template.text(messages)
            except TemplateRefuses:
                if messages[0]["role"] == messages[-1]["role"] == "user":
                    raise
                continue
            if messages[-1]["role"] == "user" and messages[-1]["content"] not in text:
                raise TemplateFailed("it leaves out what the user says")

    @cached_property
    def _encoder(self) -> TextEncoder:
        return self._given or TextEncoder(self._tokenizer)
