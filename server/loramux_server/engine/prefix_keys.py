"""Names for the keys and values of a block: everything that they depend on, digested.

A token's keys and values depend on all tokens up to it and on the weights: on this base, the versions and scales of the
adapters, in their order. Nothing else: which sequences share a step, how a prompt is cut into chunks, and whether a
token came by prefill or by decoding change no bit (ARCHITECTURE.md). A group is digested with them, so that a proof
finds only what it computed itself. So

    key[0] = H(group, adapters, tokens of block 0),    key[i] = H(key[i - 1], tokens of block i)

and equal keys mean equal content, whoever computed it. A name of an adapter is in no key: a version is.
"""

from __future__ import annotations

import hashlib
from array import array

from loramux_server.engine.sequence import Sequence

_SIZE = 32  # bytes; nobody can make two texts with one key


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
    return hashlib.blake2b(f"{sequence.cache_group}/{uses}".encode(), digest_size=_SIZE).digest()
