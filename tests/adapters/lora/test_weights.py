from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loramux_adapters.artifact.format import WEIGHTS_FILE, digest_of, pair_up, read_config
from loramux_adapters.artifact.safetensors_header import read_header
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.verify import check_adapter
from loramux_adapters.lora.weights import ConvertPairs, convert_by_tensors, fold, load_host_adapter, read_adapter
from loramux_server.kernels.compiled.adapter_kernels import NativeConvertPairs
from loramux_server.kernels.compiled.library import native_library
from support.adapter_files import TINY_LINEARS, write_adapter

LIBRARY = native_library()


def converter(*, compiled: bool) -> ConvertPairs:
    if not compiled:
        return convert_by_tensors
    if LIBRARY is None:
        pytest.skip("no compiler was there at installation")
    return NativeConvertPairs(LIBRARY)


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def base_info(model: LlamaForCausalLM) -> BaseInfo:
    parameters = dict(model.state_dict())
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return BaseInfo(
        "0" * 64, linears, lambda name, tensor: name in parameters and torch.equal(parameters[name], tensor)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, "r": 16, "lora_alpha": 3},
        {
            "target_modules": ["q_proj", "down_proj", "lm_head"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers\.1\..*": 32, "lm_head": 1},
            "alpha_pattern": {"down_proj": 5, "^lm_head": 7},
            "use_rslora": True,
        },
        {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(o|up)_proj", "rank_pattern": {".*up_proj": 3}},
        {"target_modules": ["gate_proj"], "layers_to_transform": [1], "init_lora_weights": "orthogonal"},
    ],
)
def test_the_loaded_weights_give_the_delta_that_peft_gives(tmp_path: Path, tied: bool, options: dict[str, Any]) -> None:
    model = tiny_llama(tied=tied)
    base = base_info(model)
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights and of saving embeddings
        tuned = get_peft_model(model, config)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        tuned.save_pretrained(str(tmp_path))
    assert isinstance(tuned, PeftModel)

    checked = check_adapter(tmp_path, base, max_rank=256)
    adapter = checked.adapter

    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in tuned.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert adapter.modules.keys() == expected.keys() and expected
    assert checked.rank == adapter.rank == max(a.shape[0] for a, _ in adapter.modules.values())
    for module, (a, bt) in adapter.modules.items():
        delta = bt.float().t() @ a.float()
        error = (delta - expected[module]).norm() / expected[module].norm()
        assert error < 2**-7, module


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_arrive_in_bf16_contiguous_and_counted(tmp_path: Path, dtype: str) -> None:
    write_adapter(tmp_path, TINY_LINEARS, dtype=dtype, rank=4, rank_pattern={"q_proj": 6})
    adapter = load_host_adapter(tmp_path)
    assert adapter.version == digest_of(read_config(tmp_path), tmp_path) and adapter.rank == 6
    for module, (a, bt) in adapter.modules.items():
        in_features, out_features = TINY_LINEARS[module]
        rank = 6 if module.endswith("q_proj") else 4
        assert a.shape == (rank, in_features) and bt.shape == (rank, out_features)
        assert a.dtype == bt.dtype == torch.bfloat16 and a.is_contiguous() and bt.is_contiguous()
    assert adapter.nbytes == sum(2 * (a.numel() + bt.numel()) for a, bt in adapter.modules.values())


def test_the_scale_is_folded_in_fp32_and_rounded_once() -> None:
    b = torch.randn(5, 3).half()
    _, bt = fold(torch.ones(3, 2), b, 1 / 3)
    assert torch.equal(bt, (b.float() * (1 / 3)).to(torch.bfloat16).t())


@pytest.mark.skipif(LIBRARY is None, reason="no compiler was there at installation")
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_compiled_reader_gives_what_tensors_give(tmp_path: Path, dtype: str) -> None:
    write_adapter(tmp_path, TINY_LINEARS, dtype=dtype, rank=5, rank_pattern={"q_proj": 33}, alpha=7, std_b=3e-6)
    assert_equal(load_host_adapter(tmp_path), load_host_adapter(tmp_path, converter(compiled=True)))


