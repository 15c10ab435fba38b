"""A base is packed once: the same bytes on every processor, read again to the last bit, or not used."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base import packed, packed_file
from loramux_server.base.checkpoint import ModelWeights
from loramux_server.base.loader import BaseModel, load_base_model, resident_bytes
from loramux_server.base.packed import Packing
from loramux_server.base.packed_file import HostTensors, Tensors, Unusable
from loramux_server.base.quantized import state_digest
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.nf4_layout import CompiledLayout
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from loramux_server.kernels.layers.packed_embedding import PackedEmbedding, tied_embedding
from loramux_server.kernels.layers.packed_head import PackedHead
from support.real_server import clean_environment
from support.tiny_models import ARCHITECTURES, save_tiny_model, tiny_config

CPU = CpuDevice()
LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels")
QUANTIZING, READING = "loading and quantizing the base to NF4", "reading the base as it was packed before"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


def load(checkpoint: Path, cache: Path, kernels: str = "native") -> tuple[BaseModel, list[str]]:
    """The base with nothing patched between its layers, and what was said meanwhile."""
    said: list[str] = []
    base = load_base_model(
        str(checkpoint),
        device=CPU,
        cache_dir=cache,
        report=said.append,
        training=True,
        kernels=choose_kernels(CPU, kernels),
    )
    return base, said


def layout() -> CompiledLayout:
    assert LIBRARY is not None
    return CompiledLayout(LIBRARY.best)


def packed_tensors(model: nn.Module) -> Tensors:
    return packed.packed(model, ModelWeights(model), Packing(layout(), CPU), lambda line: None)


def kept_in(cache: Path) -> Path:
    (file,) = (cache / "packed").iterdir()
    return file


def logits(base: BaseModel) -> torch.Tensor:
    """Of a few tokens, with everything between the layers in fp32."""
    model = base.model
    for module in model.modules():
        if not isinstance(module, (NF4Linear, PackedHead, PackedEmbedding)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    found: torch.Tensor = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_base_that_is_read_again_is_the_same_to_the_last_bit(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    (first, said_first), (second, said_second) = (load(directory, tmp_path / "cache") for _ in range(2))
    assert said_first[0] == QUANTIZING
    assert len(said_second) == 1 and said_second[0].startswith(READING)
    assert state_digest(first.model) == state_digest(second.model) and first.base_id == second.base_id
    assert first.linears == second.linears and first.floats.keys() == second.floats.keys()
    assert first.bytes_16bit == second.bytes_16bit
    assert not [each for each in (*second.model.parameters(), *second.model.buffers()) if each.is_meta]
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_packed_base_is_the_one_that_transformers_and_bitsandbytes_load(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    ours, its = (load(directory, tmp_path / "cache", kernels)[0] for kernels in ("native", "tensor"))
    assert ours.linears == its.linears and ours.bytes_16bit == its.bytes_16bit
    assert ours.floats.keys() == its.floats.keys() - ours.packed.keys()
    assert all(ours.packed[name] == tuple(its.floats[name].shape) for name in ours.packed)
    assert all(torch.equal(ours.floats[name], its.floats[name]) for name in ours.floats)
    buffers = {name: each for name, each in its.model.named_buffers() if name in dict(ours.model.named_buffers())}
    assert buffers and all(torch.equal(each, ours.model.get_buffer(name)) for name, each in buffers.items())
    assert ours.model.generation_config.to_dict() == its.model.generation_config.to_dict()
    assert ours.config._attn_implementation == its.config._attn_implementation
    assert str(ours.config.dtype).endswith(str(its.config.dtype)) and not ours.model.training
    layers = {path: layer for path, layer in ours.model.named_modules() if isinstance(layer, NF4Linear)}
    assert len(layers) == len(ours.linears) - isinstance(ours.model.get_output_embeddings(), nn.Linear)
    assert LIBRARY is not None
    for path, layer in layers.items():
        expected = NF4Linear.of(its.model.get_submodule(path), Compiled(LIBRARY, LIBRARY.isas[-1]))
        assert torch.equal(layer.weight, expected.weight)
        assert torch.allclose(layer.scales, expected.scales, rtol=2**-20)
        assert (layer.bias is None) == (expected.bias is None)
    assert ours.model.get_input_embeddings() is not ours.model.get_output_embeddings()
    head, embedding = ours.model.get_output_embeddings(), ours.model.get_input_embeddings()
    tied = its.model.get_output_embeddings().weight is its.model.get_input_embeddings().weight
    assert (head.weight is embedding.weight) == tied
    assert len(ours.packed) == isinstance(head, PackedHead) * (1 + tied)
    assert embedding.num_embeddings == its.model.get_input_embeddings().num_embeddings
    tokens = torch.tensor([[3, 0], [255, 3]])
    found, expected = embedding(tokens).float(), its.model.get_input_embeddings()(tokens).float()
    largest = expected.abs().amax(-1, keepdim=True)  # its own rounds the factor to bf16
    assert torch.equal(found, expected) or tied
    assert ((found - expected).abs() <= 2**-11 * largest + 2**-8 * expected.abs()).all()


@torch.inference_mode()
def test_weights_that_the_config_ties_and_the_checkpoint_does_not_are_two(tmp_path: Path) -> None:
    """As transformers reads them: both are there, and they differ."""
    directory = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    weights = load_file(directory / "model.safetensors")
    head = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights | {"lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    (first, _), (again, said) = (load(directory, tmp_path / "cache") for _ in range(2))
    assert len(said) == 1 and said[0].startswith(READING)
    for base in (first, again):
        assert torch.equal(base.floats["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
        packed_head = base.model.get_output_embeddings()
        assert isinstance(packed_head, PackedHead)
        kept = packed_head.product(torch.eye(head.shape[1]))[:, : len(head)].T
        assert torch.allclose(kept, head.float(), atol=float(head.abs().max()) / 2047)
    assert torch.equal(logits(first), logits(again))


def test_every_instruction_set_packs_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """PyTorch's own, which the 16-bit weights and buffers come through, and ours."""
    assert LIBRARY is not None
    script = (
        "import sys; from pathlib import Path; import torch\n"
        "from loramux_server.base.loader import load_base_model\n"
        "from loramux_server.kernels.choice import choose_kernels\n"
        "from loramux_adapters.device.cpu import CpuDevice\n"
        "cpu = CpuDevice()\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "load_base_model(sys.argv[1], device=cpu, cache_dir=Path(sys.argv[2]), report=lambda line: None,\n"
        "                training=True, kernels=choose_kernels(cpu, sys.argv[3]))\n"
    )
    digests = {}
    runs = [
        ("default", LIBRARY.isas[0], 1),
        ("avx2", LIBRARY.isas[-1], 2),
        ("avx512", LIBRARY.isas[len(LIBRARY.isas) // 2], 3),
    ]
    for capability, isa, threads in runs:
        cache = tmp_path / capability
        command = [sys.executable, "-c", script, str(checkpoint), str(cache), f"native-{isa.label}", str(threads)]
        environment = clean_environment() | {"ATEN_CPU_CAPABILITY": capability}
        subprocess.run(command, check=True, env=environment)
        digests[capability, isa.label] = hashlib.sha256(kept_in(cache).read_bytes()).hexdigest()
    assert len(set(digests.values())) == 1, digests


def changed_byte(at: int) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        held = bytearray(file.read_bytes())
        held[at] ^= 1
        file.write_bytes(held)

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (changed_byte(0), "does not begin as a packed base does"),
        (changed_byte(30), "header is not the one that was written"),
        (changed_byte(200), "header is not the one that was written"),
        (changed_byte(-1), "bytes are not those that were packed"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "cut short"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "longer than it was"),
        (lambda file: file.write_bytes(b""), "does not begin as a packed base does"),
        (lambda file: file.write_bytes(file.read_bytes()[:40]), "does not begin as a packed base does"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "header is not the one"),
    ],
)
def test_what_was_damaged_is_told_and_packed_again(
    damage: Callable[[Path], object], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    first, _ = load(checkpoint, tmp_path)
    file = kept_in(tmp_path)
    whole = file.read_bytes()
    damage(file)
    again, said = load(checkpoint, tmp_path)
    assert said[0].startswith(READING) and says in said[1] and "packed again" in said[1]
    assert state_digest(first.model) == state_digest(again.model)
    assert file.read_bytes() == whole


def test_a_file_of_another_base_is_not_used(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, tmp_path)
    with pytest.raises(Unusable, match="of another base"):
        packed_file.read(kept_in(tmp_path), layout().form, "0" * 64, HostTensors)


def test_tensors_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    tensors = packed_tensors(nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16())
    with torch.device("meta"):
        larger = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False))
        other = nn.Sequential(nn.Linear(64, 32), nn.Embedding(4, 4))
        less = nn.Sequential(nn.Identity())
    for model, says in ((larger, "holds no 1.weight"), (other, "holds no 0.bias"), (less, "does not have")):
        before = list(model.parameters())
        with pytest.raises(Unusable, match=says):
            packed.assembled(model, tensors, layout())
        assert all(held is was for held, was in zip(model.parameters(), before, strict=True))


