"""What a server takes on a kind of device where its settings say nothing."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True)
class SizeDefaults:
    """The sizes of a server whose settings say nothing (the server's config/sizes.py has the settings).

    Attributes:
        sequences, step_tokens: most of one step.
        context: longest prompt and reply together; None: what the base was built for.
        memory: bytes for adapters and KV cache together; None: `share` of what is left when all else has its memory.
        share: of 1.
        kept: bytes of the KV cache that stay for prompts that begin alike; None: as many as nobody uses.
        ranks: of the adapters of one request together; None: what the memory of adapters holds.
        requests: so many chats that name no length of their reply have room at a time; None: a reply may be as long as
            the context.
        graphs: bytes for captured steps, at most ...
        graphs_part: ... and no more than such a part of the device.
        tokens: bytes for what adapters have of their own for tokens, where there is room.
    """

    sequences: int
    step_tokens: int
    context: int | None
    memory: int | None
    share: float
    kept: int | None
    ranks: int | None
    requests: int | None
    graphs: int
    graphs_part: int
    tokens: int


# A CPU's step takes time by its tokens, and its memory is for other programs too.
HOST_SIZES = SizeDefaults(
    sequences=32,
    step_tokens=128,
    context=2048,
    memory=2048 * MIB,
    share=1.0,
    kept=256 * MIB,
    ranks=None,
    requests=None,
    graphs=0,
    graphs_part=1,
    tokens=1024 * MIB,
)
# A graph of a whole step of an 8B model takes some 24 MiB (vLLM's issue 50780 and pull request 22897 have figures).
CARD_SIZES = SizeDefaults(
    sequences=256,
    step_tokens=2048,
    context=None,
    memory=None,
    share=0.9,
    kept=None,
    ranks=512,
    requests=16,
    graphs=2048 * MIB,
    graphs_part=32,
    tokens=1024 * MIB,
)
