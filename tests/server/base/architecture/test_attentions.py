"""Attention of other kinds: latent (DeepSeek and others), and Llama 4's chunks, temperature and complex rotation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.lora.slots import Slot
from loramux_adapters.lora.verify import check_adapter
from loramux_server.base.loader import BaseModel, load_base_model, skeleton_of
from loramux_server.base.source import resolve_base
from loramux_server.base.support import unsupported_config
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.errors import BaseModelError
from loramux_server.kernels.attention.paged_attention import probe_kv_shape, use_eager_attention
from loramux_server.kernels.choice import available_kernels, choose_kernels
from loramux_server.kernels.numerics import library_operations
from loramux_server.serving.planned_base import planned_base
from support.adapter_files import write_adapter
from support.stepping import Stepper, relative_difference
from support.tiny_models import ATTENTION_MIXTURES, ATTENTIONS, save_tiny_model, tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft adds patterns for experts, which these models do not have
    pytest.mark.filterwarnings("ignore:target_parameters=.* were set but no parameter:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
CPU = CpuDevice()
PROMPT = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(1)).tolist()
LATENT = [name for name in ATTENTIONS if name != "llama4_text"]


def load(directory: Path, **options: Any) -> BaseModel:
    cache = directory.parent / "cache"
    return load_base_model(str(directory), device=CPU, cache_dir=cache, report=lambda line: None, **options)


def theirs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Transformers' own attention over the whole text at once: [tokens, vocabulary]."""
    use_eager_attention(model)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("kernels", ["native", "tensor"])
