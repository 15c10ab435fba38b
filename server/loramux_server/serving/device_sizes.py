"""How a device is shared out: the one place where what is not set follows from the device and the base.

    free          what a device has when the base lies there
    workspace     what the largest step works in, taken once (kernels/gpu/step/workspace.py)
    graphs        steps that are captured, at most
    pool          of the rest 90 %, or what --device-memory-mib says: adapters and KV cache; less where the check of the
                  kernels, which is over when graphs are captured, needs more than graphs and the rest
    tokens        what adapters have of their own for tokens: if it is not set, half of what is left, at most 1 GiB
    left          what nobody gets: for libraries, and for what is there for a moment

A CPU's memory is not shared out: what is reserved there is taken as it fills, so its pool is a number of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loramux_adapters.device.defaults import SizeDefaults
from loramux_adapters.lora.lora_linear import affine_bytes, row_bytes
from loramux_adapters.lora.slots import SMALLEST_RANK, bucket_of
from loramux_server.config.sizes import AsksForSizes, nothing_for_the_cache
from loramux_server.engine.build import limits_of
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.start_check import BLOCKS_TO_CHECK
from loramux_server.errors import ConfigError
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVShape
from loramux_server.kernels.decoder.whole_step import StepLimits
from loramux_server.kernels.gpu.step.form import DecoderForm, StepSizes
from loramux_server.kernels.gpu.step.workspace import check_bytes, workspace_bytes

MIB = 2**20
SHORT_CONTEXT = 2048  # tokens; what is shorter serves few
LEAST_REPLY = 1024  # tokens of a chat's reply that names no length, if the context has room for them


@dataclass(frozen=True, slots=True)
class BaseSizes:
    """What of a base its server's sizes follow from.

    Attributes:
        linears: module path -> (in_features, out_features) of every layer that adapters can change.
        kv: what a token takes in the cache.
        context: most tokens that the base was built for.
        form: of a whole step; None where its modules run one by one.
        vectors: slots have room for gain and shift, which is reserved with them.
    """

    linears: Mapping[str, tuple[int, int]]
    kv: KVShape
    context: int
    form: DecoderForm | None
    vectors: bool = False

    @property
    def row_bytes(self) -> int:
        """Of one rank row over all layers."""
        beside = affine_bytes(sum(outputs for _, outputs in self.linears.values())) if self.vectors else 0
        return row_bytes(dict(self.linears)) + beside // SMALLEST_RANK

    def workspace(self, limits: StepLimits) -> int:
        """Bytes that the largest step works in: exact for a whole step, else an estimate."""
        if self.form is None:
            return self._of_modules(limits)
        sizes = StepSizes(
            rows=limits.rows,
            samples=limits.samples,
            sequences=limits.sequences,
            blocks=limits.blocks,
            entries=limits.adapters,
            ranks=limits.ranks,
            programs=1,
        )
        return workspace_bytes(self.form, sizes)

    def check(self) -> int:
        """Bytes that the check of the kernels works in before graphs are captured: an estimate, on the safe side."""
        return 0 if self.form is None else check_bytes(self.form)

    def _of_modules(self, limits: StepLimits) -> int:
        """Of libraries' operations: a layer's inputs and outputs with copies in fp32, its unpacked weight, a sequence's
        keys and values gathered in fp32, and logits with two copies in fp32.
        """
        inputs, outputs = (max(shape[side] for shape in self.linears.values()) for side in (0, 1))
        vocabulary = outputs
        layers = [shape for shape in self.linears.values() if shape[1] != vocabulary] or [*self.linears.values()]
        widest = max(shape[1] for shape in layers)
        weight = max(2 * shape[0] * shape[1] for shape in layers)
        gathered = 2 * limits.blocks * BLOCK_SIZE * self.kv.kv_heads * self.kv.head_dim * 4
        return limits.rows * 3 * (inputs + widest) * 4 + weight + gathered + limits.samples * vocabulary * 10


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a device on which a base lies and nothing else of the server does.

    Attributes:
        total, free: bytes.
        defaults: of its kind of device.
    """

    total: int
    free: int
    defaults: SizeDefaults


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a server takes.

    Attributes:
        scheduler: sequences and tokens of a step, and what one request may ask for.
        context: longest prompt and reply together, in tokens.
        reply: longest reply of a chat that names no length.
        arena_rows: rank rows of the adapters' memory.
        max_rank: of one adapter.
        num_blocks, kept_blocks: of the KV cache, and of these most that are kept for their content.
        workspace, graphs, arena, cache: bytes.
        tokens: bytes for what adapters have of their own for tokens.
        left: bytes of the device that nobody gets; 0 where memory is taken as it fills.
    """

    scheduler: SchedulerConfig
    context: int
    reply: int
    arena_rows: int
    max_rank: int
    num_blocks: int
    kept_blocks: int
    workspace: int
    graphs: int
    arena: int
    cache: int
    tokens: int
    left: int


def sizes_of(asked: AsksForSizes, base: BaseSizes, room: Room, *, reply: int | None = None, **scheduler: Any) -> Sizes:
    """Shares out a device.

    Args:
        reply: --default-max-tokens.
        scheduler: further fields of SchedulerConfig.
    Raises:
        ConfigError: it does not fit; with what to lower.
    """
    wanted = min(asked.max_model_len or room.defaults.context or base.context, base.context)
    sizes = _or_none(lambda: _shared_out(asked, base, room, wanted, reply, scheduler))
    if (sizes is None or sizes.context < SHORT_CONTEXT) and wanted > SHORT_CONTEXT:
        wanted, sizes = SHORT_CONTEXT, None  # with smaller tables there may be room
    if sizes is None:
        sizes = _shared_out(asked, base, room, wanted, reply, scheduler)
    while sizes.context < wanted:
        wanted, before = sizes.context, sizes
        sizes = _shared_out(asked, base, room, wanted, reply, scheduler)
        assert sizes.num_blocks >= before.num_blocks, "a shorter context needs smaller tables"
    return sizes


def _or_none(share_out: Callable[[], Sizes]) -> Sizes | None:
    try:
        return share_out()
    except ConfigError:
        return None


def needed_bytes(asked: AsksForSizes, base: BaseSizes, room: Room, context: int) -> int:
    """Bytes that must be free on a card, beside the base, so that `sizes_of` gives a request of this length a place."""
    config = _scheduler(asked, room.defaults, {})
    work, graphs = base.workspace(limits_of(config, -(-context // BLOCK_SIZE))), _graphs(asked, room)
    work += _tokens_set(asked)
    cache = (max(BLOCKS_TO_CHECK, -(-context // BLOCK_SIZE)) + 1) * base.kv.block_bytes
    smallest = SMALLEST_RANK * base.row_bytes
    arena = None if asked.adapter_memory_mib is None else asked.adapter_memory_mib * MIB
    pool = max(-(-4 * cache // 3), 4 * smallest) if arena is None else cache + max(arena, smallest)
    if asked.device_memory_mib is not None:
        return work + graphs + max(pool, asked.device_memory_mib * MIB)
    return work + max(graphs + int(pool / room.defaults.share), base.check() + pool) + 1


def _shared_out(
    asked: AsksForSizes, base: BaseSizes, room: Room, context: int, reply: int | None, scheduler: dict[str, Any]
) -> Sizes:
    """As `sizes_of`, for this context or as much of it as the cache holds."""
    config = _scheduler(asked, room.defaults, scheduler)
    on_host = room.defaults.memory is not None
    workspace = 0 if on_host else base.workspace(limits_of(config, -(-context // BLOCK_SIZE)))
    graphs = _graphs(asked, room)
    pool = _pool(asked, room, workspace + (0 if on_host else _tokens_set(asked)), graphs, base.check())
    arena = pool // 4 if asked.adapter_memory_mib is None else asked.adapter_memory_mib * MIB
    if arena >= pool:
        raise ConfigError(
            nothing_for_the_cache(pool // MIB, arena // MIB)
            if on_host or asked.device_memory_mib is not None
            else f"--adapter-memory-mib {arena // MIB} leaves nothing for the KV cache: adapters and cache get "
            f"{pool // MIB:,} MiB of {room.total // MIB:,} MiB; lower it"
        )
    rows = arena // base.row_bytes // SMALLEST_RANK * SMALLEST_RANK
    if rows == 0:
        raise ConfigError(
            f"--adapter-memory-mib {arena // MIB} holds no adapter: rank {SMALLEST_RANK} on every layer of this base "
            f"takes {base.row_bytes * SMALLEST_RANK / MIB:.1f} MiB; raise it, or --device-memory-mib"
        )
    spare = 0 if on_host else 1  # a block that no sequence has, for rows that a graph computes in vain
    blocks = (pool - arena) // base.kv.block_bytes - spare
    if blocks < BLOCKS_TO_CHECK:
        raise ConfigError(
            f"the {(pool - arena) // MIB:,} MiB that adapters leave of {pool // MIB:,} MiB hold {max(0, blocks)} KV "
            f"blocks of {BLOCK_SIZE} tokens, and at least {BLOCKS_TO_CHECK} are needed: raise --device-memory-mib or "
            "lower --adapter-memory-mib" + ("" if on_host else ", --max-batch-tokens or --max-num-seqs")
        )
    context = min(context, blocks * BLOCK_SIZE)
    kept = room.defaults.kept if asked.prefix_cache_mib is None else asked.prefix_cache_mib * MIB
    left = 0 if on_host else room.free - workspace - graphs - pool
    tokens = room.defaults.tokens if on_host else min(room.defaults.tokens, left // 2)
    if asked.token_memory_mib is not None:
        tokens = asked.token_memory_mib * MIB
    return Sizes(
        # 2: a slot of 8 rows counts as 16
        scheduler=config if room.defaults.ranks or asked.max_summed_rank else replace(config, max_ranks=2 * rows),
        context=context,
        reply=_reply(reply, room.defaults, context, blocks),
        arena_rows=rows,
        max_rank=min(asked.max_lora_rank, 1 << (rows.bit_length() - 1)),
        num_blocks=blocks,
        kept_blocks=blocks if kept is None else min(blocks, kept // base.kv.block_bytes),
        workspace=workspace,
        graphs=graphs,
        arena=rows * base.row_bytes,
        cache=blocks * base.kv.block_bytes,
        tokens=tokens,
        left=0 if on_host else left - tokens,
    )


def _scheduler(asked: AsksForSizes, defaults: SizeDefaults, others: dict[str, Any]) -> SchedulerConfig:
    """What is set, and what goes with it: each running sequence adds a token to a step."""
    tokens, sequences = asked.max_batch_tokens, asked.max_num_seqs
    if sequences is None:
        sequences = defaults.sequences if tokens is None else min(defaults.sequences, tokens)
    if tokens is None:
        tokens = max(defaults.step_tokens, sequences)
    ranks = _summed_rank(asked, defaults)
    config = SchedulerConfig(max_num_seqs=sequences, max_batch_tokens=tokens, **others)
    return config if ranks is None else replace(config, max_ranks=ranks)


def _summed_rank(asked: AsksForSizes, defaults: SizeDefaults) -> int | None:
    """Most ranks of one request's adapters together; None: only the adapters' memory bounds them.

    A step's tables and the scratch between the two LoRA launches are made for so many: 8 bytes for each of them, token
    row of a step and layer that reads the same rows (3 at most).
    """
    largest = max(2 * SMALLEST_RANK, bucket_of(asked.max_lora_rank))
    if asked.max_summed_rank is not None:
        if asked.max_summed_rank < largest:
            raise ConfigError(
                f"--max-summed-rank {asked.max_summed_rank} is less than one adapter of --max-lora-rank "
                f"{asked.max_lora_rank} takes ({largest}); raise the one or lower the other"
            )
        return -(-asked.max_summed_rank // (2 * SMALLEST_RANK)) * 2 * SMALLEST_RANK
    return None if defaults.ranks is None else max(defaults.ranks, largest)


def _graphs(asked: AsksForSizes, room: Room) -> int:
    if asked.graph_memory_mib is not None:
        return asked.graph_memory_mib * MIB
    return min(room.defaults.graphs, room.total // room.defaults.graphs_part)


def _tokens_set(asked: AsksForSizes) -> int:
    """Bytes that nobody else gets; where nothing is said, what is left has room for some."""
    return 0 if asked.token_memory_mib is None else asked.token_memory_mib * MIB


def _pool(asked: AsksForSizes, room: Room, workspace: int, graphs: int, check: int) -> int:
    """Bytes of adapters and KV cache together."""
    given = None if asked.device_memory_mib is None else asked.device_memory_mib * MIB
    if room.defaults.memory is not None:
        return room.defaults.memory if given is None else given
    left = room.free - workspace - graphs
    shares = (
        f"of {room.total // MIB:,} MiB the base leaves {room.free // MIB:,} MiB, of which a step works in "
        f"{workspace // MIB:,} MiB (lower --max-batch-tokens or --max-num-seqs) and its graphs get {graphs // MIB:,} "
        "MiB (lower --graph-memory-mib)"
    )
    beside_check = room.free - workspace - check
    if min(left, beside_check) <= 0:
        raise ConfigError(f"there is no room for adapters and the KV cache: {shares}")
    if given is not None and given > left:
        raise ConfigError(
            f"there is no room for --device-memory-mib {given // MIB}: lower it to {left // MIB} at most; {shares}"
        )
    return min(int(left * room.defaults.share), beside_check) if given is None else given


def _reply(given: int | None, defaults: SizeDefaults, context: int, blocks: int) -> int:
    """A sequence starts when there is room for its whole length, so one that names none must not ask for it all."""
    if given is not None:
        return min(given, context)
    if defaults.requests is None:
        return context
    return min(context, max(LEAST_REPLY, blocks * BLOCK_SIZE // defaults.requests))
