from __future__ import annotations

import pytest

from loramux_adapters.artifact.tensor_names import DEFAULT, other_tool, role_of
from loramux_adapters.errors import AdapterRejected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", ("model.layers.0.mlp.up_proj", "A")),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", ("model.layers.0.mlp.up_proj", "B")),
        ("base_model.model.lm_head.lora_B.weight", ("lm_head", "B")),
        ("lm_head.lora_A.weight", ("lm_head", "A")),
        ("base_model.model.lm_head.base_layer.weight", ("lm_head.weight", "base")),
        ("base_model.model.model.embed_tokens.weight", ("model.embed_tokens.weight", "base")),
        ("model.layers.0.mlp.up_proj.lora_A.weight", ("model.layers.0.mlp.up_proj", "A")),
        ("base_model.model.base_model.model.lm_head.lora_B.weight", ("lm_head", "B")),
        ("module.base_model.model._orig_mod.lm_head.lora_B.weight", ("lm_head", "B")),
        (
            "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.lora_B.weight",
            ("model.layers.0.mlp.up_proj", "B"),
        ),
        ("lora_A.weight", ("lora_A.weight", "base")),
        ("", ("", "base")),
        ("../../etc/passwd", ("../../etc/passwd", "base")),
    ],
)
def test_a_tensor_name_says_which_module_it_belongs_to(name: str, expected: tuple[str, str]) -> None:
    assert role_of(name)[:2] == expected


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("base_model.model.lm_head.base_layer.lora_B.weight", "inside another one"),
    ],
)
def test_weights_of_other_kinds_are_refused_by_the_name_of_their_option(name: str, field: str) -> None:
    with pytest.raises(AdapterRejected, match=field):
        role_of(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_embedding_A", ("embed_tokens", "embedding_A", DEFAULT)),
        ("lora_embedding_B.pirate", ("embed_tokens", "embedding_B", "pirate")),
        ("token_adapter.trainable_tokens_delta", ("embed_tokens", "tokens", DEFAULT)),
        ("token_adapter.trainable_tokens_delta.pirate", ("embed_tokens", "tokens", "pirate")),
        ("token_adapter.base_layer.weight", ("embed_tokens.weight", "base", "")),
        ("modules_to_save.weight", ("embed_tokens.weight", "base", "")),
        ("modules_to_save.pirate.weight", ("embed_tokens.weight", "base", "")),
    ],
)
def test_what_is_of_the_vocabulary_is_told_by_its_names(name: str, expected: tuple[str, str, str]) -> None:
    assert role_of(f"base_model.model.embed_tokens.{name}") == expected


@pytest.mark.parametrize("name", ["pirate", "0", "lora_A", "weight"])
def test_the_adapters_own_name_in_a_tensors_name_is_told(name: str) -> None:
    assert role_of(f"base_model.model.lm_head.lora_B.{name}.weight") == ("lm_head", "B", name)
    assert role_of("base_model.model.lm_head.lora_B.weight").adapter == DEFAULT
    assert role_of("base_model.model.lm_head.weight").adapter == ""


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx-lm"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
        ("transformer.h.0.attn.qkv.lora_A", "LitGPT"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "Kohya"),
        ("unet.down_blocks.0.attn1.to_q.lora.up.weight", "diffusers"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "NeMo"),
        ("model.embed_tokens.weight", None),
    ],
)
def test_names_that_other_tools_give_are_known(name: str, tool: str | None) -> None:
    assert role_of(name).kind == "base"
    found = other_tool(name)
    assert found is None if tool is None else tool in (found or "")
