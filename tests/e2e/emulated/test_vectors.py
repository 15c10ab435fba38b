"""Adapters with DoRA, trained biases and (IA)3 on a server on a late device: peft's answers, alone and in company."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from e2e.emulated.conftest import Place
from loramux_adapters import nf4
from support.emulated import EmulatedDevice
from support.emulated_server import EmulatedServer, emulated_server, settings
from support.tiny_models import save_tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "dora": lambda: LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, r=8, use_dora=True, target_modules=TARGETS
    ),
    "bias": lambda: LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, r=16, bias="all", target_modules=["q_proj", "down_proj"]
    ),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "plain": lambda: LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=8, target_modules=TARGETS),
}
LARGE: dict[str, Any] = {  # half of the adapters' memory each
    f"large-{index}": lambda index=index: LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, r=128, use_dora=index % 2 == 0, target_modules=TARGETS
    )
    for index in range(4)
}
WITH_VECTORS = ("dora", "bias", "ia3")
PROMPTS = ["The keeper", "What is said, and then goes on", "A third one"]


@dataclass(frozen=True)
class Vectors:
    """
    Attributes:
        base: with biases of queries, keys and values.
        adapters: by kind, as peft wrote them.
        expected: by kind, and of the base as "tiny": of each prompt, the log probability of the likeliest next token by
            peft on the base's NF4 weights in fp32.
    """

    base: Path
    adapters: dict[str, Path]
    expected: dict[str, list[float]]


def with_numbers(model: Any) -> Any:
    """Vectors that training would have changed."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            if "magnitude" in name or "ia3_l" in name:
                parameter *= 1 + noise
            elif parameter.requires_grad and name.endswith("bias"):
                parameter += noise
    return model.eval()


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    root = tmp_path_factory.mktemp("vectors")
    base = save_tiny_model(root / "base", "qwen2", num_hidden_layers=1)

    def model() -> Any:
        found = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for path, module in found.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
                module.weight.data = nf4.dequantize(*nf4.quantize(module.weight.data))
        return found.eval()

    tokenizer = tiny_tokenizer()

    def likeliest(of: Any) -> list[float]:
        with torch.no_grad():
            found = [of(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1] for prompt in PROMPTS]
        return [float(logits.log_softmax(-1).max()) for logits in found]

    adapters, expected = {}, {"tiny": likeliest(model())}
    with torch.enable_grad():  # peft wants gradients for what it makes
        for index, (kind, config) in enumerate((KINDS | LARGE).items()):
            torch.manual_seed(index)
            tuned = with_numbers(get_peft_model(model(), config()))
            expected[kind] = likeliest(tuned)
            tuned.save_pretrained(root / kind)
            adapters[kind] = root / kind
    return Vectors(base, adapters, expected)


@pytest.fixture(scope="module")
def roomy(vectors: Vectors, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedServer]:
    """A server that was started with --adapter-vectors."""
    root = tmp_path_factory.mktemp("roomy")
    config = settings(
        vectors.base, root / "store", cache_dir=root / "cache", adapter_memory_mib=1, adapter_vectors=True
    )
    with emulated_server(EmulatedDevice(kernels="triton"), config) as server:
        for kind, directory in vectors.adapters.items():
            response = server.upload(kind, directory)
            assert response.status_code == 201, response.text
        yield server


