"""Tiny random models of many architectures, as real checkpoints: legal sizes for the packed NF4 kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "initializer_range": 0.2,  # large enough that positions and masks show in the logits
}

_GRANITE = {"attention_multiplier": 0.1, "logits_scaling": 2.0, "residual_multiplier": 0.5}

# architecture -> what its config says beyond COMMON
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma": {},
    "gemma2": {
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 32,
    },
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 32},
    "phi3": {},
    "granite": _GRANITE,
    "olmo2": {},
    "smollm3": {},
    "starcoder2": {"sliding_window": 8},
    "gpt_neox": {},
}

# that turn neighbours, and whose norms take off the mean: as above
NEIGHBOURS: dict[str, dict[str, Any]] = {"cohere": {}, "cohere2": {"sliding_window": 8}}

# mixtures of experts: as above
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_CORRECTED = {  # by sigmoids that are corrected, in groups
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**_EXPERTS, "norm_topk_prob": False, "clip_qkv": 4.0},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen2_moe": {**_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 128},
    "glm4_moe": {**_CORRECTED, "use_qk_norm": True},
    "dots1": {
        **_CORRECTED,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "exaone_moe": {
        **_CORRECTED,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "is_moe_layer": [False, True, True],
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
    },
    "solar_open": _CORRECTED,
    "flex_olmo": {**_EXPERTS, "norm_topk_prob": False},
    "granitemoe_swa": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        **_GRANITE,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, **_GRANITE},
    "granitemoeshared": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        **_GRANITE,
    },
}

# attention of other kinds than keys and values of one width of all tokens before: as above
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 32,
    "head_dim": 32,
    "v_head_dim": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}
_LLAMA4 = {
    "num_hidden_layers": 3,
    "intermediate_size_mlp": 128,
    "no_rope_layers": [1, 0, 1],
    "attention_chunk_size": 20,
    "floor_scale": 8,
    "attn_scale": 0.5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
_DENSE = {"first_k_dense_replace": 3}  # of its layers, which are fewer
ATTENTIONS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "rope_parameters": _YARN, **_DENSE},
    "deepseek_v3": {**_LATENT, "rope_parameters": _YARN, **_DENSE},
    "minicpm3": {**_LATENT, "scale_emb": 2, "scale_depth": 1.4, "dim_model_base": 32},
    "youtu": _LATENT,
    "llama4_text": {**_LLAMA4, "moe_layers": []},
}
# and with experts: name -> changes of the above
ATTENTION_MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **_CORRECTED,
        **_LATENT,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
    },
    "deepseek_v3": {**_CORRECTED, **_LATENT, "rope_parameters": _YARN},
    "glm4_moe_lite": {**_CORRECTED, **_LATENT, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "llama4_text": {**_LLAMA4, "moe_layers": [0, 2], "num_local_experts": 4, "num_experts_per_tok": 1},
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_config(architecture: str, **changes: Any) -> Any:
    own = (ARCHITECTURES | NEIGHBOURS | MIXTURES | ATTENTIONS).get(architecture, {})
    return AutoConfig.for_model(architecture, **(COMMON | own | changes))


def save_tiny_model(directory: Path, architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Writes a random model with a byte-level tokenizer; `changes` go into its config."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.bfloat16)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith((".gate.weight", ".router.weight", ".router.bias", ".sinks", "_bias", "_gate.weight")):
            nn.init.normal_(parameter, std=0.25)  # where all is zero nobody sees that it counts
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    if shown:
        transformers_logging.enable_progress_bar()
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, then <s> 256 and </s> 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_quantized_model(directory: Path, source: Path, *, double: bool = True, **options: Any) -> Path:
    """What transformers and bitsandbytes make of a checkpoint and save, as QLoRA's users have it.

    Args:
        double: quantize the scales too.
        options: `dtype` of what stays as it is, bf16 if not given; others of BitsAndBytesConfig, such as
            llm_int8_skip_modules.
    """
    dtype = options.pop("dtype", torch.bfloat16)
    untyped: Any = BitsAndBytesConfig
    given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "load_in_4bit": True} | options
    recipe = untyped(bnb_4bit_use_double_quant=double, **given)
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM
    model = model.from_pretrained(source, quantization_config=recipe, dtype=dtype, device_map={"": "cpu"})
    model.save_pretrained(directory)
    if shown:
        transformers_logging.enable_progress_bar()
    tiny_tokenizer().save_pretrained(directory)
    return directory
