"""A plan of a server is what the server takes, on a device of that size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.ops import add_lora_segments
from loramux_adapters.lora.slot_copy import copy_slot
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.config.sizes import AsksForSizes
from loramux_server.engine.build import limits_of
from loramux_server.errors import ConfigError
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams, probe_kv_shape
from loramux_server.kernels.decoder.description import describe
from loramux_server.kernels.gpu.step.form import DecoderForm, StepSizes
from loramux_server.serving.cards import KEPT_BY_THE_DRIVER, LIBRARIES, Card, card_of, cards_of
from loramux_server.serving.device_sizes import MIB, BaseSizes, Room, Sizes, sizes_of
from loramux_server.serving.planned_base import PlannedBase, planned_base
from loramux_server.serving.serve_plan import ServePlan, Wanted, plan_on
from support import triton_interpreter
from support.shapes import LLAMA_8B
from support.tiny_models import save_tiny_model

GIB = 2**30


class Asked(AsksForSizes):
    table = "asked"


def skeleton_of(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def llama() -> PlannedBase:
    return planned_base(skeleton_of(AutoConfig.for_model("llama", **LLAMA_8B)))


def planned(llama: PlannedBase, card: str, adapters: int | None = None, rank: int = 16, **settings: Any) -> ServePlan:
    return plan_on(card_of(card), Wanted(llama, Asked(**settings), adapters, rank))


def test_an_8b_base_is_counted_by_its_shape(llama: PlannedBase) -> None:
    layer = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    assert llama.nf4 == 32 * layer * 9 // 16  # half a byte, and 4 bytes for each 64
    assert llama.head == 2 * 2 * 128256 * 4096
    assert llama.parameters == 32 * layer + 2 * 128256 * 4096 + 65 * 4096
    assert llama.sizes.row_bytes == 2 * (32 * (2 * 8192 + 2 * 5120 + 3 * 18432) + 4096 + 128256)
    assert llama.sizes.kv.token_bytes == 131072 and llama.sizes.form is not None


@pytest.mark.parametrize("card", ["16GiB", "24GiB", "80GiB", "RTX 4090", "T4", "H100"])
def test_fifty_adapters_of_rank_16_lie_beside_an_8b_base(llama: PlannedBase, card: str) -> None:
    plan = planned(llama, card, adapters=50)
    assert plan.sizes is not None and not plan.change
    taken = plan.sizes.workspace + plan.sizes.graphs + plan.sizes.arena + plan.sizes.cache + plan.sizes.left
    assert taken + llama.nbytes + LIBRARIES <= plan.card.total
    assert plan.sizes.arena_rows >= 50 * 16


def test_on_8_gib_fewer_adapters_fit_and_the_plan_says_how_many(llama: PlannedBase) -> None:
    plan = planned(llama, "8GiB", adapters=50)
    assert plan.sizes is None and plan.short > GIB
    flags, _, told = plan.change.partition("; ")
    assert told.endswith("; the others wait in host memory with --host-cache-mib 4202")
    words = flags.split()
    given = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    count = int(told.split()[0])
    assert given.pop("--adapter-memory-mib") == -(-count * 16 * llama.sizes.row_bytes // MIB)  # the server's own flag
    settings = {name.removeprefix("--").replace("-", "_"): value for name, value in given.items()}
    assert 0 < count < 50
    assert planned(llama, "8GiB", adapters=count, **settings).sizes is not None
    assert planned(llama, "8GiB", adapters=count + 1, **settings).sizes is None
    assert "8 adapters at a time leave a KV cache for one request of 2,048 tokens" in told
    assert planned(llama, "8GiB").sizes is not None, "without a wish for adapters, there are as many as fit"


def test_what_is_missing_is_what_a_card_would_have_to_have_more(llama: PlannedBase) -> None:
    for settings in ({"max_model_len": 65536}, {"adapter_memory_mib": 9000}, {"device_memory_mib": 12000}):
        asked = Wanted(llama, Asked(**settings), None, 16)
        card = Card("small", 10 * GIB)
        plan = plan_on(card, asked)
        assert plan.sizes is None and plan.change
        graphs = plan.short // 30  # a larger card has more memory for graphs as well
        assert plan_on(Card("enough", card.total + plan.short + graphs + 8 * MIB), asked).sizes is not None
        assert plan_on(Card("too small", card.total + plan.short - 64 * MIB), asked).sizes is None


@pytest.mark.parametrize(
    ("card", "settings", "change"),
    [
        ("7.6GiB", {}, "--max-batch-tokens 512 --max-num-seqs 64"),
        ("16GiB", {"max_model_len": 131072}, "--context "),
        ("24GiB", {"device_memory_mib": 30000}, "leave --device-memory-mib out"),
        ("8GiB", {"adapter_memory_mib": 5000}, "leave --adapter-memory-mib out, --max-batch-tokens 128"),
        ("5GiB", {}, "a card of "),
    ],
)
def test_it_says_what_makes_it_fit(llama: PlannedBase, card: str, settings: dict[str, Any], change: str) -> None:
    plan = planned(llama, card, **settings)
    assert plan.sizes is None and change in plan.change


def test_steps_become_smaller_only_where_that_gives_many_more_adapters(llama: PlannedBase) -> None:
    flags, count, _ = planned(llama, "24GiB", adapters=2000).change.split("; ")
    assert flags.split()[0] == "--adapter-memory-mib" and 160 <= int(count.split()[0]) < 180
    change = planned(llama, "8GiB", adapters=50, adapter_memory_mib=5000).change
    assert "--max-batch-tokens 128" in change and "--adapter-memory-mib 673; 8 adapters" in change


def test_a_shorter_context_is_told_before_smaller_steps(llama: PlannedBase) -> None:
    plan = planned(llama, "16GiB", max_model_len=131072)
    flag, length = plan.change.split()
    assert flag == "--context" and 40_000 < int(length) < 131072
    assert planned(llama, "16GiB", max_model_len=int(length)).sizes is not None


def test_memory_that_cannot_hold_the_adapters_is_no_matter_of_the_card(llama: PlannedBase) -> None:
    with pytest.raises(ConfigError, match=r"--adapter-memory-mib 2000 holds 23 adapters of rank 16, and the 50 of"):
        planned(llama, "24GiB", adapters=50, adapter_memory_mib=2000)
    assert planned(llama, "24GiB", adapters=23, adapter_memory_mib=2000).sizes is not None


def test_a_card_that_would_be_large_enough_is(llama: PlannedBase) -> None:
    change = planned(llama, "5GiB").change
    gib = float(change.split()[3])
    flags = change.partition(" with ")[2].partition(",")[0].split()
    settings = {
        name.removeprefix("--").replace("-", "_"): int(value)
        for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    assert planned(llama, f"{gib + 0.1:.1f}GiB", **settings).sizes is not None
    assert planned(llama, f"{gib - 0.1:.1f}GiB", **settings).sizes is None


def test_a_card_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="--card 0GiB: no card that is sold has so little memory"):
        card_of("0GiB")


def test_cards_have_names_and_sizes() -> None:
    assert card_of("24GiB").total == card_of("24 gb").total == int(24 * GIB * (1 - KEPT_BY_THE_DRIVER))
    assert card_of("rtx4090") == card_of("NVIDIA GeForce RTX 4090") == card_of("RTX 4090")
    assert card_of("24576MiB").total == card_of("24GiB").total
    assert [card.name for card in cards_of("8GiB, T4")] == ["8 GiB", "T4"]
    for text in ("H100", "A100 80GB", "H200", "L4"):
        assert card_of(text).total > card_of("T4").total
    with pytest.raises(ConfigError, match=r"--card knows no 'RTX 4091'; did you mean RTX 4090"):
        card_of("RTX 4091")
    for text, meant in (("4090", "RTX 4090"), ("A100", "A100 40GB or A100 80GB"), ("24", "24GiB")):
        with pytest.raises(ConfigError, match=rf"--card knows no '{text}'; did you mean {meant}\?"):
            card_of(text)
    with pytest.raises(ConfigError, match="names no card"):
        cards_of(" , ")


# What a server really takes.


def takes(base: BaseModel, shape: KVShape, sizes: Sizes) -> list[Any]:
    """All that a server of these sizes takes on its device, as engine/build.py takes it, without running a step."""
    from loramux_server.kernels.gpu.step.decoder import GpuDecoder
    from loramux_server.kernels.gpu.step.nf4_linear import kinds_of

    device = base.device
    assert base.weights is not None
    slots = AdapterSlots(
        base.model,
        sizes.arena_rows,
        add_lora_segments,
        copy_slot,
        head=head_path(base.model),
        device=device,
        affine=base.weights.vectors,
    )
    cache = KVCache(shape, sizes.num_blocks, device, spare=True)
    asked = [AttentionParams(scaling=1.0) for _ in range(shape.layers)]
    description = describe(base.model, shape, asked, kinds_of(device.activations))
    limits = limits_of(sizes.scheduler, -(-sizes.context // BLOCK_SIZE), sizes.graphs)
    largest = StepSizes(
        rows=limits.rows,
        samples=limits.samples,
        sequences=limits.sequences,
        blocks=limits.blocks,
        entries=limits.adapters,
        ranks=limits.ranks,
        programs=4,
    )
    decoder = GpuDecoder(device, description, cache, largest, spare_block=cache.spare_block)
    return [slots, cache, decoder]


@pytest.mark.skipif(not triton_interpreter.INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("vectors", [False, True], ids=["as it is", "with room for vectors"])
def test_a_server_takes_what_was_planned_and_never_more_than_there_is(tmp_path: Path, vectors: bool) -> None:
    triton_interpreter.prepare()
    from support.emulated import EmulatedDevice

    directory = save_tiny_model(tmp_path / "base", num_hidden_layers=1)
    for mib in (64, 192):  # loading passes through a piece of 32
        device = EmulatedDevice(total=mib * MIB, kernels="triton")
        asked = Asked(max_num_seqs=8, max_batch_tokens=64, graph_memory_mib=0, max_lora_rank=32, max_summed_rank=64)
        base = load_base_model(
            str(directory),
            device=device,
            cache_dir=tmp_path / "cache",
            report=lambda line: None,
            vectors=vectors,
        )
        with device.used():
            shape = probe_kv_shape(base.model, device, whole_numbers=False)
            before = device.memory()
            form = DecoderForm.of_skeleton(base.model)
            of_base = BaseSizes(base.linears, shape, base.context_length, form, vectors=vectors)
            sizes = sizes_of(asked, of_base, Room(before.total, before.free, device.sizes))
            taken = takes(base, shape, sizes)
            memory = device.memory()
            del taken
        named = sizes.workspace + sizes.arena + sizes.cache + base_block(sizes)
        marks = len(base.linears) * sizes.arena_rows // 8  # which layers an adapter changes, a byte each
        assert memory.held - before.held == pytest.approx(named + marks, abs=16 * 1024)
        assert memory.peak <= memory.total

        # The plan knows the config alone. What lies on the device before is the base, and what its start left there.
        plan = planned_base(skeleton_of(base.config), vectors=vectors)
        assert plan.nbytes == pytest.approx(before.held, rel=0.01)
        of_config = sizes_of(asked, plan.sizes, Room(before.total, before.free, device.sizes))
        assert of_config == sizes


def base_block(sizes: Sizes) -> int:
    """The one block of the cache that no sequence has."""
    return sizes.cache // sizes.num_blocks