def told(server: EmulatedServer, model: dict[str, Any] | str, prompt: str, count: int = 1) -> list[float]:
    """Log probabilities of a greedy reply."""
    named = model if isinstance(model, dict) else {"model": model}
    body = named | {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: list[float] = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    return found


def test_steps_are_whole_graphs_and_the_check_found_nothing(roomy: EmulatedServer) -> None:
    assert roomy.said("a reply is the same, bit for bit") and not roomy.said("runs on PyTorch's operations")
    assert roomy.said("of rank 16 with DoRA or biases")
    told(roomy, "dora", "started", 3)
    assert ("replay", "") in roomy.device.started[-20:]


@pytest.mark.parametrize("kind", ["tiny", *KINDS])
def test_answers_are_those_of_peft(roomy: EmulatedServer, vectors: Vectors, kind: str) -> None:
    found = [told(roomy, kind, prompt)[0] for prompt in PROMPTS]
    assert found == pytest.approx(vectors.expected[kind], abs=0.03)
    if kind != "tiny":
        changes = [
            abs(one - other) for one, other in zip(vectors.expected[kind], vectors.expected["tiny"], strict=True)
        ]
        assert max(changes) > 0.2


def test_a_mixed_batch_gives_the_bits_of_each_request_alone(roomy: EmulatedServer) -> None:
    summed = {
        "model": "tiny",
        "adapters": [{"name": name, "scale": scale} for name, scale in (("dora", 0.7), ("ia3", -0.5), ("plain", 1.0))],
    }
    asked = [(kind, f"Number {index} says") for index, kind in enumerate(["tiny", *KINDS, summed, "plain"])]
    alone = [told(roomy, *each, 5) for each in asked]
    assert len(set(map(tuple, alone))) == len(alone)
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda each: told(roomy, *each, 5), asked)) == alone


def test_an_upload_for_whose_norms_there_is_no_room_says_so(roomy: EmulatedServer, vectors: Vectors) -> None:
    """And what is served already goes on."""
    before = told(roomy, "dora", PROMPTS[1], 2)
    roomy.device.refuses = range(roomy.device.allocations + 1, roomy.device.allocations + 1000)
    try:
        response = roomy.upload("crowded", vectors.adapters["dora"])
    finally:
        roomy.device.refuses = ()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "device_full"), response.text
    assert "--device-memory-mib" in response.json()["error"]["message"]
    assert told(roomy, "dora", PROMPTS[1], 2) == before
    assert roomy.upload("crowded", vectors.adapters["dora"]).status_code == 201


def test_a_slot_that_had_gain_and_shift_leaves_none_to_the_next_adapter(
    roomy: EmulatedServer, vectors: Vectors
) -> None:
    """Adapters with and without take turns in the same slots."""
    misses = roomy.metric("loramux_adapter_lookups_total", tier="device", result="miss")
    found = [{name: told(roomy, name, PROMPTS[0], 3) for name in LARGE} for _ in range(2)]
    assert found[0] == found[1]
    for name, logprobs in found[0].items():
        assert logprobs[0] == pytest.approx(vectors.expected[name][0], abs=0.05), name
    misses = roomy.metric("loramux_adapter_lookups_total", tier="device", result="miss") - misses
    assert misses == 2 * len(LARGE), "nobody was evicted"


def test_room_for_vectors_changes_no_bit_of_other_replies(
    roomy: EmulatedServer, vectors: Vectors, tmp_path: Path
) -> None:
    """Against a server without the flag, which refuses the others and says what to do."""
    config = settings(vectors.base, tmp_path / "store", cache_dir=tmp_path / "cache", adapter_memory_mib=1)
    with emulated_server(EmulatedDevice(kernels="triton"), config) as server:
        assert server.upload("plain", vectors.adapters["plain"]).status_code == 201
        for kind in WITH_VECTORS:
            response = server.upload(kind, vectors.adapters[kind])
            assert response.status_code == 422 and "--adapter-vectors" in response.text, kind
        for model in ("tiny", "plain"):
            assert [told(server, model, prompt, 4) for prompt in PROMPTS] == [
                told(roomy, model, prompt, 4) for prompt in PROMPTS
            ]


def test_module_by_module_answers_are_those_of_peft_too(vectors: Vectors, tmp_path: Path) -> None:
    """Without our kernels: bitsandbytes' layers, whose norms are taken in host memory."""
    config = settings(
        vectors.base, tmp_path / "store", cache_dir=tmp_path / "cache", adapter_memory_mib=1, adapter_vectors=True
    )
    with emulated_server(EmulatedDevice(kernels="cuda"), config) as server:
        assert server.said("a step is run module by module")
        for kind in WITH_VECTORS:
            response = server.upload(kind, vectors.adapters[kind])
            assert response.status_code == 201, response.text
            found = [told(server, kind, prompt)[0] for prompt in PROMPTS]
            assert found == pytest.approx(vectors.expected[kind], abs=0.05), kind
