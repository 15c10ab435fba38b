"""PEFT adapters -> llama.cpp's GGUF; run by the llama environment's Python, which has the libraries for it.

    python to_gguf.py HEADS KV_HEADS OUT.gguf ADAPTER_DIR

Tensors are stored in 16 bit. llama.cpp keeps the rows of Llama's query and key projections in another order
(heads, 2, half) -> (heads, half, 2), and so those of their B.
"""

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")


def permuted(b: np.ndarray, heads: int) -> np.ndarray:
    """[out, rank] with the rows in llama.cpp's order."""
    return b.reshape(heads, 2, b.shape[0] // heads // 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def main() -> None:
    heads, kv_heads, out, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    config = json.loads((directory / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        found = TENSOR.fullmatch(name)
        if found is None:
            sys.exit(f"{name}: no weight of a layer that is known here")
        layer, module, part = found.groups()
        if part == "B" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = permuted(tensor, heads if module.endswith("q_proj") else kv_heads)
        writer.add_tensor(f"blk.{layer}.{NAMES[module]}.weight.lora_{part.lower()}", tensor.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
