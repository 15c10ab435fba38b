"""The trained model against peft's own: losses, gradients, what is saved, and a base that nothing touches."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import RecipeError
from loramux_adapters.lora.verify import check_adapter
from loramux_adapters.training.data.batches import IGNORED, Row, TokenBatch
from loramux_adapters.training.model.frozen_base import base_digest
from loramux_adapters.training.model.model import LoraModel, StepLoss
from loramux_adapters.training.recipe import Recipe
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.kernels.layers.fp32 import keep_unpacked
from support.decoders import slow_twin
from support.tiny_models import save_tiny_model, tiny_config

CPU = CpuDevice()
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox", "granite"]


def rows(count: int = 5, seed: int = 0, shared: int = 6) -> list[Row]:
    """Rows of different lengths with one beginning, each with three learned tokens and one after them."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 256, (count + 1, 40), generator=generator).tolist()
    out = []
    for index in range(count):
        ids = draws[count][:shared] + draws[index][: 9 + 2 * index]
        out.append(Row(tuple(ids), tuple(len(ids) - 4 <= place < len(ids) - 1 for place in range(len(ids)))))
    return out


def load(directory: Path, **options: Any) -> BaseModel:
    given: dict[str, Any] = {"training": True} | options
    return load_base_model(
        str(directory / "base"), device=CPU, cache_dir=directory / "cache", report=lambda line: None, **given
    )


def build(directory: Path, recipe: Recipe | None = None, architecture: str = "llama") -> tuple[LoraModel, BaseModel]:
    """A tiny base, loaded as it is in training, with random A and B."""
    recipe = recipe or Recipe()
    if not (directory / "base").exists():
        save_tiny_model(directory / "base", architecture)
    base = load(directory, quantize=recipe.quantize)
    model = LoraModel.build(base.model, recipe)
    randomize(model.trainable)
    return model, base


