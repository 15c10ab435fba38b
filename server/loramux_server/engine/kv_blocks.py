"""Accounting of the KV cache: which blocks are free. Numbers only; the tensors are in kv_cache.py."""

from __future__ import annotations

from collections.abc import Iterable


class KVBlocks:
    """`num_blocks` blocks of `block_size` tokens each. Owner: the engine thread; the two sizes never change."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache needs blocks and room in them, got {num_blocks} of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: what was freed last is used first
        self._is_free = [True] * num_blocks
        self.peak = 0  # most that were ever used at a time; being a stack, no other block was ever touched

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    @property
    def used(self) -> int:
        """Blocks that are allocated now."""
        return self.num_blocks - len(self._free)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` block indices for one owner, or None, and nothing taken, if fewer are free."""
        if not self.can_allocate(count):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = False
        self.peak = max(self.peak, self.used)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Takes back blocks that `allocate` gave, each exactly once."""
        for block in blocks:
            assert not self._is_free[block], f"block {block} is freed twice"
            self._is_free[block] = True
            self._free.append(block)

    def check_integrity(self) -> None:
        """Asserts that every block is either free once or used."""
        assert len(self._free) == len(set(self._free)) == sum(self._is_free)
        assert all(self._is_free[block] for block in self._free)
