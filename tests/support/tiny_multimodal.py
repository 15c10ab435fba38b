"""Tiny random models that take images too, as real checkpoints, as transformers 5 and version 4 wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers import logging as transformers_logging

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.architecture.experts import put_expert
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from support.tiny_models import ATTENTIONS, COMMON, tiny_tokenizer

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
_M_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_IMAGE_TOKENS = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
_CLIP = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, **_VISION}

# kind -> (its config, what its language part's config says beyond COMMON)
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        {"vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}, **_IMAGE_TOKENS},
        {"rope_parameters": _M_ROPE},
    ),
    "qwen2_5_vl": (
        {"vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [0]}, **_IMAGE_TOKENS},
        {"rope_parameters": _M_ROPE},
    ),
    "qwen3_vl": (
        {
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_IMAGE_TOKENS,
        },
        {"rope_parameters": _M_ROPE | {"mrope_interleaved": True}},
    ),
    "gemma3": (
        {
            "vision_config": {"image_size": 32, "patch_size": 8, **_VISION},
            "mm_tokens_per_image": 4,
            "image_token_index": 300,
            "boi_token_index": 301,
            "eoi_token_index": 302,
        },
        {"sliding_window": 8, "query_pre_attn_scalar": 32},
    ),
    "mistral3": (
        {"vision_config": {"model_type": "pixtral", "image_size": 32, "patch_size": 8, "head_dim": 16, **_VISION}},
        {"model_type": "mistral", "sliding_window": 8},
    ),
    "llava": ({"vision_config": _CLIP, "image_token_index": 300}, {"model_type": "llama"}),
    "llava_next": ({"vision_config": _CLIP, "image_token_index": 300}, {"model_type": "llama"}),
    "internvl": (
        {"vision_config": {"image_size": [32, 32], "patch_size": [16, 16], **_VISION}, "image_token_id": 300},
        {"model_type": "qwen2"},
    ),
    "idefics3": (
        {"vision_config": {"image_size": 32, "patch_size": 16, **_VISION}, "image_token_id": 300, "scale_factor": 2},
        {"model_type": "llama"},
    ),
    "smolvlm": (
        {"vision_config": {"image_size": 32, "patch_size": 16, **_VISION}, "image_token_id": 300, "scale_factor": 2},
        {"model_type": "llama"},
    ),
    "llama4": (
        {
            "vision_config": {
                "image_size": 32,
                "patch_size": 16,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
                **_VISION,
            },
            "image_token_index": 300,
            "boi_token_index": 301,
            "eoi_token_index": 302,
        },
        {"model_type": "llama4_text", **ATTENTIONS["llama4_text"]},
    ),
}

# those whose language part is a mixture of experts
MIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl_moe": (
        {
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_IMAGE_TOKENS,
        },
        {
            "rope_parameters": _M_ROPE | {"mrope_interleaved": True},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
        },
    ),
}


def multimodal_config(kind: str, *, tied: bool = False, **changes: Any) -> Any:
    """`changes` go into the language part's config."""
    whole, text = (MULTIMODAL | MIXED)[kind]
    return AutoConfig.for_model(
        kind, **whole, text_config=COMMON | text | changes, tie_word_embeddings=tied, bos_token_id=256, eos_token_id=257
    )


def save_multimodal(directory: Path, kind: str, *, seed: int = 0, tied: bool = False, **changes: Any) -> Path:
    """Writes a random model with a byte-level tokenizer."""
    torch.manual_seed(seed)
    factory: Any = AutoModelForImageTextToText
    model = factory.from_config(multimodal_config(kind, tied=tied, **changes), dtype=torch.bfloat16)
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    if shown:
        transformers_logging.enable_progress_bar()
    tiny_tokenizer().save_pretrained(directory)
    return directory


def rename_tensors(directory: Path, names: dict[str, str]) -> None:
    """Gives a checkpoint's tensors other names: beginnings of those that it has -> of those that it gets."""
    file = directory / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        begins = max((each for each in names if name.startswith(each)), key=len, default="")
        renamed[names.get(begins, "") + name[len(begins) :]] = tensor
    save_file(renamed, file, metadata={"format": "pt"})


def tensor_names(directory: Path) -> list[str]:
    return sorted(load_file(directory / "model.safetensors"))


def as_one_config(directory: Path) -> None:
    """Writes the config as transformers 4 did for Qwen2-VL: the language part's settings lie beside the vision part."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    section = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    path.write_text(json.dumps(text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": section}))


def load(directory: Path, **options: Any) -> BaseModel:
    """The base that a checkpoint is served as, on the CPU, packed beside it."""
    cache = directory.parent / "cache"
    return load_base_model(str(directory), device=CpuDevice(), cache_dir=cache, report=lambda line: None, **options)


def whole_logits(directory: Path, base: BaseModel, tokens: list[int]) -> torch.Tensor:
    """Transformers' own multimodal model, in fp32, given text alone, with the weights that the base has."""
    factory: Any = AutoModelForImageTextToText
    whole = factory.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    decoder = whole.get_decoder()
    decoder = getattr(decoder, "model", decoder)  # Llama 4's has a head
    for path, layer in base.model.named_modules():
        if isinstance(layer, NF4Linear):
            inside = path.removeprefix("model.").removesuffix(".base_layer")
            if not put_expert(decoder, inside, layer.dequantized()):
                decoder.get_submodule(inside).weight.data = layer.dequantized()
    with torch.inference_mode():
        logits: torch.Tensor = whole(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits
