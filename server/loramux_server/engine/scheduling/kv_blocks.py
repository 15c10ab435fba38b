"""Accounting of the KV cache: which blocks are free, which are shared, and which still hold something worth keeping.

Numbers only; the tensors are in kernels/attention/kv_cache.py. A block is in one of three states:

    used    by one sequence, or by several that begin with the same tokens
    kept    by nobody, but its keys and values are known by a `key` and can be taken up again; least recently used first
    free    nothing in it is of use

A key digests everything that keys and values depend on, so what is found by it is what would have been computed.
A token's keys and values depend on all tokens up to it and on the weights: on this base, the versions and scales of the
adapters, in their order. On some bases also on whether the sequence is a long one. Nothing else: which sequences share
a step, how a prompt is cut into chunks, and whether a token came by prefill or by decoding change no bit
(ARCHITECTURE.md). A group is digested with them, so that a proof finds only what it computed itself. So

    key[0] = H(group, long or not, adapters, tokens of block 0),    key[i] = H(key[i - 1], tokens of block i)

and equal keys mean equal content, whoever computed it. A name of an adapter is in no key: a version is.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as ReadOnlyList

from loramux_server.engine.scheduling.sequence import Sequence

_SIZE = 32  # bytes of a key; nobody can make two texts with one key


class KVBlocks:
    """`num_blocks` blocks of `block_size` tokens each. Owner: the engine thread; the sizes never change."""

    def __init__(self, num_blocks: int, block_size: int, *, max_kept: int = 0) -> None:
        """`max_kept`: most blocks that are kept for their content while nobody uses them."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache needs blocks and room in them, got {num_blocks} of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._max_kept = max_kept
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: what was freed last is used first
        self._users = [0] * num_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self.peak = 0  # most that ever held something at a time; being a stack, no other block was ever touched

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    @property
    def used(self) -> int:
        """Blocks that somebody uses now."""
        return self.num_blocks - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        """Blocks that nobody uses, kept for their content."""
        return len(self._kept)

    @property
    def keeps_content(self) -> bool:
        """Whether publishing and looking up make sense."""
        return self._max_kept > 0

    def find(self, keys: ReadOnlyList[bytes]) -> list[int]:
        """The blocks that hold the first of these keys' content, up to the first key that is not there."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, count: int, shared: ReadOnlyList[int] = ()) -> list[int] | None:
        """`count` blocks, those of `shared` first, or None, and nothing taken, if there are not so many.

        `shared` comes from `find`, and no other call in between. The others are the owner's alone.
        """
        own = count - len(shared)
        kept_and_wanted = sum(block in self._kept for block in shared)
        if own > len(self._free) + len(self._kept) - kept_and_wanted:
            return None
        for block in shared:
            self._kept.pop(block, None)
            self._users[block] += 1
        blocks = [self._take() for _ in range(own)]
        self.peak = max(self.peak, self.num_blocks - len(self._free))
        return [*shared, *blocks]

    def publish(self, block: int, key: bytes) -> None:
        """The used block is complete, and its content is known by `key` from now on."""
        assert self._users[block] > 0, f"block {block} is nobody's"
        if self._key_of[block] is None and key not in self._by_key:
            self._key_of[block] = key
            self._by_key[key] = block

    def is_known(self, block: int) -> bool:
        """Whether the block was published and not forgotten since; for tests."""
        return self._key_of[block] is not None

    def free(self, blocks: ReadOnlyList[int], *, soon: bool = False) -> None:
        """Takes back blocks that `allocate` gave, from each owner exactly once.

        `soon`: of those that are kept, these are the first to be given up.
        """
        # The end of a text is of less use to others than its beginning, so it is to be given up before.
        for block in blocks if soon else reversed(blocks):
            assert self._users[block] > 0, f"block {block} is freed twice"
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._kept[block] = None
                    if soon:
                        self._kept.move_to_end(block, last=False)
        while len(self._kept) > self._max_kept:
            self._free.append(self._forget())

    def check_integrity(self) -> None:
        """Asserts that every block is in one state, and that keys and blocks know each other."""
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & kept, "a block is free and kept"
        unused = {block for block, users in enumerate(self._users) if users == 0}
        assert free | kept == unused, "a block is lost, or used and not"
        assert len(kept) <= self._max_kept
        known = {block: key for block, key in enumerate(self._key_of) if key is not None}
        assert {key: block for block, key in known.items()} == self._by_key
        assert kept <= known.keys() and not free & known.keys(), "only known blocks are kept, and they are"

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._forget()
        self._users[block] = 1
        return block

    def _forget(self) -> int:
        """The least recently used of the kept blocks, its content given up."""
        block, _ = self._kept.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        del self._by_key[key]
        self._key_of[block] = None
        return block


def extend_keys(sequence: Sequence, block_size: int, tokens: int) -> None:
    """Makes `sequence.keys` cover the complete blocks among its first `tokens` tokens."""
    keys = sequence.keys
    while (len(keys) + 1) * block_size <= tokens:
        before = keys[-1] if keys else _weights(sequence)
        block = array("q", sequence.tokens_from(len(keys) * block_size, block_size))
        keys.append(hashlib.blake2b(before + block.tobytes(), digest_size=_SIZE).digest())


def _weights(sequence: Sequence) -> bytes:
    """What stands for the weights that the sequence runs on, and for who may find what it computes."""
    uses = "".join(f"{use.version}:{use.scale.hex()};" for use in sequence.adapters)
    length = "long/" if sequence.is_long else ""
    return hashlib.blake2b(f"{sequence.cache_group}/{length}{uses}".encode(), digest_size=_SIZE).digest()
