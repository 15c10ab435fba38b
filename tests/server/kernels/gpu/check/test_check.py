"""The check at start: right kernels stay, each wrong one is found and replaced, and answers are right all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loramux_adapters.errors import DeviceFull
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, LoraRows, add_lora_segments
from loramux_adapters.lora.slot_copy import copy_slot
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import AttentionStep, attend_reference, probe_kv_shape
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.decoder.description import describe
from loramux_server.kernels.decoder.trial import Trial
from loramux_server.kernels.gpu.check.bench import UNTOUCHED
from loramux_server.kernels.gpu.check.check import check_operations
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from loramux_server.kernels.gpu.step.form import DecoderForm
from loramux_server.kernels.gpu.step.nf4_linear import kinds_of, pack
from loramux_server.kernels.gpu.step.operations import NAMES, PLAIN, TRITON, Operations
from loramux_server.kernels.gpu.step.tables import StepSizes
from loramux_server.kernels.gpu.step.workspace import check_bytes
from loramux_server.kernels.layers.recognition import recognize
from loramux_server.kernels.layers.rotary import use_angles
from support.decoders import random_model, slow_twin
from support.emulated import EmulatedDevice
from support.gpu_steps import AtOnce, TinySteps
from support.stepping import relative_difference

LENGTHS = (20, 3, 1)
ADAPTERS = [(ScaledSlot(Slot(0, 8)), ScaledSlot(Slot(32, 32), -0.7)), (ScaledSlot(Slot(0, 8)),), ()]
WIDTH = -(-max(LENGTHS) // BLOCK_SIZE)


DEVICE = AtOnce()


class Served:
    """A random model with adapters in its slots, that has much of what there is: biases, a window, soft caps, norms.

    Attributes:
        expected: logits of all tokens of all sequences by transformers in fp32.
    """

    def __init__(self) -> None:
        model = random_model("Gemma 2", num_hidden_layers=2, attention_bias=True)
        twin = slow_twin(model)
        with torch.no_grad():
            logits = [twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences()]
        self.expected = torch.cat(logits)
        library = native_library()
        assert library is not None
        pack(model, DEVICE)
        recognize(model, DEVICE)
        use_angles(model, library)
        shape = probe_kv_shape(model, DEVICE, whole_numbers=False)
        slots = AdapterSlots(model, 64, add_lora_segments, copy_slot, head=head_path(model), device=DEVICE, affine=True)
        generator = torch.Generator().manual_seed(2)
        for layer in slots.layers.values():
            for weights in (layer.arena.a, layer.arena.bt):
                weights.copy_(torch.randn(weights.shape, generator=generator) * 0.1)
            assert layer.arena.affine is not None
            layer.arena.affine.copy_(torch.randn(layer.arena.affine.shape, generator=generator) * 0.1)
            layer.arena.targeted.fill_(HAS_DELTA)
            layer.arena.targeted[0] |= HAS_AFFINE
        with torch.inference_mode():
            asked = Trial(attend_reference, model, KVCache(shape, 8, DEVICE)).asked
        self.arenas = [layer.arena for layer in slots.layers.values()]
        self.cache = KVCache(shape, len(LENGTHS) * WIDTH, DEVICE)
        sizes = StepSizes(rows=64, samples=64, sequences=3, blocks=WIDTH, entries=2, ranks=64, programs=3)
        self.decoder = GpuDecoder(
            DEVICE, describe(model, shape, asked, kinds_of(DEVICE.activations)), self.cache, sizes
        )

    def logits(self, operations: Operations, adapters: list[Any] | None = None) -> torch.Tensor:
        """Of all tokens of the sequences: the longest in two chunks, the second one beside the others."""
        self.decoder.operations = operations
        tables = torch.arange(len(LENGTHS) * WIDTH, dtype=torch.int32).view(-1, WIDTH).flip(0).contiguous()
        found, none = {}, torch.zeros(0, dtype=torch.int32)
        for chunks in ([(0, 0, 13)], [(0, 13, 7), (1, 0, 3), (2, 0, 1)]):
            runs: list[tuple[int, int, int, int]] = []
            tokens: list[int] = []
            for sequence, position, count in chunks:
                runs.append((sequence, len(tokens), count, position))
                tokens += sequences()[sequence][position : position + count]
            step = AttentionStep(self.cache, attend_reference, tables, none, none, tuple(runs))
            lora = None
            if adapters:
                lora = LoraRows.build([(adapters[sequence], count) for sequence, _, count in chunks])
            logits = self.decoder.forward(tokens, list(range(len(tokens))), step, lora, lora).clone()
            for (sequence, position, _), part in zip(chunks, logits.split([c for *_, c in chunks]), strict=True):
                found[sequence, position] = part
        return torch.cat([found[key] for key in sorted(found)])


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(333, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def served() -> Served:
    return Served()


def test_right_kernels_stay_and_nothing_of_the_step_is_touched(served: Served) -> None:
    of = served.decoder
    touched = [*served.cache.k, *served.cache.v, *(tensor for arena in served.arenas for tensor in (arena.a, arena.bt))]
    touched += [of.tables.attention.tensor, of.tables.lora.tensor, of.logits]
    before = [tensor.clone() for tensor in touched]
    told: list[str] = []
    of.operations = TRITON

    checked = check_operations(DEVICE, of, progress=told.append)

    assert checked.lines == ()
    assert checked.operations == TRITON and checked.same_bits
    assert {line.split()[1].rstrip(":") for line in told} == set(NAMES)
    assert all(torch.equal(one, other) for one, other in zip(touched, before, strict=True))


def test_plain_operations_pass_the_check_and_give_the_same_logits(served: Served) -> None:
    served.decoder.operations = PLAIN

    assert check_operations(DEVICE, served.decoder).operations == PLAIN
    assert relative_difference(served.logits(PLAIN), served.expected) < 0.01
    by_kernels, plain = (served.logits(operations, ADAPTERS) for operations in (TRITON, PLAIN))
    assert relative_difference(plain, served.expected) > 0.01, "adapters change replies"
    assert relative_difference(plain, by_kernels) < 0.002


def raising(launch: Any, *args: Any, **options: Any) -> None:
    raise RuntimeError("\nptxas fatal: out of registers\nand more")


def silent(launch: Any, *args: Any, **options: Any) -> None:
    """A kernel that does not write its results."""


def unscaled_embed(launch: Any, x: Any, tokens: Any, embedding: Any, factor: float) -> None:
    PLAIN.embed(launch, x, tokens, embedding, 1.0)


def without_epsilon(launch: Any, n: Any, x: Any, part: Any, *, norm: Any, after: Any, factor: float) -> None:
    PLAIN.add_norm(launch, n, x, part, norm=norm and replace(norm, eps=0.0), after=after, factor=factor)


def without_bias(launch: Any, y: Any, x: Any, w: Any, scratch: Any, *, bias: Any = None, row_tiles: Any) -> None:
    PLAIN.nf4_product(launch, y, x, w, scratch, row_tiles=row_tiles)


def swapped_halves(launch: Any, y: Any, x: Any, w: Any, scratch: Any, **options: Any) -> None:
    PLAIN.nf4_product(launch, y, x, replace(w, codes=w.codes >> 4 | w.codes << 4), scratch, **options)


def scales_of_the_next_block(launch: Any, y: Any, x: Any, w: Any, scratch: Any, **options: Any) -> None:
    PLAIN.nf4_product(launch, y, x, replace(w, scales=w.scales.roll(1, 0)), scratch, **options)


def nan_in_the_last_row(launch: Any, y: Any, x: Any, w: Any, scratch: Any, **options: Any) -> None:
    PLAIN.nf4_product(launch, y, x, w, scratch, **options)
    y[-1, -1] = torch.nan


def without_the_last_input(launch: Any, y: Any, x: Any, weight: Any, scratch: Any, **options: Any) -> None:
    x = x.clone()
    x[:, -1] = 0
    PLAIN.dense_product(launch, y, x, weight, scratch, **options)


def without_factors(launch: Any, y: Any, x: Any, targets: Any, tables: Any, scratch: Any) -> None:
    tables.entries.view(-1, 4)[:, 2] = torch.ones(1).view(torch.int32)
    PLAIN.add_lora(launch, y, x, targets, tables, scratch)


def without_targets(launch: Any, y: Any, x: Any, targets: Any, tables: Any, scratch: Any) -> None:
    targets = [replace(one, arena=replace(one.arena, targeted=torch.ones_like(one.arena.targeted))) for one in targets]
    PLAIN.add_lora(launch, y, x, targets, tables, scratch)


def of_arenas(**changes: Callable[[Any], Any]) -> Callable[..., None]:
    """Adapters that have something else in their slots."""

    def add_lora(launch: Any, y: Any, x: Any, targets: Any, tables: Any, scratch: Any) -> None:
        changed = [
            replace(
                one, arena=replace(one.arena, **{name: of(getattr(one.arena, name)) for name, of in changes.items()})
            )
            for one in targets
        ]
        PLAIN.add_lora(launch, y, x, changed, tables, scratch)

    return add_lora


def after_the_deltas(launch: Any, y: Any, x: Any, targets: Any, tables: Any, scratch: Any) -> None:
    """Gain takes of y what it is with the deltas."""
    of_arenas(targeted=lambda has: has & HAS_DELTA)(launch, y, x, targets, tables, scratch)
    of_arenas(targeted=lambda has: has & HAS_AFFINE)(launch, y, x, targets, tables, scratch)


def turned_back(launch: Any, q: Any, qkv: Any, cos: Any, sin: Any, *others: Any, **norms: Any) -> None:
    PLAIN.rotate_and_write(launch, q, qkv, cos, -sin, *others, **norms)


def one_position_on(launch: Any, q: Any, qkv: Any, cos: Any, sin: Any, *others: Any, **norms: Any) -> None:
    PLAIN.rotate_and_write(launch, q, qkv, cos.roll(-1, 0), sin.roll(-1, 0), *others, **norms)


def writes_beside(
    launch: Any, q: Any, qkv: Any, cos: Any, sin: Any, k: Any, v: Any, *others: Any, **norms: Any
) -> None:
    PLAIN.rotate_and_write(launch, q, qkv, cos, sin, k, v, *others, **norms)
    v[v == UNTOUCHED] = 0


def other_attention(**changes: Callable[[Any], Any]) -> Callable[..., None]:
    def attend(
        launch: Any, out: Any, q: Any, k: Any, v: Any, tables: Any, params: Any, scratch: Any, **of: Any
    ) -> None:
        changed = replace(params, **{name: change(getattr(params, name)) for name, change in changes.items()})
        PLAIN.attend(launch, out, q, k, v, tables, changed, scratch, **of)

    return attend


def sees_the_next_key(launch: Any, out: Any, q: Any, k: Any, v: Any, tables: Any, *others: Any, **of: Any) -> None:
    later = SimpleNamespace(**vars(tables))
    later.positions = tables.positions + 1
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    PLAIN.attend(launch, out, q, k, v, later, *others, **of)


def the_row_before(launch: Any, to: Any, x: Any, rows: Any) -> None:
    PLAIN.gather_rows(launch, to, x, (rows - 1).clamp(min=0))


def the_other_activation(launch: Any, out: Any, gate_up: Any, *, gelu: bool) -> None:
    PLAIN.gate(launch, out, gate_up, gelu=not gelu)


def without_a_cap(launch: Any, logits: Any, *, divisor: float, softcap: float) -> None:
    PLAIN.finish_logits(launch, logits, divisor=divisor)


def always_greedy(launch: Any, tables: Any, logits: Any, asks: int) -> None:
    tables.asks.view(torch.float32)[:, 4] = 0
    PLAIN.sample(launch, tables, logits, asks)


def by_the_row_beside(launch: Any, y: Any, *others: Any, **options: Any) -> None:
    """Right within rounding, and not the same in company."""
    PLAIN.dense_product(launch, y, *others, **options)
    y *= 1 + 2.0**-15 * (len(y) > 20)


def of_the_base_too(launch: Any, x: Any, at: Any, known: Any, *others: Any) -> None:
    PLAIN.own_embeddings(launch, x, at, known.clamp(min=1), *others)


def unscaled_rows(launch: Any, logits: Any, wide: Any, products: Any, tokens: Any, at: Any, factors: Any) -> None:
    PLAIN.own_logits(launch, logits, wide, products, tokens, at, factors * 0 + 1)


def without_further_tokens(
    launch: Any, logits: Any, wide: Any, products: Any, tokens: Any, at: Any, factors: Any
) -> None:
    PLAIN.own_logits(launch, logits, wide.clone(), products, tokens, at, factors)


WRONG: list[tuple[str, Callable[..., None], str]] = [
    *((name, raising, "RuntimeError: ptxas fatal: out of registers") for name in NAMES),
    *((name, silent, "differ") for name in ("nf4_product", "attend")),
    ("rotate_and_write", silent, "not finite"),
    ("embed", unscaled_embed, "differ"),
    ("own_embeddings", of_the_base_too, "differ"),
    ("own_logits", unscaled_rows, "differ"),
    ("own_logits", without_further_tokens, "differ"),
    ("add_norm", without_epsilon, "differ"),
    ("nf4_product", without_bias, "differ"),
    ("nf4_product", swapped_halves, "differ"),
    ("nf4_product", scales_of_the_next_block, "differ"),
    ("nf4_product", nan_in_the_last_row, "not finite"),
    ("dense_product", without_the_last_input, "differ"),
    ("add_lora", without_factors, "differ"),
    ("add_lora", without_targets, "differ"),
    ("add_lora", of_arenas(targeted=lambda has: has & HAS_DELTA), "differ"),  # no gain, no shift
    ("add_lora", of_arenas(targeted=lambda has: has | HAS_DELTA * (has != 0)), "differ"),
    ("add_lora", of_arenas(affine=lambda affine: affine.roll(1, 0)), "differ"),
    ("add_lora", of_arenas(affine=lambda affine: affine.flip(1)), "differ"),
    ("add_lora", after_the_deltas, "differ"),
    ("rotate_and_write", turned_back, "differ"),
    ("rotate_and_write", one_position_on, "differ"),
    ("rotate_and_write", writes_beside, "writes where it must not"),
    ("attend", other_attention(window=lambda window: window and window + 1), "differ"),
    ("attend", other_attention(scaling=lambda scaling: scaling * 1.05), "differ"),
    ("attend", other_attention(softcap=lambda cap: 0.0), "differ"),
    ("attend", sees_the_next_key, "differ"),
    ("gather_rows", the_row_before, "differ"),
    ("gate", the_other_activation, "differ"),
    ("finish_logits", without_a_cap, "differ"),
    ("sample", always_greedy, "differ"),
]


@pytest.mark.parametrize(("name", "wrong", "why"), WRONG)
def test_a_wrong_kernel_is_found_and_replaced(served: Served, name: str, wrong: Callable[..., None], why: str) -> None:
    served.decoder.operations = replace(TRITON, **{name: wrong})

    checked = check_operations(DEVICE, served.decoder, only=[name])

    assert checked.operations == TRITON.with_plain(name)
    assert checked.lines[0].startswith(f"{name} runs on PyTorch's operations: ") and why in checked.lines[0]
    assert len(checked.lines) == 1 + (name in ("add_lora", "attend")) == 1 + (not checked.operations.captures)


def test_sinks_and_chunks_are_tried_where_a_layer_has_some(served: Served) -> None:
    layer, told = served.decoder.description.layers[1], []
    asked, sinks = layer.asked, torch.zeros(served.decoder.description.heads, dtype=torch.bfloat16)
    wrong = (
        other_attention(sinks=lambda sinks: None),
        other_attention(sinks=lambda sinks: sinks if sinks is None else sinks - 1),
        other_attention(chunk=lambda chunk: 0),
        other_attention(chunk=lambda chunk: chunk and chunk + 1),
    )
    layer.asked = replace(asked, window=0, chunk=16, sinks=sinks)
    try:
        for attend in (TRITON.attend, PLAIN.attend, *wrong):
            served.decoder.operations = replace(TRITON, attend=attend)
            told.append(check_operations(DEVICE, served.decoder, only=["attend"]))
    finally:
        layer.asked = asked
    assert [checked.operations.attend for checked in told] == [TRITON.attend, *[PLAIN.attend] * (1 + len(wrong))]
    assert told[0].lines == () and len(told[1].lines) == 1
    assert all("differs" in checked.lines[0] for checked in told[2:])
    assert all("chunks of 16, with sinks" in checked.lines[0] for checked in told[2:])


def test_replies_are_right_though_kernels_were_wrong(served: Served) -> None:
    wrong = {"nf4_product": swapped_halves, "attend": sees_the_next_key, "add_norm": raising, "gate": silent}
    served.decoder.operations = replace(TRITON, **wrong)

    checked = check_operations(DEVICE, served.decoder, only=list(wrong))

    assert checked.operations != TRITON
    assert relative_difference(served.logits(checked.operations), served.expected) < 0.01


def test_a_kernel_that_rounds_by_its_company_stays_and_is_named(served: Served) -> None:
    served.decoder.operations = replace(PLAIN, dense_product=by_the_row_beside)

    checked = check_operations(DEVICE, served.decoder, only=["dense_product"])

    assert checked.operations == served.decoder.operations and not checked.same_bits
    assert "may differ alone and in company" in checked.lines[0]


def test_a_device_that_is_lost_is_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(DEVICE, "synchronize", lost)
    served.decoder.operations = replace(PLAIN, embed=raising)

    checked = check_operations(DEVICE, served.decoder)

    assert "the device answers nothing after embed" in checked.lines[1] and len(checked.lines) <= 3


@pytest.mark.parametrize("early", [0.0, 0.5])
def test_it_waits_for_what_it_compares_on_a_device_whose_work_runs_late(early: float) -> None:
    device = EmulatedDevice(early=early)
    steps = TinySteps(device)

    checked = check_operations(device, steps.decoder, only=["rotate_and_write", "attend", "gather_rows", "sample"])
    assert checked.lines == () and checked.operations == TRITON
    steps.decoder.operations = PLAIN
    assert check_operations(device, steps.decoder).lines[:-1] == ()


@pytest.mark.parametrize("affine", [False, True], ids=["as it is", "with gain and shift"])
def test_what_the_check_works_in_is_known_beforehand(affine: bool) -> None:
    device = EmulatedDevice()
    decoder = TinySteps(device, vocabulary=4000, affine=affine).decoder
    held = device.memory().held
    device.restart_peak()
    assert check_operations(device, decoder).lines == ()
    took = device.memory().peak - held
    assert 0.2 * check_bytes(form_of(decoder)) < took < check_bytes(form_of(decoder))


def test_a_check_without_room_says_so_and_replaces_nothing() -> None:
    device = EmulatedDevice()
    decoder = TinySteps(device).decoder
    device.refuses = range(device.allocations + 5, device.allocations + 500)
    with pytest.raises(DeviceFull, match="there is no room on emulated to try"):
        check_operations(device, decoder)


def form_of(decoder: GpuDecoder) -> DecoderForm:
    return DecoderForm.of(decoder.description)
