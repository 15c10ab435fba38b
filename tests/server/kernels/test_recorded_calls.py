"""The same bits on every kind of processor: calls recorded here are made again, without Python, by replay/replay.cpp.

On x86 it runs this library on each instruction set, AVX-VNNI included: where the processor lacks it, its instruction is
emulated. For aarch64 the library is compiled by the same setup.py, and runs under QEMU. REQUIRE_ARM=1 makes a missing
cross compiler or emulator a failure and no reason to skip: CI sets it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.lora.ops import Arena, LoraRows
from loramux_adapters.lora.slot_copy import LayerWeights
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.token_rows import OwnLogits, OwnRows, add_token_logits_reference
from loramux_adapters.lora.weights import PlacedPair
from loramux_adapters.training.model.row_layout import PackedRows
from loramux_server.kernels.attention.kv_cache import KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams, AttentionStep, NativeAttend
from loramux_server.kernels.compiled.abi import FUNCTIONS, VectorIsa
from loramux_server.kernels.compiled.adapter_kernels import NativeAddLora, NativeConvertPairs, NativeCopySlot
from loramux_server.kernels.compiled.library import LIBRARY, Compiled, native_library
from loramux_server.kernels.compiled.logit_changes import EDIT, RowChange, bits_of
from loramux_server.kernels.compiled.sampling import Draw, NativeSampling
from loramux_server.kernels.compiled.token_logits import NativeTokenLogits, never
from loramux_server.kernels.decoder.decoder import Decoder as CompiledDecoder
from loramux_server.kernels.layers.experts import ExpertForm
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from loramux_server.kernels.layers.nf4_quantizer import quantize_into
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.layers.routing import CompiledRouting
from loramux_server.kernels.training import CompiledTraining
from support.decoders import Served, random_model
from support.exact_models import Decoder, Linear, at
from support.exact_steps import SHAPES, feed
from support.random_experts import random_experts
from support.recorded_calls import RecordingLibrary

CPU = CpuDevice()
ROOT = Path(__file__).parents[3]
CSRC = ROOT / "server/loramux_server/kernels/compiled/csrc"
REPLAY = Path(__file__).parent / "replay" / "replay.cpp"
ARM = "aarch64-linux-gnu"
# what a recording cannot hold, or has no numbers to compare
NOT_RECORDED = {"loramux_exact_isas", "loramux_run_pieces"}

needs_kernels = pytest.mark.skipif(native_library() is None, reason="there are no compiled kernels")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the processor is no x86")


class Recording(NamedTuple):
    """A file of calls: how many there are, and how many of them name an instruction set."""

    path: Path
    calls: int
    with_isa: int

    @classmethod
    def of(cls, recorder: RecordingLibrary, path: Path) -> Recording:
        recorder.save(path)
        return cls(path, len(recorder.calls), sum(call.takes_isa for call in recorder.calls))

    def check(self, replay: list[str], *isas: VectorIsa) -> dict[VectorIsa, int]:
        """Replays it on these instruction sets, or on all; returns the number of emulated instructions of each."""
        printed = run([*replay, str(self.path), *(str(int(isa)) for isa in isas)])
        lines = re.findall(r"^isa (\d+): (\d+) calls, 0 differ, (\d+) instructions emulated$", printed, re.MULTILINE)
        assert [int(calls) for _, calls, _ in lines] == [self.calls, *[self.with_isa] * (len(lines) - 1)]
        return {VectorIsa(int(isa)): int(emulated) for isa, _, emulated in lines}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Calls of every function, on the portable kernels."""
    recorder = RecordingLibrary()
    record_steps(recorder, list(SHAPES), [19, 1, 9, 4])
    record_products(recorder, [1, 2, 3, 7, 33])
    record_training(recorder, [1, 7, 33], vocabulary=259, lengths=(50, 1, 9))
    record_adapters(recorder)
    record_quantizer(recorder)
    record_sampling(recorder, vocabulary=3000)
    record_token_logits(recorder, vocabulary=300)
    record_routing(recorder)
    record_chunks(recorder)
    record_experts(recorder)
    record_models(recorder, ["Qwen3", "OLMoE", "gpt-oss"])
    assert {call.name for call in recorder.calls} == FUNCTIONS.keys() - NOT_RECORDED, "record the function that is new"
    return Recording.of(recorder, tmp_path_factory.mktemp("recording") / "calls")


