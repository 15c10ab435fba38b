"""Adapters of embeddings, output heads and tokens of their own on a server on a late device: peft's answers, alone and
in company."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from loramux_adapters import nf4
from loramux_adapters.artifact.format import UPLOAD_PARTS
from loramux_adapters.lora.slots import SlotTable
from loramux_server.engine import build as engine_build
from loramux_server.engine.engine import MAX_FAILED_STEPS
from support.emulated import EmulatedDevice
from support.emulated_server import EmulatedServer, emulated_server, settings
from support.tiny_models import save_tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
VOCABULARY = 258  # as many as the tokenizer has, so that an adapter's own tokens are rows that the base lacks
TARGETS = ["q_proj", "v_proj"]
TRAINED = [*range(30, 90), 256]  # letters of the prompts among them
BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"target_modules": TARGETS, "trainable_token_indices": TRAINED},
    "saved": {"target_modules": TARGETS, "modules_to_save": BOTH},
    "lora": {"target_modules": [*TARGETS, *BOTH]},
    "own": {"target_modules": TARGETS, "modules_to_save": BOTH},
    "own-too": {"target_modules": TARGETS, "modules_to_save": BOTH},
    "plain": {"target_modules": TARGETS},
}
OWN = {"own": ("@@call", "@@end"), "own-too": ("@@other", "@@more", "@@end")}
PROMPTS = ["The keeper", "What is said, and then goes on", "A third @@call one@@other"]


@dataclass(frozen=True)
class Vocabulary:
    """
    Attributes:
        adapters: by kind, as peft wrote them, with a tokenizer where they add tokens.
        tokenizers: by kind, and the base's as "tiny".
        expected: by kind, and of the base as "tiny": of each prompt, the log probabilities of all next tokens by peft
            on the base's NF4 weights in fp32.
    """

    base: Path
    adapters: dict[str, Path]
    tokenizers: dict[str, Any]
    expected: dict[str, list[torch.Tensor]]


def perturbed(model: Any) -> Any:
    """What training does to rows of tokens."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
            if "trainable_tokens_delta" in name or ".modules_to_save." in name:
                parameter += noise
    return model.eval()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    root = tmp_path_factory.mktemp("vocabulary")
    base = save_tiny_model(root / "base", num_hidden_layers=1, vocab_size=VOCABULARY, tie_word_embeddings=False)

    def model() -> Any:
        found = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for path, module in found.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
                module.weight.data = nf4.dequantize(*nf4.quantize(module.weight.data))
        return found.eval()

    def likely(of: Any, tokenizer: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [of(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS]

    tokenizers = {kind: tiny_tokenizer() for kind in ("tiny", *KINDS)}
    adapters, expected = {}, {"tiny": likely(model(), tokenizers["tiny"])}
    with torch.enable_grad():  # peft wants gradients for what it makes
        for index, (kind, options) in enumerate(KINDS.items()):
            torch.manual_seed(index)
            under, tokenizer = model(), tokenizers[kind]
            if kind in OWN:
                tokenizer.add_tokens([AddedToken(text, normalized=False) for text in OWN[kind][:-1]])
                tokenizer.add_tokens([AddedToken(OWN[kind][-1], normalized=False)], special_tokens=True)
                tokenizer.eos_token = OWN[kind][-1]
                under.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4, lora_alpha=8, **options)
            tuned = perturbed(get_peft_model(under, copy.deepcopy(config)))
            expected[kind] = likely(tuned, tokenizer)
            adapters[kind] = root / kind
            tuned.save_pretrained(adapters[kind], save_embedding_layers=False)
            if kind in OWN:
                tokenizer.save_pretrained(adapters[kind])
    return Vocabulary(base, adapters, tokenizers, expected)


def sent(server: EmulatedServer, name: str, directory: Path) -> httpx.Response:
    """An upload with all files that a trainer leaves."""
    parts = {
        part: (directory / file).read_bytes() for part, file in UPLOAD_PARTS.items() if (directory / file).exists()
    }
    with server.client() as client:
        return client.put(f"/v1/adapters/{name}", files=parts)


@pytest.fixture(scope="module")
def card(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedServer]:
    root = tmp_path_factory.mktemp("card")
    config = settings(vocabulary.base, root / "store", cache_dir=root / "cache", adapter_memory_mib=1)
    with emulated_server(EmulatedDevice(kernels="triton"), config) as server:
        for kind, directory in vocabulary.adapters.items():
            response = sent(server, kind, directory)
            assert response.status_code == 201, response.text
        yield server


def posted(server: EmulatedServer, model: dict[str, Any] | str, body: dict[str, Any]) -> httpx.Response:
    named = model if isinstance(model, dict) else {"model": model}
    with server.client() as client:
        return client.post("/v1/completions", json=named | {"temperature": 0} | body)


def told(server: EmulatedServer, model: dict[str, Any] | str, prompt: str, count: int = 1, **more: Any) -> Any:
    """Tokens of a reply and their log probabilities."""
    body = {"prompt": prompt, "max_tokens": count, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    response = posted(server, model, body | more)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("kind", ["tiny", *KINDS])
def test_answers_are_those_of_peft(card: EmulatedServer, vocabulary: Vocabulary, kind: str) -> None:
    changes = []
    for prompt, expected, base in zip(PROMPTS, vocabulary.expected[kind], vocabulary.expected["tiny"], strict=True):
        (token,), (logprob,) = told(card, kind, prompt)
        assert logprob == pytest.approx(float(expected[token]), abs=0.03)
        assert float(expected.max() - expected[token]) < 0.03
        changes.append(float((expected[: len(base)] - base).abs().max()))
    assert (kind == "tiny") or max(changes) > 0.2


def test_a_mixed_batch_gives_the_bits_of_each_request_alone(card: EmulatedServer) -> None:
    summed = {
        "model": "tiny",
        "adapters": [
            {"name": name, "scale": scale} for name, scale in (("own", 0.7), ("tokens", -0.5), ("plain", 1.0))
        ],
    }
    sampled = {"temperature": 0.8, "seed": 5, "top_p": 0.9}
    changed = {"presence_penalty": 0.7, "logit_bias": {"97": 2.0}}
    shaped = {"guided_regex": "[a-z]{3,9} [a-z]+", "ignore_eos": False}
    asked: list[tuple[Any, str, dict[str, Any]]] = [
        (kind, f"Number {index} says @@call", more)
        for index, kind in enumerate(["tiny", *KINDS, summed])
        for more in ({}, sampled, changed, shaped)
    ]
    alone = [told(card, model, prompt, 5, **more) for model, prompt, more in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda each: told(card, each[0], each[1], 5, **each[2]), asked))
    for each, first, second in zip(asked, alone, together, strict=True):
        assert first == second, each


def test_own_tokens_are_written_stop_replies_and_are_nobody_elses(card: EmulatedServer, vocabulary: Vocabulary) -> None:
    first = VOCABULARY
    for kind, texts in OWN.items():
        last = len(texts) - 1 + first
        forced = told(card, kind, "The", 3, allowed_token_ids=[first])
        assert forced[0] == [first] * 3
        ended = posted(card, kind, {"prompt": "The", "max_tokens": 3, "logit_bias": {last: 100}})
        assert (ended.json()["choices"][0]["text"], ended.json()["choices"][0]["finish_reason"]) == ("", "stop")
        shaped = posted(
            card, kind, {"prompt": "The", "max_tokens": 2, "guided_choice": [texts[0] + "x"], "logit_bias": {first: 90}}
        )
        assert shaped.json()["choices"][0]["text"] == texts[0] + "x", shaped.text
        most = told(card, kind, f"The {texts[0]}", 2, logprobs=5, prompt_logprobs=0)
        assert all(0 <= token < first + len(texts) for token in most[0])
    for model in ("tiny", "plain", "tokens"):
        assert posted(card, model, {"prompt": [5, first], "max_tokens": 1}).status_code == 400
        assert posted(card, model, {"prompt": "a", "max_tokens": 1, "logit_bias": {first: 1}}).status_code == 400
    assert posted(card, "own", {"prompt": [5, first + 2], "max_tokens": 1}).status_code == 400
    both = {"model": "tiny", "adapters": [{"name": "own"}, {"name": "own-too"}]}
    assert posted(card, both, {"prompt": "a", "max_tokens": 1}).status_code == 400


def test_what_was_evicted_comes_back_with_the_same_bits(card: EmulatedServer, vocabulary: Vocabulary) -> None:
    """Deleted and sent again too; a deleted one's rows leave the device."""

    def used() -> float:
        return card.metric("loramux_pool_bytes", pool="adapter_tokens")

    before = told(card, "saved", PROMPTS[1], 4)
    held = used()
    assert held > 0
    with card.client() as client:
        assert client.delete("/v1/adapters/saved").status_code in (200, 204)
    told(card, "plain", PROMPTS[0])
    assert used() < held
    assert sent(card, "saved", vocabulary.adapters["saved"]).status_code == 201
    assert told(card, "saved", PROMPTS[1], 4) == before


def test_rows_that_find_no_room_on_the_card_fail_their_own_requests_and_nothing_else(
    card: EmulatedServer, vocabulary: Vocabulary
) -> None:
    """However often it is tried."""
    before = told(card, "tokens", PROMPTS[1], 2)
    with card.client() as client:
        for name in ("saved", "own-too"):
            client.delete(f"/v1/adapters/{name}")
    card.device.refuses = range(card.device.allocations + 1, card.device.allocations + 1000)
    try:
        for _ in range(MAX_FAILED_STEPS + 1):
            response = sent(card, "saved", vocabulary.adapters["saved"])
            assert response.status_code >= 500 and "no room for an adapter" in response.text
    finally:
        card.device.refuses = ()
    assert told(card, "tokens", PROMPTS[1], 2) == before
    for name in ("saved", "own-too"):
        assert sent(card, name, vocabulary.adapters[name]).status_code == 201
    (token,), (logprob,) = told(card, "saved", PROMPTS[0])
    assert logprob == pytest.approx(float(vocabulary.expected["saved"][0][token]), abs=0.03)


def test_rows_take_turns_in_memory_for_few_of_them_and_a_sum_that_never_fits_is_refused(
    card: EmulatedServer, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """Requests wait for each other, none for ever, and say what they say where there is room for all."""
    of_one = 2 * (VOCABULARY + 3) * (64 * 2 + 4)  # rows of the hidden size in bf16, and their tokens

    def few(rows: int, beside: int, on_gone: Any) -> SlotTable:
        return SlotTable(rows, min(beside, 2 * of_one), on_gone)

    def summed(*names: str) -> dict[str, Any]:
        return {"model": "tiny", "adapters": [{"name": name} for name in names]}

    asked: list[tuple[Any, str]] = [(kind, prompt) for prompt in PROMPTS for kind in KINDS]
    asked += [(summed("saved", "own"), prompt) for prompt in PROMPTS]
    config = settings(vocabulary.base, tmp_path / "store", cache_dir=tmp_path / "cache", adapter_memory_mib=1)
    with (
        patch.object(engine_build, "SlotTable", few),
        emulated_server(EmulatedDevice(kernels="triton"), config) as server,
    ):
        for kind, directory in vocabulary.adapters.items():
            assert sent(server, kind, directory).status_code == 201
        before = server.metric("loramux_adapter_evictions_total")
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda each: told(server, *each, 3), asked))
        assert server.metric("loramux_adapter_evictions_total") > before, "there was room for all"
        refused = posted(server, summed("saved", "own", "tokens"), {"prompt": "a", "max_tokens": 1})
        assert refused.status_code >= 400 and "--token-memory-mib" in refused.text
        assert server.metric("loramux_pool_bytes", pool="adapter_tokens") <= 2 * of_one
    assert together == [told(card, *each, 3) for each in asked]


def test_module_by_module_answers_are_those_of_peft_too(vocabulary: Vocabulary, tmp_path: Path) -> None:
    config = settings(vocabulary.base, tmp_path / "store", cache_dir=tmp_path / "cache", adapter_memory_mib=1)
    with emulated_server(EmulatedDevice(kernels="cuda"), config) as server:
        assert server.said("a step is run module by module")
        for kind in ("tokens", "saved", "own"):
            response = sent(server, kind, vocabulary.adapters[kind])
            assert response.status_code == 201, response.text
            for prompt, expected in zip(PROMPTS, vocabulary.expected[kind], strict=True):
                (token,), (logprob,) = told(server, kind, prompt)
                assert logprob == pytest.approx(float(expected[token]), abs=0.05), kind