def randomize(trainable: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in trainable.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def gradients(model: LoraModel, batch: TokenBatch, scale: float = 1.0) -> dict[str, torch.Tensor]:
    for parameter in model.trainable.values():
        parameter.grad = None
    model.loss(batch, grad_scale=scale)
    return {name: parameter.grad for name, parameter in model.trainable.items() if parameter.grad is not None}


def plain_peft(base: Any, recipe: Recipe, batch: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss and its gradients, one row at a time, through peft's layers and transformers' attention."""
    base.set_attn_implementation("eager")
    names = {path.rpartition(".")[2] for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=int(recipe.alpha),
        use_rslora=recipe.rslora,
        target_modules=sorted(names - {"lm_head", "embed_out"}),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    randomize(trainable)
    total = torch.zeros(())
    for row in batch:
        ids = torch.tensor([row.ids])
        labels = torch.tensor([token if learn else IGNORED for token, learn in zip(row.ids, row.learn, strict=True)])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        total = total + nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in trainable.items() if p.grad is not None}


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_fp32_loss_and_every_gradient_are_those_of_peft(architecture: str, rslora: bool) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32)
    recipe = Recipe(quantize="none", rank=4, alpha=6, rslora=rslora)
    total, theirs = plain_peft(copy.deepcopy(base), recipe, rows())
    model = LoraModel.build(base, recipe)
    randomize(model.trainable)
    ours = gradients(model, TokenBatch.of(rows()))
    assert model.evaluate(TokenBatch.of(rows())).loss_sum == pytest.approx(total, rel=1e-4)
    assert list(ours) == list(theirs)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 1e-3 * gradient.norm(), name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_on_nf4_every_gradient_points_where_an_fp32_model_of_the_same_weights_says(
    architecture: str, tmp_path: Path
) -> None:
    model, _ = build(tmp_path, architecture=architecture)
    total, theirs = plain_peft(slow_twin(load(tmp_path).model), Recipe(), rows())
    ours = gradients(model, TokenBatch.of(rows()))
    assert model.evaluate(TokenBatch.of(rows())).loss_sum == pytest.approx(total, rel=1e-3)
    worst = min((cosine(ours[name], theirs[name]), name) for name in theirs)
    assert worst[0] > 0.9999, worst
    together = [torch.cat([found[name].flatten() for name in theirs]) for found in (ours, theirs)]
    assert cosine(together[0], together[1]) > 0.99997


def test_rows_together_give_the_gradients_of_each_row_alone(tmp_path: Path) -> None:
    model, _ = build(tmp_path, Recipe(quantize="none"))
    model._model.float()
    together = gradients(model, TokenBatch.of(rows()), scale=0.5)
    alone = [gradients(model, TokenBatch.of([row]), scale=0.5) for row in rows()]
    for name, gradient in together.items():
        assert torch.allclose(gradient, sum(part[name] for part in alone), rtol=1e-3, atol=1e-4), name  # type: ignore[arg-type]


def test_a_row_does_not_feel_its_neighbours(tmp_path: Path) -> None:
    model, _ = build(tmp_path, Recipe(quantize="none"))
    model._model.float()
    first, other = rows(2), rows(2, seed=3, shared=0)
    alone = model.evaluate(TokenBatch.of(first[:1])).loss_sum
    for neighbour in (first[1], other[1]):
        both = model.evaluate(TokenBatch.of([first[0], neighbour])).loss_sum
        assert both - model.evaluate(TokenBatch.of([neighbour])).loss_sum == pytest.approx(alone, rel=1e-4)


def test_parts_of_a_batch_add_up_to_the_whole(tmp_path: Path) -> None:
    model, _ = build(tmp_path)
    batch = rows(6)
    whole = gradients(model, TokenBatch.of(batch), scale=1 / 18)
    for parameter in model.trainable.values():
        parameter.grad = None
    losses = [model.loss(TokenBatch.of(part), grad_scale=1 / 18) for part in (batch[:2], batch[2:5], batch[5:])]
    assert sum(loss.tokens for loss in losses) == 18
    for name, parameter in model.trainable.items():
        assert parameter.grad is not None
        assert cosine(parameter.grad, whole[name]) > 0.998, name


def test_a_step_is_the_same_bit_for_bit_when_it_is_repeated_dropout_included(tmp_path: Path) -> None:
    model, _ = build(tmp_path, Recipe(dropout=0.2))
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(gradients(model, TokenBatch.of(rows())))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_two_models_of_one_recipe_start_and_step_alike(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    models = [LoraModel.build(load(tmp_path).model, Recipe(seed=5)) for _ in range(2)]
    other = LoraModel.build(load(tmp_path).model, Recipe(seed=6))
    for name, parameter in models[0].trainable.items():
        assert torch.equal(parameter, models[1].trainable[name])
        assert ("lora_A" in name) != torch.equal(parameter, other.trainable[name])
    first, second = (gradients(model, TokenBatch.of(rows())) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_evaluation_leaves_base_and_later_gradients_as_they_were(tmp_path: Path) -> None:
    model, _ = build(tmp_path, Recipe(dropout=0.1))
    digest = model.base_digest()
    batch = TokenBatch.of(rows())
    torch.manual_seed(1)
    before = gradients(model, batch)
    outcome = model.evaluate(TokenBatch.of(rows(4, seed=9)))
    torch.manual_seed(1)
    after = gradients(model, batch)
    assert outcome.tokens == 12
    assert model.base_digest() == digest
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_base_that_would_repack_itself_is_not_trained(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    base: Any = load(tmp_path, quantize="none").model
    four = Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    four.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on a processor that has AVX512-BF16
    base.model.layers[0].self_attn.q_proj = four
    with pytest.raises(AssertionError):
        LoraModel.build(base, Recipe())
    keep_unpacked(base)
    LoraModel.build(base, Recipe())


def test_training_touches_a_and_b_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    untouched = base_digest(load(tmp_path).model)
    model, _ = build(tmp_path)
    assert model.base_digest() == untouched
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(model.loss(TokenBatch.of(rows(3)), grad_scale=1 / 9))
        optimizer.step()
    assert losses[-1].loss_sum < 0.05 * losses[0].loss_sum
    assert losses[-1].correct == losses[-1].tokens == 9
    assert model.base_digest() == untouched
    with_gradient = {name for name, parameter in model._peft.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(model.trainable)
    assert all("lora_A" in name or "lora_B" in name for name in with_gradient)


@pytest.mark.parametrize("part", ["weight", "scales", "norm", "head"])
def test_the_digest_notices_one_changed_value(part: str, tmp_path: Path) -> None:
    model, base = build(tmp_path)
    digest = model.base_digest()
    layer = base.model.get_submodule("model.layers.0.mlp.down_proj").get_base_layer()
    tensors = {
        "weight": layer.weight.data,
        "scales": layer.scales if hasattr(layer, "scales") else layer.weight.quant_state.absmax,
        "norm": base.model.get_submodule("model.norm").weight.data,
        "head": base.model.get_output_embeddings().weight.data,
    }
    tensors[part].view(-1)[3] += 1
    assert model.base_digest() != digest


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model, _ = build(tmp_path, Recipe(dropout=0.1, gradient_checkpointing=checkpointing))
        calls = count_calls(model._model.get_submodule("model.layers.0.mlp.down_proj"))
        torch.manual_seed(2)
        found.append(gradients(model, TokenBatch.of(rows())))
        assert len(calls) == 1 + checkpointing
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def count_calls(module: nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def test_no_dropout_but_the_adapters_own_is_active(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "phi3", resid_pdrop=0.5)
    model, _ = build(tmp_path, Recipe())
    first = gradients(model, TokenBatch.of(rows()))
    second = gradients(model, TokenBatch.of(rows()))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_without_learned_tokens_costs_nothing_and_gives_no_gradient(tmp_path: Path) -> None:
    model, _ = build(tmp_path)
    silent = TokenBatch.of([Row((1, 2, 3), (False, False, False))])
    assert gradients(model, silent) == {}
    assert model.evaluate(silent) == StepLoss(0.0, 0, 0)


def test_only_the_named_layers_get_an_adapter(tmp_path: Path) -> None:
    model, _ = build(tmp_path, Recipe(target_modules=("v_proj", "q_proj")))
    assert {name.split(".")[-4] for name in model.trainable} == {"q_proj", "v_proj"}


def test_all_linear_layers_but_the_head_get_one_by_default(tmp_path: Path) -> None:
    model, _ = build(tmp_path, architecture="phi3")
    assert {name.split(".")[-4] for name in model.trainable} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    with pytest.raises(
        RecipeError,
        match="target_modules: no layer that can be trained is called lm_head, q_porj; .* k_proj, o_proj, q_proj",
    ):
        LoraModel.build(load(tmp_path).model, Recipe(target_modules=("q_porj", "lm_head", "v_proj")))


def test_the_counts_are_those_of_the_tensors(tmp_path: Path) -> None:
    model, base = build(tmp_path, Recipe(rank=4))
    counts = model.counts()
    assert counts.trainable == sum(4 * (i + o) for name, (i, o) in base.linears.items() if name != "lm_head")
    assert counts.adapter_bytes == 4 * counts.trainable
    assert counts.base_bytes_16bit == base.bytes_16bit == 2 * (counts.total - counts.trainable)
    assert counts.base_bytes < counts.base_bytes_16bit
    sixteen, _ = build(tmp_path, Recipe(quantize="none"))
    assert sixteen.counts().base_bytes == sixteen.counts().base_bytes_16bit == counts.base_bytes_16bit


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments.*loramux_base_id")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_was_saved_and_answers_as_the_trained_model(tmp_path: Path, rslora: bool, dtype: str) -> None:
    model, base = build(tmp_path, Recipe(rank=4, alpha=6, rslora=rslora, quantize="none"))
    model.save(tmp_path / "adapter", base_name="tiny", base_id=base.base_id, dtype=dtype)
    checked = check_adapter(tmp_path / "adapter", base.info(), 8)
    assert (checked.rank, checked.base_id, checked.base_verified) == (4, base.base_id, True)
    theirs: Any = PeftModel.from_pretrained(load(tmp_path, quantize="none").model.float(), tmp_path / "adapter").eval()
    model._model.float()
    row = rows(1)[0]
    labels = torch.tensor(row.ids)[1:]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")[list(row.learn[1:])]
    ours = model.evaluate(TokenBatch.of([row])).loss_sum
    assert ours == pytest.approx(float(losses.sum()), rel=1e-4 if dtype == "float32" else 2e-2)
    assert ours != pytest.approx(float(base_loss(tmp_path, row)), rel=0.05)


def base_loss(directory: Path, row: Row) -> float:
    """Of the base without an adapter, so that the comparison above would notice one that is not applied."""
    model: Any = load(directory, quantize="none").model.float()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
    losses = nn.functional.cross_entropy(logits, torch.tensor(row.ids)[1:], reduction="none")
    return float(losses[list(row.learn[1:])].sum())


def test_the_saved_config_lists_its_targets_in_order_and_says_its_base(tmp_path: Path) -> None:
    model, base = build(tmp_path)
    for directory in (tmp_path / "one", tmp_path / "two"):
        model.save(directory, base_name="tiny", base_id=base.base_id, dtype="bfloat16")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["base_model_name_or_path"], config["loramux_base_id"]) == ("tiny", base.base_id)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
