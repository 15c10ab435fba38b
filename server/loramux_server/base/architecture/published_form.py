"""In which form a checkpoint's weights are published, of its config alone; imports no library."""

from __future__ import annotations

from typing import Any


def is_mxfp4(quantization_config: Any) -> bool:
    """Of a config, transformers' own or a dictionary."""
    its = quantization_config if isinstance(quantization_config, dict) else getattr(quantization_config, "__dict__", {})
    return str(getattr(its.get("quant_method"), "value", its.get("quant_method"))) == "mxfp4"
