"""Small tokenizers of the families that bases come with, each with special tokens of its own and a chat template."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog, again and again; what is 2 + 2?",
    "system user assistant tool said here: is this spam? You have won a free holiday!",
    "Grüße aus München, naïve café, 世界 日本語, end start im end of turn header id inst s",
    "def f(x):\n    return x * 2\n\n\nclass A:\n\tpass  # <b>bold</b> [1] {x} <| |> </ s>",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 . , ; : ! ? - _ ( ) / | < > [ ] { } '",
] * 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI_3 = (  # the role is a piece of a token's text
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI_4 = (  # so it is here, between pieces of the template itself
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' ~ m.content }}{% elif m.role == "
    "'assistant' %}{{ '<｜Assistant｜>' ~ m.content ~ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def _special(*texts: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(text, special=True, **{"normalized": False} | flags) for text in texts]


def _plain(*texts: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(text, special=False, **{"normalized": False} | flags) for text in texts]


def _byte_level(template: str, tokens: list[AddedToken], *, end: str, start: str | None = None) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    return _whole(tokenizer, template, tokens, end, start)


def _llama_3() -> Any:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = Regex(
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # among the vocabulary, so that a whole word would be the token without any merge
    special = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=_special(*special))
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _whole(tokenizer, LLAMA_3, [], "<|eot_id|>", "<|begin_of_text|>")


def _sentencepiece(template: str, tokens: list[AddedToken], *, end: str, start: str, style: str) -> Any:
    """BPE over characters with bytes to fall back on; `style`: how a space is written at the front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if style == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif style == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = replace
    special = [*_special("<unk>", "<s>", "</s>"), *(AddedToken(f"<0x{byte:02X}>") for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=520, special_tokens=special))
    described = _without_added_bytes(tokenizer)
    described.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 0)]
    )
    return _whole(described, template, tokens, end, start, unk="<unk>")


def _without_added_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Bytes are in the vocabulary alone; and two merges lead to a special token, as in converted checkpoints."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    model = spec["model"]
    if "s>" not in model["vocab"]:
        model["vocab"]["s>"] = len(model["vocab"])
        model["merges"] += [["s", ">"], ["<", "s>"]]
    return Tokenizer.from_str(json.dumps(spec))


def _unigram() -> Any:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    words = {word for text in CORPUS for word in text.replace(" ", " ▁").split(" ")}
    pieces += [(word, -8.0) for word in sorted(words) if len(word) > 1]
    pieces += [
        (letter, -12.0) for letter in sorted({letter for text in CORPUS for letter in text if letter != " "} | {"▁"})
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    # sentence tokens are in the vocabulary with the best score of all; one is looked for in normalized text
    tokens = [
        *_special("<unk>", "<s>", "</s>"),
        *_special("<|im_start|>", "<|im_end|>"),
        *_special("<|end|>", normalized=True),
    ]
    return _whole(tokenizer, CHATML, tokens, "<|im_end|>", "<s>", unk="<unk>")


def _word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = _special("[UNK]", "[CLS]", "[SEP]")
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    tokens = [*_special("<|im_start|>"), *_special("<|im_end|>", lstrip=True, rstrip=True, normalized=True)]
    return _whole(tokenizer, CHATML, tokens, "<|im_end|>", None, unk="[UNK]")


def _word_level() -> Any:
    words = sorted({word for text in CORPUS for word in text.split()} - {"<s>"})
    vocab = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = [
        *_special("<unk>", "<s>", "</s>"),
        *_special("<|im_start|>", "<|im_end|>"),
        *_special("<solo>", single_word=True),
    ]
    return _whole(tokenizer, CHATML, tokens, "</s>", None, unk="<unk>")


def _whole(
    tokenizer: Tokenizer, template: str, tokens: list[AddedToken], end: str, start: str | None, unk: str | None = None
) -> Any:
    tokenizer.add_tokens(tokens)
    named = {"eos_token": end, "bos_token": start, "unk_token": unk}
    whole: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: text for name, text in named.items() if text is not None}
    )
    whole.chat_template = template
    return whole


def _embedded() -> Any:
    found = embedded()
    return None if found is None else AutoTokenizer.from_pretrained(found, local_files_only=True)


def embedded() -> Path | None:
    """The embedded base's files, if they have been fetched."""
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loramux"
    return next((path.parent for path in sorted(cache_dir.glob("smollm2-135m-instruct-*/tokenizer.json"))), None)


_THINKING = _plain("<think>", "</think>", "<tool_call>", "</tool_call>")
_FAMILIES = {
    "byte-level BPE": lambda: _byte_level(CHATML, _special("<|im_start|>", "<|im_end|>"), end="<|im_end|>"),
    "Qwen 3": lambda: _byte_level(QWEN_3, [*_special("<|im_start|>", "<|im_end|>"), *_THINKING], end="<|im_end|>"),
    "Llama 3": _llama_3,
    "DeepSeek": lambda: _byte_level(
        DEEPSEEK,
        [*_special("<｜begin｜>", "<｜end｜>"), *_plain("<｜User｜>", "<｜Assistant｜>")],
        end="<｜end｜>",
        start="<｜begin｜>",
    ),
    "Phi 3": lambda: _sentencepiece(
        PHI_3,
        _special("<|end|>", "<|assistant|>", "<|user|>", "<|system|>", rstrip=True),
        end="<|end|>",
        start="<s>",
        style="first",
    ),
    "Phi 4": lambda: _byte_level(
        PHI_4, _special("<|end|>", "<|assistant|>", "<|user|>", "<|system|>", rstrip=True), end="<|end|>"
    ),
    "Llama 2": lambda: _sentencepiece(LLAMA_2, [], end="</s>", start="<s>", style="legacy"),
    "Mistral": lambda: _sentencepiece(LLAMA_2, _special("[INST]", "[/INST]"), end="</s>", start="<s>", style="first"),
    "Gemma": lambda: _sentencepiece(
        GEMMA,
        [
            *_special("<start_of_turn>", "<end_of_turn>"),
            *_plain("\n\n", "▁▁", "<b>", "</b>", "<h1>", "</h1>", "holiday"),
        ],
        end="</s>",
        start="<s>",
        style="none",
    ),
    "unigram": _unigram,
    "WordPiece": _word_piece,
    "word level": _word_level,
    "embedded": _embedded,
}
NAMES = tuple(name for name in _FAMILIES if name != "embedded" or embedded() is not None)


@cache
def family(name: str) -> Any:
    """The tokenizer of this name; nobody may change it."""
    return _FAMILIES[name]()
