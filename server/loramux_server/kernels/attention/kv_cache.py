"""Keys and values of all running sequences, in blocks of a fixed number of tokens. Owner: the engine thread.

Which block belongs to whom is decided in plain Python (engine/scheduling/kv_blocks.py); here are only the tensors. What
they hold follows from the dtype: floats lie dense, as library kernels read them; whole numbers (int16) lie in tiles as
the compiled CPU kernel reads them without shuffling, with one fp32 scale for each head of a token's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux_adapters.device.device import Device

BLOCK_SIZE = 16  # tokens in a block; the compiled kernel's tile
_KEY_TOP, _VALUE_TOP = 4095.0, 16383.0  # the largest whole number of a head of keys, of values (csrc/exact/attention.h)
_SMALLEST = 1e-30  # a head whose largest number is below counts as zeros


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token needs in the cache. `dtype` is what it is kept in."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def whole_numbers(self) -> bool:
        return not self.dtype.is_floating_point

    @property
    def token_bytes(self) -> int:
        scales = torch.float32.itemsize if self.whole_numbers else 0
        return 2 * self.layers * self.kv_heads * (self.head_dim * self.dtype.itemsize + scales)

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * BLOCK_SIZE


class KVCache:
    """One pair of tensors for each layer, and where they hold whole numbers their scales.

    Attributes:
        k, v: by layer; floats [blocks, BLOCK_SIZE, kv_heads, head_dim], or whole numbers in tiles,
            k [blocks, kv_heads, head_dim / 2, BLOCK_SIZE, 2], v [blocks, kv_heads, BLOCK_SIZE / 2, head_dim, 2].
        num_blocks: that sequences can have.
        spare_block: the one behind them, for what is written and never read; None where there is none.
        scales: by layer [blocks, kv_heads, 2, BLOCK_SIZE] fp32, of the keys and of the values; empty for floats.
    """

    def __init__(self, shape: KVShape, num_blocks: int, device: Device, *, spare: bool = False) -> None:
        """`spare`: with one block more, which no sequence gets. Raises DeviceFull: there is no room for it."""
        self.device = device
        self.shape = shape
        self.num_blocks = num_blocks
        self.spare_block = num_blocks if spare else None
        num_blocks += spare
        heads, dim = shape.kv_heads, shape.head_dim
        if shape.whole_numbers:
            k_size: tuple[int, ...] = (num_blocks, heads, dim // 2, BLOCK_SIZE, 2)
            v_size: tuple[int, ...] = (num_blocks, heads, BLOCK_SIZE // 2, dim, 2)
        else:
            k_size = v_size = (num_blocks, BLOCK_SIZE, heads, dim)
        layers = range(shape.layers)
        self.k = [device.reserve(k_size, shape.dtype) for _ in layers]
        self.v = [device.reserve(v_size, shape.dtype) for _ in layers]
        self.scales = [
            device.reserve((num_blocks, heads, 2, BLOCK_SIZE), torch.float32) for _ in layers if shape.whole_numbers
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, whether anything was ever written to them or not."""
        return (self.num_blocks + (self.spare_block is not None)) * self.shape.block_bytes

    def held_bytes(self, peak_blocks: int) -> int:
        """Bytes that the device really holds, if at most `peak_blocks` blocks were ever used."""
        return self.device.held_of(self.nbytes, peak_blocks * self.shape.block_bytes)

    def write(self, layer: int, blocks: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k and v [rows, kv_heads, head_dim] at (block, offset in block) [rows] int64."""
        if not self.shape.whole_numbers:
            self.k[layer][blocks, offsets] = k
            self.v[layer][blocks, offsets] = v
            return
        for part, (x, top) in enumerate(((k, _KEY_TOP), (v, _VALUE_TOP))):
            numbers, scales = _rounded(x, top)
            self.scales[layer][blocks, :, part, offsets] = scales
            if part == 0:
                self.k[layer][blocks, :, :, offsets] = numbers.reshape(*numbers.shape[:2], -1, 2)
            else:
                self.v[layer][blocks, :, offsets // 2, :, offsets % 2] = numbers

    def read(self, layer: int, blocks: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [count, kv_heads, head_dim] of the first `count` tokens of a sequence in `blocks` [n] int64."""
        k, v = self.k[layer][blocks], self.v[layer][blocks]
        if self.shape.whole_numbers:
            scales = self.scales[layer][blocks].permute(2, 0, 3, 1)[..., None]  # [2, blocks, BLOCK_SIZE, kv_heads, 1]
            k = k.permute(0, 3, 1, 2, 4).flatten(3) * scales[0]
            v = v.permute(0, 2, 4, 1, 3).flatten(1, 2) * scales[1]
        return k.flatten(0, 1)[:count], v.flatten(0, 1)[:count]


def _rounded(x: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, heads, dim] -> (int16 of this shape, fp32 scales [rows, heads]), as csrc/exact/product.h rounds a block.

    A head with a NaN or an infinity gets zeros and a scale of NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    finite = x.isfinite().all(-1)
    usable = finite & (largest >= _SMALLEST)
    factor = torch.where(usable, top / largest, 0.0)
    numbers = torch.where(usable[..., None], x * factor[..., None], 0.0).round().to(torch.int16)
    scales = torch.where(usable, largest / top, torch.where(finite, 0.0, torch.nan))
    return numbers, scales