def record_token_logits(recorder: RecordingLibrary, vocabulary: int) -> None:
    """Of rows that adapters have of the output head, some of them of tokens beyond the vocabulary."""
    add = NativeTokenLogits(Compiled(recorder, VectorIsa.PORTABLE))
    torch.manual_seed(3)
    x, y, wide = torch.randn(7, 128), torch.randn(7, vocabulary), never(7, 5)
    for tokens in ([1, 7, vocabulary - 1], list(range(vocabulary + 5))):
        own = OwnRows(np.array(tokens, dtype=np.int32), torch.randn(len(tokens), 128).bfloat16())
        at, scales = np.array([0, 1, 3, 4, 6], dtype=np.int32), np.array([1, 0.5, 2, 1, -1], dtype=np.float32)
        expected_y, expected_wide = y.clone(), wide.clone()
        add_token_logits_reference(expected_y, expected_wide, x, OwnLogits(own, at, scales))
        add(y, wide, x, OwnLogits(own, at, scales))
        torch.testing.assert_close(y, expected_y, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(wide, expected_wide, atol=1e-4, rtol=1e-5)
    assert bool((wide[[2, 5]] == -torch.inf).all()) and bool(wide[0, :5].isfinite().all())


def record_routing(recorder: RecordingLibrary) -> None:
    """The weights of experts: of 5 that do not fill a vector, and of 64."""
    routing = CompiledRouting(Compiled(recorder, VectorIsa.PORTABLE))
    for experts in (5, 64):
        scores = torch.randn(7, experts, generator=torch.Generator().manual_seed(4)) * 5
        torch.testing.assert_close(routing.softmax(scores), scores.softmax(-1))


def record_experts(recorder: RecordingLibrary) -> None:
    """Of every form, with adapters beside some of their layers; a row is no number."""
    compiled = Compiled(recorder, VectorIsa.PORTABLE)
    generator = torch.Generator().manual_seed(6)
    for form in (
        ExpertForm(6, 128, 64),
        ExpertForm(6, 64, 128, bias=True, alpha=1.702, limit=3.0, above=1.0),
        ExpertForm(6, 64, 64, gelu=True),
    ):
        experts = random_experts(form, compiled, ranks=16, affine=form.bias)
        for rows in (1, 19):
            weights, index = torch.randn(rows, 6, generator=generator).softmax(-1).topk(2)
            x = torch.randn(rows, form.outer, generator=generator)
            x[7:8, 5] = torch.nan
            experts.set_lora(LoraRows.build([((), rows // 2), ((ScaledSlot(Slot(8, 8), 0.5),), rows - rows // 2)]))
            experts(x, index, weights)


def record_steps(recorder: RecordingLibrary, names: list[str], lengths: list[int]) -> None:
    """Of these kinds of decoders, with sequences of these lengths, some with adapters."""
    for name in names:
        shape = SHAPES[name]
        sequences = [(np.arange(length) * 7 % shape.vocabulary).tolist() for length in lengths]
        feed(Decoder(recorder, shape), VectorIsa.PORTABLE, sequences, chunk=10, threads=2)


def record_products(recorder: RecordingLibrary, counts: list[int]) -> None:
    """Of NF4 layers and of heads, with so many rows; among seven are some with numbers that are none."""
    random = np.random.default_rng(5)
    isa = VectorIsa.PORTABLE
    product = recorder.function("loramux_exact_product")
    for rows in counts:
        inputs, outputs = 64 * (1 + rows % 3), 32 * (1 + rows % 2)
        x = (random.normal(0, 1, (rows, inputs)) * 10.0 ** random.uniform(-3, 3, (rows, 1))).astype(np.float32)
        if rows == 7:
            x[2, 5], x[3], x[4, 70] = np.nan, 1e-38, np.inf
        linear = Linear.random(random, inputs, outputs, 8, bias=False)
        y = np.zeros((rows, outputs), dtype=np.float32)
        product(at(y), at(x), at(linear.codes), at(linear.scales), rows, inputs, outputs, isa, 2)
        codes, scales = torch.from_numpy(linear.codes), torch.from_numpy(linear.scales)
        NF4Linear(codes, scales, None, Compiled(recorder, isa)).squares()
        weight = torch.from_numpy(linear.weight[: outputs - 5].copy()).bfloat16()
        head = torch.nn.Linear(inputs, outputs - 5, bias=False, dtype=torch.bfloat16)
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
        PackedHead.of(head, Compiled(recorder, isa))(torch.from_numpy(x))


def record_training(recorder: RecordingLibrary, counts: list[int], vocabulary: int, lengths: tuple[int, ...]) -> None:
    """Of everything that goes back, with so many rows; among seven are some with numbers that are none."""
    torch.manual_seed(9)
    random = np.random.default_rng(9)
    compiled = Compiled(recorder, VectorIsa.PORTABLE)
    ops = CompiledTraining(compiled)
    for rows in counts:
        weight = Linear.random(random, 128, 160, 8, bias=False)
        linear = NF4Linear(torch.from_numpy(weight.codes), torch.from_numpy(weight.scales), None, compiled)
        dense = torch.nn.Linear(128, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        head = PackedHead.of(dense, compiled)
        x, dy = (torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None] for width in (128, 160))
        logits = torch.zeros(rows, head.padded)
        logits[:, :vocabulary] = torch.randn(rows, vocabulary) * 4
        if rows == 7:
            dy[2, 5], dy[3], dy[4, 150], dy[5] = float("nan"), 1e-38, float("inf"), 0.0
            logits[1, 70], logits[2, 258], logits[3, 0] = float("nan"), float("inf"), -float("inf")
        linear.product_transposed(dy)
        labels = torch.randint(0, vocabulary, (rows,))
        for softcap in (0.0, 3.0):
            for gradient in (False, True):
                given = logits.clone()
                ops.token_losses(given, labels, vocabulary, factor=0.5, softcap=softcap, gradient=gradient)
            head.product_transposed(given)
        ops.norm_gradient(dy, dy.flip(1), torch.randn(160), 1e-5)
        for gelu in (False, True):
            ops.activation(x.view(-1)[: 128 * rows - 3], gelu=gelu)
            ops.activation_gradient(x.view(-1)[: 128 * rows - 3], dy.view(-1)[: 128 * rows - 3], gelu=gelu)
            ops.gated_gradient(dy, dy.flip(0), dy.flip(1), gelu=gelu)
        ops.matmul(x.t(), dy)
        ops.matmul(dy, torch.randn(40, 160).t())
        ops.matmul(x, torch.randn(128, 33), torch.randn(rows, 33))
    rows_of = PackedRows(5, lengths).spans()
    q, k, v, d_out = (torch.randn(5 + sum(lengths), heads, 32) for heads in (4, 2, 2, 4))
    for softcap, window in ((0.0, 0), (1.5, 20)):
        options: dict[str, Any] = {"scaling": 0.3, "softcap": softcap, "window": window}
        out, stats = ops.attend(q, k, v, rows_of, **options)
        ops.attend_gradient(d_out, (q, k, v, out, stats), rows_of, **options)


def record_chunks(recorder: RecordingLibrary) -> None:
    """Of attention over chunks of a text, whose edges lie within and between tiles, in pieces that cross them."""
    attend, cache = (
        NativeAttend(Compiled(recorder, VectorIsa.PORTABLE)),
        KVCache(KVShape(1, 2, 32, torch.int16), 4, CPU),
    )
    random = torch.Generator().manual_seed(6)
    tables, owner = torch.tensor([[2, 0, 3]], dtype=torch.int32), torch.zeros(45, dtype=torch.int32)
    for chunk in (7, 16, 20):
        q, k, v = (torch.randn(45, heads, 32, generator=random) for heads in (4, 2, 2))
        for first in (0, 15, 30):
            rows, place = slice(first, first + 15), torch.arange(first, first + 15, dtype=torch.int32)
            step = AttentionStep(cache, attend, tables, owner[rows], place, ((0, 0, 15, first),))
            attend(q[rows], k[rows], v[rows], 0, step, AttentionParams(0.2, chunk=chunk))


def record_models(recorder: RecordingLibrary, families: list[str]) -> None:
    """Of models as the engine runs them, module by module and by the compiled step, with adapters."""
    adapters = [(), (ScaledSlot(Slot(0, 8)), ScaledSlot(Slot(32, 32), -0.7))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loramux_server.kernels.compiled.library._found", lambda: recorder)
        for family in families:
            served = Served(random_model(family), "native-portable")
            assert served.decoder is not None
            for forward in (served.by_modules, served.decoder.forward):
                served.feed(forward, [[5, 6, 7], [8]], adapters, chunk=2)
            served.feed(partial(first_tokens_of, served.decoder), [[5, 6, 7], [8]], chunk=2)


def first_tokens_of(decoder: CompiledDecoder, *step: Any) -> torch.Tensor:
    return decoder.first_tokens(*step)[0]


def record_quantizer(recorder: RecordingLibrary) -> None:
    """Of a 16-bit weight with a block of zeros; it has more scales than share one of their own."""
    outputs, inputs = 96, 256
    weight = (torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(7)) * 0.05).bfloat16()
    weight[3, 64:128] = 0
    codes = torch.empty(outputs // 16, inputs // 4, 32, dtype=torch.uint8)
    quantize_into(codes, torch.empty(inputs // 64, outputs), weight, Compiled(recorder, VectorIsa.PORTABLE))


def record_sampling(recorder: RecordingLibrary, vocabulary: int) -> None:
    """Of rows with equal logits, with one that is far above the others, and with NaN where only a search looks."""
    sampling = NativeSampling(Compiled(recorder, VectorIsa.PORTABLE))
    logits = torch.randn(4, vocabulary + 5, generator=torch.Generator().manual_seed(8))[:, :vocabulary] * 4
    logits[1] = logits[1].round()
    logits[2, 70] = 90.0
    logits[3, 71] = float("nan")
    sampling.search(logits)
    sampling.log_sums(logits, [2, 0, 1])
    sampling.first_tokens(logits, [1, 0], 20)
    random = np.random.default_rng(9)
    edits = np.zeros(60, dtype=EDIT)
    edits["token"] = random.choice(vocabulary, len(edits), replace=False)
    edits["repeated"] = random.integers(0, 2, len(edits))
    edits["add"], edits["less"] = random.normal(0, 9, (2, len(edits)))
    edits["add"][:3] = 3.4e38, -3.4e38, float("nan")
    forbidden = random.choice(vocabulary, 5).astype(np.int32)
    allowed = bits_of(random.choice(vocabulary, vocabulary // 2).tolist(), vocabulary)
    changes = [RowChange(2, edits, forbidden), RowChange(0, edits[:7], forbidden[:0], allowed, 1.3)]
    sampling.changed(logits, [*changes, RowChange(1, edits, forbidden, np.flip(allowed).copy(), 0.7)])
    kinds: list[dict[str, Any]] = [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"temperature": 0.3}]
    kinds.append({"temperature": 2.5, "top_k": 200, "top_p": 0.7, "min_p": 0.01})
    sampling.draw(
        logits, [Draw(row, uniform, **kind) for row in range(3) for uniform in (0.03, 0.97) for kind in kinds]
    )


def record_adapters(recorder: RecordingLibrary) -> None:
    """An adapter of every kind of numbers, read from a file's bytes and copied to a slot."""
    random = np.random.default_rng(6)
    rank, inputs, outputs = 5, 48, 80
    numbers = random.normal(0, 1, rank * (inputs + outputs)).astype(np.float32)
    content = np.concatenate([numbers.view(np.uint8), numbers.astype(np.float16).view(np.uint8)])
    halves = numbers.nbytes
    pairs = [
        PlacedPair(0, "F32", 4 * rank * inputs, "F32", rank, inputs, outputs),
        PlacedPair(halves, "F16", halves + 2 * rank * inputs, "F16", rank, inputs, outputs),
        PlacedPair(halves, "BF16", halves + 2 * rank * inputs, "F16", rank, inputs, outputs),
    ]
    to = torch.zeros(3 * rank * (inputs + outputs), dtype=torch.bfloat16)
    NativeConvertPairs(recorder)(to, content, pairs, [2.0, 0.5, 1.0])
    arenas = [
        Arena(
            torch.full((32, inputs), 7, dtype=torch.bfloat16),
            torch.full((32, outputs), 7, dtype=torch.bfloat16),
            torch.full((4,), 7, dtype=torch.uint8),
            torch.full((4, 2, outputs), 7.0),
        )
        for _ in range(2)
    ]
    a, bt = to[: rank * inputs].view(rank, inputs), to[rank * inputs : rank * (inputs + outputs)].view(rank, outputs)
    NativeCopySlot(recorder)(Slot(8, 8), [(arenas[0], LayerWeights(a, bt)), (arenas[1], None)])
    affine = torch.from_numpy(random.normal(0, 1, (2, outputs)).astype(np.float32))
    NativeCopySlot(recorder)(Slot(16, 8), [(arenas[0], LayerWeights(a, bt, affine)), (arenas[1], None)])
    rows = LoraRows.build(
        [((), 1), ((ScaledSlot(Slot(16, 8), 0.5), ScaledSlot(Slot(8, 8))), 5), ((ScaledSlot(Slot(16, 8)),), 2)]
    )
    assert rows is not None
    x, y = torch.randn(8, inputs), torch.randn(8, outputs)
    NativeAddLora(Compiled(recorder, VectorIsa.PORTABLE))(y, x, arenas[0], rows)


def replay_of(directory: Path, library: Path, compiler: str) -> Path:
    """The program that makes recorded calls again, linked with this library."""
    program = directory / "replay"
    link = [str(library), f"-Wl,-rpath,{library.parent}"]
    run([compiler, "-O1", "-std=c++17", f"-I{CSRC}", str(REPLAY), *link, "-o", str(program)])
    return program


def run(command: list[str], **environ: str) -> str:
    """What it prints; fails if it does."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}"
    return done.stdout


@needs_kernels
@needs_x86
def test_recorded_calls_give_the_same_bits_on_every_instruction_set_of_x86(
    recording: Recording, tmp_path: Path
) -> None:
    library = native_library()
    assert library is not None
    program = replay_of(tmp_path, LIBRARY, "g++")
    assert tuple(recording.check([str(program)])) == library.isas


@needs_kernels
@needs_x86
def test_avx_vnni_gives_the_same_bits_also_on_a_processor_that_has_to_be_helped(tmp_path: Path) -> None:
    library = native_library()
    assert library is not None
    if VectorIsa.AVX2 not in library.isas:
        pytest.skip("the processor has no AVX2")
    recorder = RecordingLibrary()  # of little: each emulated instruction takes microseconds
    record_steps(recorder, ["Llama", "Gemma 3", "Phi-3"], [2, 1])
    record_products(recorder, [1, 3])
    record_experts(recorder)
    record_training(recorder, [1, 3], vocabulary=67, lengths=(3, 2))
    record_sampling(recorder, vocabulary=300)
    program = replay_of(tmp_path, LIBRARY, "g++")
    emulated = Recording.of(recorder, tmp_path / "calls").check([str(program)], VectorIsa.AVX_VNNI)
    assert VectorIsa.AVX_VNNI in library.isas or emulated[VectorIsa.AVX_VNNI] > 50_000, "its instruction was not used"


@needs_kernels
@needs_x86
def test_a_bit_that_differs_is_found(tmp_path: Path) -> None:
    recorder = RecordingLibrary()
    record_products(recorder, [7])
    call = recorder.calls[-1]
    block, content, float_bytes = call.results[0]
    changed = bytearray(list(recorder.contents)[content])
    changed[-4] ^= 1
    call.results[0] = (block, recorder.contents.setdefault(bytes(changed), len(recorder.contents)), float_bytes)
    recorder.save(tmp_path / "calls")
    program = replay_of(tmp_path, LIBRARY, "g++")
    done = subprocess.run([program, tmp_path / "calls", "0"], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert f"{call.name}, gives other bits in block {block}" in done.stdout
    assert f"first at byte {len(changed) - 4}" in done.stdout


@needs_kernels
def test_the_library_compiled_for_aarch64_gives_the_same_bits(recording: Recording, tmp_path: Path) -> None:
    needed = [f"{ARM}-gcc", f"{ARM}-g++", "qemu-aarch64"]
    if missing := [name for name in needed if shutil.which(name) is None]:
        why = f"{', '.join(missing)} missing: apt-get install g++-{ARM} qemu-user"
        assert os.environ.get("REQUIRE_ARM") != "1", why
        pytest.skip(why)
    build = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        f"{tmp_path}/lib",
        "--build-temp",
        f"{tmp_path}/temp",
    ]
    printed = run(build, CC=f"{ARM}-gcc", CXX=f"{ARM}-g++")
    library = tmp_path / "lib" / "loramux_server" / "kernels" / "compiled" / "_kernels.so"
    assert library.exists(), printed[-4000:]
    program = replay_of(tmp_path, library, f"{ARM}-g++")
    found = recording.check(["qemu-aarch64", "-L", f"/usr/{ARM}", str(program)])
    assert set(found) == {VectorIsa.PORTABLE, VectorIsa.NEON}