def assert_equal(one: HostAdapter, other: HostAdapter) -> None:
    """The same to the last bit, and in the same order."""
    assert (one.version, one.rank, one.nbytes) == (other.version, other.rank, other.nbytes)
    assert list(one.modules) == list(other.modules)
    for module, parts in one.modules.items():
        assert all(torch.equal(*both) for both in zip(parts, other.modules[module], strict=True)), module


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("piece_bytes", [1, 3000, 20_000])
def test_an_adapter_is_the_same_in_however_small_pieces_it_is_read(
    tmp_path: Path, compiled: bool, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules of every dtype, of odd sizes and in an order other than that of their names."""
    convert = converter(compiled=compiled)
    shapes = {"b.q_proj": (7, 11), "a.q_proj": (33, 5), "c.k_proj": (3, 3), "aa.k_proj": (64, 64)}
    write_adapter(tmp_path, shapes, rank=3, alpha=5)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    for index, name in enumerate(tensors):
        tensors[name] = tensors[name].to((torch.float32, torch.bfloat16, torch.float16)[index % 3])
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    whole = load_host_adapter(tmp_path, convert)
    monkeypatch.setattr("loramux_adapters.lora.weights._PIECE_BYTES", piece_bytes)
    in_pieces = load_host_adapter(tmp_path, convert)
    assert_equal(in_pieces, whole)
    assert in_pieces.version == digest_of(read_config(tmp_path), tmp_path)
    for module in shapes:
        names = (f"base_model.model.{module}.lora_{half}.weight" for half in "AB")
        expected = fold(*(tensors[name] for name in names), 5 / 3)
        assert all(torch.equal(*both) for both in zip(expected, in_pieces.modules[module], strict=True)), module


def test_weights_that_end_while_they_are_read_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    path = tmp_path / WEIGHTS_FILE
    config, pairs = read_config(tmp_path), pair_up(read_header(path)).pairs
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterRejected, match="ended while it was read"):
        read_adapter(tmp_path, config, pairs)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "width"), [("F32", 4), ("F16", 2), ("BF16", 2)])
def test_every_number_of_a_format_arrives_as_tensors_convert_it(
    tmp_path: Path, dtype: str, width: int, compiled: bool
) -> None:
    """All 65,536 patterns of the upper or only 16 bits, among them subnormal numbers, infinities and NaN."""
    convert = converter(compiled=compiled)
    bits = torch.arange(1 << 16, dtype=torch.int32)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    numbers = ((bits << 16) | 0x8001 if width == 4 else bits.to(torch.int16)).view(kinds[dtype]).view(256, 256)
    write_adapter(tmp_path, {"layer": (256, 256)}, dtype=dtype, rank=256, alpha=512)
    path = tmp_path / WEIGHTS_FILE
    header = read_header(path)
    content = bytearray(path.read_bytes())
    for spec in header.values():
        content[spec.offset : spec.offset + spec.nbytes] = numbers.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    adapter, not_finite = read_adapter(tmp_path, read_config(tmp_path), pair_up(read_header(path)).pairs, convert)
    a, bt = fold(numbers, numbers, 2.0)
    torch.testing.assert_close(adapter.modules["layer"][0], a, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(adapter.modules["layer"][1], bt, rtol=0, atol=0, equal_nan=True)
    assert not_finite == ["layer"]


def test_loading_needs_no_peft_and_leaves_the_file_free(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, targets=["q_proj"], dtype="BF16")
    adapter = load_host_adapter(tmp_path)
    kept = {module: a.clone() for module, (a, _) in adapter.modules.items()}
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes((tmp_path / WEIGHTS_FILE).stat().st_size))
    assert all(torch.equal(adapter.modules[module][0], a) for module, a in kept.items())


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="missing"):
        load_host_adapter(tmp_path)