def test_another_version_of_the_library_packs_anew_and_leaves_one_copy(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(checkpoint, tmp_path)
    before = kept_in(tmp_path)
    monkeypatch.setattr(packed.metadata, "version", lambda name: "99.0")
    assert load(checkpoint, tmp_path)[1][0] == QUANTIZING
    assert kept_in(tmp_path) != before


def test_a_file_of_an_older_form_is_packed_again_and_removed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(CompiledLayout, "form", layout().form - 1)
        load(checkpoint, tmp_path)
    before = kept_in(tmp_path)
    assert load(checkpoint, tmp_path)[1][0] == QUANTIZING
    assert kept_in(tmp_path) != before and load(checkpoint, tmp_path)[1][0].startswith(READING)


def test_a_base_that_cannot_be_kept_serves_all_the_same(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").write_text("in the way")
    base, said = load(checkpoint, tmp_path)
    assert "could not be kept" in said[-1] and base.linears


def test_a_broken_file_that_cannot_be_removed_is_packed_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache that can only be read, say."""
    load(checkpoint, tmp_path)
    file = kept_in(tmp_path)
    file.write_bytes(b"")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    base, said = load(checkpoint, tmp_path)
    assert "packed again" in said[1] and "could not be kept" in said[-1] and base.linears


def test_all_numbers_lie_in_one_mapping_and_are_counted_once(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, tmp_path)
    base, _ = load(checkpoint, tmp_path)
    held = [*base.model.parameters(), *base.model.buffers()]
    assert len({each.untyped_storage().data_ptr() for each in held}) == 1
    assert all(each.data_ptr() % 64 == 0 for each in held)
    apart = {each.data_ptr(): each.nbytes for each in held}
    assert 0 <= resident_bytes(base.model) - sum(apart.values()) < 64 * len(apart)


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_tied_embedding_are_held_once_in_whole_numbers(tied: bool, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    base, _ = load(directory, tmp_path / "cache")
    vocabulary, hidden = base.config.vocab_size, base.config.hidden_size
    layers = [layer for layer in base.model.modules() if isinstance(layer, NF4Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    rest = sum(each.nbytes for name, each in base.floats.items() if "norm" in name)
    rest += sum(each.nbytes for each in base.model.model.rotary_emb.buffers())
    padded = -(-vocabulary // 32) * 32
    head = padded * hidden * 3 // 2 + padded * hidden // 64 * 4
    embedding = 0 if tied else vocabulary * hidden * 2
    expected = weights // 2 + weights // 64 * 4 + head + embedding + rest
    parts = {each.data_ptr() for each in (*base.model.parameters(), *base.model.buffers())}
    assert 0 <= resident_bytes(base.model) - expected < 64 * len(parts)
    assert 0 <= kept_in(tmp_path / "cache").stat().st_size - resident_bytes(base.model) < 100 * 2**10
    norms = sum(each.numel() for name, each in base.floats.items() if "norm" in name)
    assert base.bytes_16bit == 2 * (weights + (1 if tied else 2) * vocabulary * hidden + norms)


def test_an_embedding_that_does_something_else_keeps_its_own_weight_beside_the_packed_head() -> None:
    assert LIBRARY is not None
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=True), dtype=torch.bfloat16)
    model.model.embed_tokens.max_norm = 0.5
    tensors = packed_tensors(model)
    assert "model.embed_tokens.weight" in tensors and "lm_head.numbers" in tensors
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert tied_embedding(skeleton) is not None
    packed.assembled(skeleton, tensors, layout())
    assert torch.equal(skeleton.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert isinstance(skeleton.lm_head, PackedHead)


def test_the_16_bit_weights_are_not_read_at_a_later_start(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(checkpoint, tmp_path)
    for name in ("read_model", "_weights"):
        monkeypatch.setattr(f"loramux_server.base.loader.{name}", lambda *_, **__: pytest.fail("read"))
    load(checkpoint, tmp_path)


def test_a_model_with_a_layer_of_another_shape_is_not_packed(checkpoint: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        odd = nn.Sequential(nn.Linear(64, 48), nn.Linear(64, 64))
        fits = nn.Sequential(nn.Linear(64, 32), nn.Linear(128, 64))
    assert packed.packable(fits, layout())
    assert not packed.packable(odd, layout()) and not packed.packable(nn.Sequential(), layout())


def test_a_later_start_imports_no_bitsandbytes_and_no_peft(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, tmp_path)
    script = (
        "import sys; from pathlib import Path; import torch\n"
        "from loramux_server.base.loader import load_base_model\n"
        "from loramux_server.kernels.choice import choose_kernels\n"
        "from loramux_adapters.device.cpu import CpuDevice\n"
        "cpu = CpuDevice()\n"
        "load_base_model(sys.argv[1], device=cpu, cache_dir=Path(sys.argv[2]), report=lambda line: None,\n"
        "                training=True, kernels=choose_kernels(cpu, 'native'))\n"
        "print({'bitsandbytes', 'peft'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert (done.stdout, done.stderr) == ("set()\n", "")
