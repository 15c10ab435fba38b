"""How a device is shared out: never more than there is, every number can be set, and what does not fit is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.defaults import CARD_SIZES, HOST_SIZES
from loramux_server.config.sizes import AsksForSizes
from loramux_server.engine.build import limits_of
from loramux_server.errors import ConfigError
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVShape
from loramux_server.kernels.gpu.step.form import DecoderForm, Product
from loramux_server.serving.device_sizes import LEAST_REPLY, MIB, BaseSizes, Room, Sizes, sizes_of
from support.shapes import llama_linears

GIB = 2**30
LINEARS = llama_linears(32, 4096, 1024, 14336, 128256)  # a Llama of 8B
FORM = DecoderForm(
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    products=(Product(4096, 6144, 3), Product(4096, 4096, 1), Product(4096, 28672, 2), Product(14336, 4096, 1)),
    widest=28672,
    inner=14336,
    head=Product(4096, 128256, 1),
    pairs=64,
    angle_tables=1,
)
BASE = BaseSizes(LINEARS, KVShape(32, 8, 128), 131072, FORM)
SMALL = 5 * GIB + GIB // 2  # of an 8B base, roughly


class Asked(AsksForSizes):
    table = "asked"


def card(gib: float, **settings: Any) -> tuple[Room, Sizes]:
    room = Room(int(gib * GIB), int(gib * GIB) - SMALL, CARD_SIZES)
    return room, sizes_of(Asked(**settings), BASE, room)


def taken(sizes: Sizes) -> int:
    return sizes.workspace + sizes.graphs + sizes.arena + sizes.cache


def test_a_cpu_takes_what_it_always_took() -> None:
    sizes = sizes_of(Asked(), BASE, Room(16 * GIB, GIB, HOST_SIZES))
    scheduler = sizes.scheduler
    assert (scheduler.max_num_seqs, scheduler.max_batch_tokens) == (32, 128)
    assert (sizes.context, sizes.reply, sizes.workspace, sizes.graphs, sizes.left) == (2048, 2048, 0, 0, 0)
    assert sizes.num_blocks == 1536 * MIB // BASE.kv.block_bytes
    assert sizes.kept_blocks == 256 * MIB // BASE.kv.block_bytes
    assert sizes.arena_rows == 512 * MIB // BASE.row_bytes // 8 * 8
    assert scheduler.max_ranks >= 2 * sizes.arena_rows, "only the memory of adapters bounds them"
    assert CpuDevice().sizes is HOST_SIZES


def test_room_for_gain_and_shift_is_counted_where_it_is_reserved() -> None:
    """8 bytes an output for each 8 rank rows of a layer: a quarter more, and no adapter's memory less."""
    roomy = replace(BASE, vectors=True)
    assert roomy.row_bytes - BASE.row_bytes == sum(outputs for _, outputs in LINEARS.values())
    assert 1.2 < roomy.row_bytes / BASE.row_bytes < 1.3
    room = Room(24 * GIB, 24 * GIB - SMALL, CARD_SIZES)
    plain, larger = (sizes_of(Asked(), base, room) for base in (BASE, roomy))
    assert larger.arena_rows == plain.arena // roomy.row_bytes // 8 * 8
    assert (larger.workspace, larger.cache) == (plain.workspace, plain.cache)