@pytest.mark.parametrize("architecture", ATTENTIONS)
def test_a_tiny_model_answers_as_transformers_does_in_pieces_and_token_by_token(
    architecture: str, kernels: str, tmp_path: Path
) -> None:
    """Pieces of 13 tokens cross the edges of Llama 4's chunks of 20, and the replies go on in the third."""
    directory = save_tiny_model(tmp_path / "base", architecture)
    stepper = Stepper(load(directory, kernels=choose_kernels(CPU, kernels)).model, kernels=kernels)
    sequence = stepper.sequence("s", PROMPT)
    steps = stepper.greedy(sequence, 20, chunk=13)
    expected = theirs(load(directory, exact=True).model, PROMPT + sequence.output)
    for index, ours in enumerate(steps):
        assert relative_difference(ours, expected[len(PROMPT) - 1 + index]) < 0.01


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama4_text", {"attention_chunk_size": 400}),
        ("llama4_text", {"attn_temperature_tuning": False}),
        ("llama4_text", {"no_rope_layers": [1, 1, 1]}),
        ("llama4_text", {"use_qk_norm": False}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("deepseek_v2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)
def test_each_of_these_is_felt_so_the_test_above_would_notice_its_absence(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    logits = []
    for name, own in (("with", {}), ("without", changes)):
        directory = save_tiny_model(tmp_path / name, architecture, **own)
        logits.append(theirs(load(directory, exact=True).model, PROMPT)[-1])
    assert relative_difference(*logits) > 0.1


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("deepseek_v2", {"q_lora_rank": 64}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("deepseek_v3", {"v_head_dim": 64}),  # wider than keys
        ("deepseek_v3", {"rope_interleave": False, "attention_bias": True}),
        ("minicpm3", {"scale_emb": 1.5, "tie_word_embeddings": False}),
        ("llama4_text", {"use_qk_norm": False, "attention_bias": True}),
        ("llama4_text", {"attn_temperature_tuning": False}),
    ],
)
def test_their_variants_answer_as_transformers_does(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, **changes)
    stepper = Stepper(load(directory).model)
    ours = stepper.prefill(stepper.sequence("s", PROMPT), chunk=13)
    assert relative_difference(ours, theirs(load(directory, exact=True).model, PROMPT)[-1]) < 0.01


@pytest.mark.parametrize("architecture", ATTENTIONS)
def test_they_run_module_by_module_and_on_operations_that_have_the_same_bits_anywhere(
    architecture: str, tmp_path: Path
) -> None:
    base = load(save_tiny_model(tmp_path / "base", architecture))
    stepper = Stepper(base.model)
    assert stepper.runner.decoder is None and stepper.runner.why_by_modules
    assert library_operations(base.model) == []


@pytest.mark.parametrize("architecture", LATENT)
def test_keys_and_values_of_two_widths_lie_in_a_cache_of_the_wider_and_plans_know_it(
    architecture: str, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    shape = probe_kv_shape(load(directory).model, CPU, whole_numbers=True)
    assert (shape.kv_heads, shape.head_dim) == (4, 48)
    planned = planned_base(skeleton_of(resolve_base(str(directory), tmp_path / "cache", print))[1]).sizes
    assert (planned.kv.kv_heads, planned.kv.head_dim) == (4, 48)
    assert planned.form is None


def peft_adapter(directory: Path, oracle: Any, seed: int, rank: int) -> torch.Tensor:
    """peft's random adapter for all linear layers that it sees, and the logits [tokens, vocabulary] that it gives.

    Where a family has mixtures, peft takes a list's or a pattern's MLPs for experts, of which there are none here.
    """
    torch.manual_seed(seed)
    names = r".*(self_attn|mlp|feed_forward)\.\w+_proj(_with_mqa)?"
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=names, r=rank)
    with torch.enable_grad():
        model = get_peft_model(oracle, config).eval()
    logits = theirs(model.get_base_model(), PROMPT)
    model.save_pretrained(directory, save_embedding_layers=False)
    model.unload()
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": None, "rank_pattern": {}}))
    return logits


@pytest.mark.parametrize("architecture", ATTENTIONS)
def test_adapters_of_all_layers_by_peft_share_a_batch_and_each_has_its_bits_alone(
    architecture: str, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, tie_word_embeddings=False)
    oracle = load(directory, exact=True).model
    expected = [theirs(oracle, PROMPT)]
    expected += [peft_adapter(tmp_path / str(rank), oracle, rank, rank) for rank in (4, 16)]
    found = {}
    for kernels in available_kernels(CPU):
        if not kernels.startswith("native"):
            continue
        base = load(directory, kernels=choose_kernels(CPU, kernels))
        stepper, slots = Stepper(base.model, kernels=kernels), [None, Slot(0, 8), Slot(16, 16)]
        for slot, rank in zip(slots[1:], (4, 16), strict=True):
            checked = check_adapter(tmp_path / str(rank), base.info(), 64)
            assert {path for path in base.linears if "self_attn" in path} <= checked.adapter.modules.keys()
            stepper.load(slot, checked.adapter)
        together = [stepper.sequence(f"t{index}", PROMPT, slot) for index, slot in enumerate(slots)]
        for count in (11, 30, len(PROMPT) - 41):
            logits = stepper.logits([(sequence, count) for sequence in together])
        for index, slot in enumerate(slots):
            alone = stepper.prefill(stepper.sequence(f"a{index}", PROMPT, slot), chunk=7)
            assert torch.equal(alone, logits[index])
        found[kernels] = logits
    assert all(torch.equal(logits, found["native"]) for logits in found.values()), "on every instruction set"
    for index, own in enumerate(expected):
        assert relative_difference(found["native"][index], own[-1]) < 0.02
        assert index == 0 or relative_difference(own[-1], expected[0][-1]) > 0.1


@pytest.mark.parametrize("architecture", ATTENTION_MIXTURES)
def test_their_mixtures_answer_as_transformers_does_with_adapters_of_attention_and_experts(
    architecture: str, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, **ATTENTION_MIXTURES[architecture])
    base = load(directory)
    assert library_operations(base.model) == []
    stepper, slots = Stepper(base.model), [None, Slot(0, 8)]
    linears = {path: shape for path, shape in base.linears.items() if "lm_head" not in path}
    assert any("experts.1.down_proj" in path for path in linears) and any("self_attn" in path for path in linears)
    adapter = write_adapter(tmp_path / "adapter", linears, rank=4, std_b=0.2)
    checked = check_adapter(adapter, base.info(), 8).adapter
    assert checked.modules.keys() == linears.keys()
    stepper.load(Slot(0, 8), checked)
    together = stepper.logits([(stepper.sequence(f"t{slot}", PROMPT, slot), len(PROMPT)) for slot in slots])
    for slot, logits in zip(slots, together, strict=True):
        assert torch.equal(stepper.prefill(stepper.sequence(f"a{slot}", PROMPT, slot), chunk=13), logits)
    assert relative_difference(together[1], together[0]) > 0.05
    exact = load(directory, exact=True).model
    assert relative_difference(together[0], theirs(exact, PROMPT)[-1]) < 0.01
    for path, (a, bt) in checked.modules.items():
        if ".experts." not in path:
            exact.get_submodule(path).weight.data += bt.float().T @ a.float()
            continue
        before, number, layer = path.rsplit(".", 2)
        weights: Any = exact.get_submodule(before)
        whole = (weights.down_proj if layer == "down_proj" else weights.gate_up_proj).data[int(number)]
        whole = whole.T if architecture == "llama4_text" else whole
        (whole if layer == "down_proj" else whole.chunk(2)[layer == "up_proj"]).add_(bt.float().T @ a.float())
    assert relative_difference(together[1], theirs(exact, PROMPT)[-1]) < 0.02


@pytest.mark.parametrize("architecture", ATTENTIONS)
def test_a_server_checks_itself_and_shares_the_blocks_of_prompts_that_begin_alike(
    architecture: str, tmp_path: Path
) -> None:
    engine = LocalEngine.open(load(save_tiny_model(tmp_path / "base", architecture)), tokens=1024, max_rank=8)
    assert engine.checked.batch_invariant and "any cpu" in engine.numerics_id
    prompts = [PROMPT, PROMPT[:40] + [7], PROMPT[:40] + [7, 8, 9]]

    def replies(*asked: list[int]) -> list[list[int]]:
        return [reply.tokens for reply in engine.generate(asked, None, max_tokens=8, stop_ids=frozenset())]

    fresh = [replies(prompt)[0] for prompt in prompts]
    assert replies(*reversed(prompts)) == fresh[::-1]
    expected = theirs(load(tmp_path / "base", exact=True).model, PROMPT + fresh[0])
    for row, token in zip(expected[len(PROMPT) - 1 :], fresh[0], strict=False):
        assert row.max() - row[token] < 0.02 * row.std(), "the likeliest, or as good as it"


@pytest.mark.parametrize("architecture", ["deepseek_v3", "llama4_text"])
def test_training_on_them_is_refused_with_what_to_do(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    with pytest.raises(BaseModelError, match=r"latent|chunks.*not trained here.*peft"):
        load(directory, training=True)


@pytest.mark.parametrize("architecture", ["glm_moe_dsa", "longcat_flash"])
def test_latent_attention_of_another_kind_is_refused_by_name(architecture: str) -> None:
    reasons = unsupported_config(tiny_config(architecture))
    assert any("latent attention" in reason and "deepseek_v3" in reason for reason in reasons)


def test_chunks_without_a_size_are_refused(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "llama4_text", attention_chunk_size=None)
    with pytest.raises(BaseModelError, match="attention_chunk_size is None"):
        Stepper(load(directory).model)
