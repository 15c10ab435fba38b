"""How much fits where: rows of adapter memory, KV blocks. Raises ConfigError for too little."""

from __future__ import annotations

from loramux_adapters.lora.lora_linear import row_bytes
from loramux_adapters.lora.slots import SMALLEST_RANK
from loramux_server.base.loader import BaseModel
from loramux_server.config.serve import ServeConfig
from loramux_server.errors import ConfigError
from loramux_server.kernels.kv_cache import BLOCK_SIZE, KVShape
from loramux_server.serving.summary import MIB


def arena_rows(config: ServeConfig, base: BaseModel) -> int:
    """Rank rows that fit into the memory given to adapters, a multiple of the smallest slot."""
    row = row_bytes(dict(base.linears))
    rows = config.arena_mib * MIB // row // SMALLEST_RANK * SMALLEST_RANK
    if rows == 0:
        raise ConfigError(
            f"--adapter-memory-mib {config.arena_mib} holds no adapter: rank {SMALLEST_RANK} on every layer "
            f"of this base takes {row * SMALLEST_RANK / MIB:.1f} MiB"
        )
    return rows


def num_blocks(config: ServeConfig, shape: KVShape) -> int:
    """KV blocks that fit into the memory given to the cache."""
    blocks = config.kv_cache_mib * MIB // shape.block_bytes
    if blocks == 0:
        raise ConfigError(
            f"the {config.kv_cache_mib} MiB that adapters leave of --device-memory-mib hold not even "
            f"{BLOCK_SIZE} tokens of this base"
        )
    return blocks


def kept_blocks(config: ServeConfig, shape: KVShape) -> int:
    """KV blocks that may be kept for their content while no sequence uses them."""
    return config.prefix_cache_mib * MIB // shape.block_bytes