@pytest.mark.parametrize("gib", [7, 8, 12, 16, 24, 48, 80, 141])
def test_a_card_is_never_given_away_twice(gib: int) -> None:
    room, sizes = card(gib)
    assert 0 < taken(sizes) <= room.free
    tenth = 0.1 * (room.free - sizes.workspace - sizes.graphs)
    assert sizes.left + sizes.tokens == pytest.approx(max(tenth, BASE.check() - sizes.graphs), rel=0.01)
    assert room.free - sizes.workspace - sizes.arena - sizes.cache >= BASE.check(), "which is over before the graphs"
    assert (sizes.scheduler.max_num_seqs, sizes.scheduler.max_batch_tokens) == (256, 2048)
    most = min(131072, sizes.num_blocks * BLOCK_SIZE)
    assert 0.8 * most <= sizes.context <= most
    assert sizes.kept_blocks == sizes.num_blocks
    assert sizes.arena / (sizes.arena + sizes.cache) == pytest.approx(0.25, abs=0.05)  # in windows of 8 ranks
    assert sizes.graphs == min(2 * GIB, room.total // 32)
    limits = limits_of(sizes.scheduler, -(-sizes.context // BLOCK_SIZE))
    assert sizes.workspace == BASE.workspace(limits), "the context that there is room for has its own tables"


def test_a_larger_card_holds_more() -> None:
    found = [card(gib)[1] for gib in (8, 16, 24, 80)]
    for less, more in zip(found, found[1:], strict=False):
        assert more.num_blocks > less.num_blocks and more.arena_rows > less.arena_rows
        assert more.context >= less.context and more.reply >= less.reply


def test_chats_that_name_no_length_run_together() -> None:
    _, sizes = card(24)
    assert sizes.num_blocks * BLOCK_SIZE // sizes.reply >= 16 and sizes.reply > LEAST_REPLY
    assert card(7)[1].reply == min(LEAST_REPLY, card(7)[1].context)
    room = Room(24 * GIB, 18 * GIB, CARD_SIZES)
    assert sizes_of(Asked(), BASE, room, reply=77).reply == 77
    assert sizes_of(Asked(max_model_len=50), BASE, room, reply=77).reply == 50


def test_every_number_can_be_set() -> None:
    room, sizes = card(
        24,
        max_model_len=4096,
        max_num_seqs=16,
        max_batch_tokens=512,
        device_memory_mib=4096,
        graph_memory_mib=100,
        prefix_cache_mib=64,
        adapter_memory_mib=1024,
        max_lora_rank=32,
        max_summed_rank=100,
        token_memory_mib=300,
    )
    scheduler = sizes.scheduler
    assert (scheduler.max_num_seqs, scheduler.max_batch_tokens, scheduler.max_ranks) == (16, 512, 112)
    assert (sizes.context, sizes.graphs, sizes.max_rank) == (4096, 100 * MIB, 32)
    assert sizes.arena_rows == 1024 * MIB // BASE.row_bytes // 8 * 8
    assert sizes.num_blocks == 3072 * MIB // BASE.kv.block_bytes - 1
    assert sizes.kept_blocks == 64 * MIB // BASE.kv.block_bytes
    assert sizes.tokens == 300 * MIB
    assert sizes.left == room.free - sizes.workspace - sizes.graphs - 4096 * MIB - sizes.tokens
    assert card(24)[1].workspace > sizes.workspace


def test_tokens_and_sequences_of_a_step_follow_each_other() -> None:
    few, many = card(24, max_batch_tokens=64)[1].scheduler, card(24, max_num_seqs=3000)[1].scheduler
    assert (few.max_num_seqs, few.max_batch_tokens) == (64, 64)
    assert (many.max_num_seqs, many.max_batch_tokens) == (3000, 3000)


def test_the_largest_adapter_always_fits_into_a_request() -> None:
    assert card(80)[1].scheduler.max_ranks == 512
    assert card(80, max_lora_rank=1000)[1].scheduler.max_ranks == 1024
    with pytest.raises(ConfigError, match=r"--max-summed-rank 64 is less than one adapter of --max-lora-rank 256"):
        card(80, max_summed_rank=64)


@pytest.mark.parametrize(
    ("gib", "settings", "said"),
    [
        (5.5, {}, "no room for adapters and the KV cache: of 5,632 MiB the base leaves 0 MiB"),
        (
            6,
            {},
            r"lower --max-batch-tokens or --max-num-seqs\) and its graphs get 192 MiB \(lower --graph-memory-mib\)",
        ),
        (24, {"device_memory_mib": 19000}, r"no room for --device-memory-mib 19000: lower it to \d+ at most"),
        (24, {"adapter_memory_mib": 19000}, "--adapter-memory-mib 19000 leaves nothing for the KV cache: adapters and"),
        (
            24,
            {"adapter_memory_mib": 4},
            r"--adapter-memory-mib 4 holds no adapter: rank 8 on every layer .* 4\d\.\d MiB",
        ),
        (24, {"device_memory_mib": 500, "adapter_memory_mib": 490}, "hold 4 KV blocks of 16 tokens, and at least 10"),
    ],
)
def test_what_does_not_fit_is_said_with_what_to_lower(gib: float, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        card(gib, **settings)


def test_on_a_cpu_adapters_must_leave_something_too() -> None:
    with pytest.raises(ConfigError, match="--device-memory-mib 2048 leaves nothing for the KV cache: --adapter-memory"):
        sizes_of(Asked(adapter_memory_mib=2048), BASE, Room(GIB, GIB, HOST_SIZES))


def test_a_base_whose_modules_run_one_by_one_is_given_an_estimate() -> None:
    by_modules = replace(BASE, form=None)
    limits = limits_of(card(24)[1].scheduler, 1024)
    assert 0.5 < by_modules.workspace(limits) / BASE.workspace(limits) < 4


def test_the_workspace_of_a_step_bounds_what_it_is_made_for() -> None:
    limits = limits_of(card(24)[1].scheduler, 1024)
    for name in ("rows", "samples", "sequences", "blocks", "ranks"):
        more = replace(limits, **{name: 2 * getattr(limits, name)})
        assert BASE.workspace(more) > BASE.workspace(limits), name


def test_a_card_keeps_half_of_what_is_left_for_tokens_of_adapters_and_a_gibibyte_at_most() -> None:
    small, large = card(12)[1], card(141)[1]
    assert 0 < small.tokens <= small.left + 1 and large.tokens == 1024 * MIB < large.left
    without, more = card(24, token_memory_mib=0)[1], card(24, token_memory_mib=2048)[1]
    assert without.tokens == 0 and more.tokens == 2048 * MIB
    assert more.cache < without.cache and more.left <= without.left
