"""A base in 16 bits as transformers' own loader reads it, whatever its checkpoint calls its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from loramux_adapters.device.device import Device
from loramux_server.base.architecture.language_part import LanguagePart
from loramux_server.base.architecture.published_form import is_mxfp4
from loramux_server.errors import BaseModelError


def read_model(directory: Path, device: Device, part: LanguagePart | None, **options: Any) -> Any:
    """The model; weights on the CPU may lie in the mapped checkpoint.

    Args:
        part: of the checkpoint, that alone is read; None: all of it.
        options: further ones of transformers' from_pretrained.
    Raises:
        BaseModelError: it does not fit into memory, or cannot be read, or is not complete.
    """
    if is_mxfp4(AutoConfig.from_pretrained(directory, local_files_only=True).to_dict().get("quantization_config")):
        untyped_mx: Any = Mxfp4Config
        options["quantization_config"] = untyped_mx(dequantize=True)
    if part is not None:
        own = copy.deepcopy(part.config)
        own.model_type = part.converted_as or own.model_type
        options |= {"config": own, "key_mapping": part.key_mapping()}
    try:
        untyped: Any = AutoModelForCausalLM
        model, found = untyped.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            device_map={"": str(device.place)},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise BaseModelError(f"the base does not fit into the memory of {device}; use a smaller base") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(f"the base cannot be loaded: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise BaseModelError(f"the base's checkpoint holds no {missing[0]}")
    if part is not None:
        model.config.model_type = part.config.model_type
    return model.eval()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
