"""Keys and values of all running sequences, in blocks of a fixed number of tokens. Owner: the engine thread.

Which block belongs to whom is decided in plain Python (engine/kv_blocks.py); here are only the tensors. Two layouts,
one meaning: `dense` is what library kernels read, `tiled` is what the compiled CPU kernel reads without shuffling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux_adapters.memory import reserve

BLOCK_SIZE = 16  # tokens in a block; the compiled kernel's tile


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token needs in the cache."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * BLOCK_SIZE


class KVCache:
    """One pair of tensors for each layer.

    Attributes:
        k, v: by layer; dense [blocks, BLOCK_SIZE, kv_heads, head_dim], or
            tiled k [blocks, kv_heads, head_dim / 2, BLOCK_SIZE, 2], v [blocks, kv_heads, BLOCK_SIZE / 2, head_dim, 2].
    """

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device, *, tiled: bool) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.tiled = tiled
        heads, dim = shape.kv_heads, shape.head_dim
        if tiled:
            k_size: tuple[int, ...] = (num_blocks, heads, dim // 2, BLOCK_SIZE, 2)
            v_size: tuple[int, ...] = (num_blocks, heads, BLOCK_SIZE // 2, dim, 2)
        else:
            k_size = v_size = (num_blocks, BLOCK_SIZE, heads, dim)
        self.k = [reserve(k_size, shape.dtype, device) for _ in range(shape.layers)]
        self.v = [reserve(v_size, shape.dtype, device) for _ in range(shape.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, whether anything was ever written to them or not."""
        return self.num_blocks * self.shape.block_bytes

    def held_bytes(self, peak_blocks: int) -> int:
        """Bytes that the device really holds, if at most `peak_blocks` blocks were ever used."""
        return peak_blocks * self.shape.block_bytes if self.k and self.k[0].device.type == "cpu" else self.nbytes

    def write(self, layer: int, blocks: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k and v [rows, kv_heads, head_dim] at (block, offset in block) [rows] int64."""
        if not self.tiled:
            self.k[layer][blocks, offsets] = k
            self.v[layer][blocks, offsets] = v
            return
        pairs = k.reshape(k.shape[0], k.shape[1], -1, 2)
        self.k[layer][blocks, :, :, offsets] = pairs
        self.v[layer][blocks, :, offsets // 2, :, offsets % 2] = v

    def read(self, layer: int, blocks: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [count, kv_heads, head_dim] of the first `count` tokens of a sequence in `blocks` [n] int64."""
        k, v = self.k[layer][blocks], self.v[layer][blocks]
        if self.tiled:
            k = k.permute(0, 3, 1, 2, 4).flatten(3)
            v = v.permute(0, 2, 4, 1, 3).flatten(1, 2)
        return k.flatten(0, 1)[:count], v.flatten(0, 1)[:count]
