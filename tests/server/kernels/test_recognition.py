"""What modules are recognized as on devices where they keep their own code (layers/recognition.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.layers.operations import use_compiled_ops
from loramux_server.kernels.layers.recognition import TensorFormulas, norm_of, recognize

FAMILIES = ["llama", "gemma", "gemma2", "qwen3", "phi3", "granite", "olmo2"]
MARKS = ("loramux_norm", "loramux_mlp", "loramux_embedding")


def model_of(family: str) -> nn.Module:
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = (torch.rand_like(weight) + 0.5).bfloat16()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_model_in_bf16_is_recognized_as_its_twin_on_compiled_kernels_is(family: str) -> None:
    library = native_library()
    assert library is not None
    model = model_of(family)
    compiled = copy.deepcopy(model)
    use_compiled_ops(compiled, library.best)
    before = {path: module.__dict__.get("forward") for path, module in model.named_modules()}
    recognize(model, CpuDevice())
    found = 0
    for path, twin in compiled.named_modules():
        module = model.get_submodule(path)
        assert module.__dict__.get("forward") is before[path], "it keeps its own code"
        for mark in MARKS:
            expected, its = twin.__dict__.get(mark), module.__dict__.get(mark)
            assert (expected is None) == (its is None), f"{mark} of {path}"
            if expected is None:
                continue
            found += 1
            if mark == "loramux_norm":
                assert torch.equal(its.weight, expected.weight) and its.eps == expected.eps
            else:
                assert its == expected
    assert found >= 2 * 3 + 2


@torch.inference_mode()
def test_what_computes_something_else_is_not_recognized() -> None:
    model = model_of("llama")
    layer = model.model.layers[0]  # type: ignore[union-attr,index]
    layer.mlp.act_fn = nn.GELU()
    layer.input_layernorm.register_parameter("scale", nn.Parameter(torch.ones(1)))
    layer.post_attention_layernorm.variance_epsilon = 0.5
    own = layer.mlp.down_proj.forward
    model.model.layers[1].mlp.forward = lambda x: own(x.repeat(1, 2)[:, :96])  # type: ignore[union-attr,index]
    recognize(model, CpuDevice())
    other = model.model.layers[1]  # type: ignore[union-attr,index]
    assert "loramux_mlp" not in layer.mlp.__dict__ and "loramux_mlp" not in other.mlp.__dict__
    assert "loramux_norm" not in layer.input_layernorm.__dict__
    assert layer.post_attention_layernorm.loramux_norm.eps == 0.5, "what it says is taken where it is true"
    assert "loramux_norm" in other.input_layernorm.__dict__


@torch.inference_mode()
def test_a_norm_without_a_weight_is_recognized_and_takes_rows_of_any_width() -> None:
    library = native_library()
    assert library is not None
    norm = Llama4TextL2Norm(eps=0.02)
    found = norm_of(norm, TensorFormulas())
    assert found is not None and (found.eps, found.weight.numel()) == (0.02, 0)
    own = norm.forward
    use_compiled_ops(norm, library.best)
    for width in (16, 128, 24):
        x = torch.randn(2, 5, width)
        torch.testing.assert_close(norm(x), own(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(norm(x)[1, 4:], norm(x[1, 4:])), "its bits do not depend on its place"
    assert norm(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16


def test_a_norm_of_one_width_without_a_weight_keeps_its_own_code() -> None:
    assert norm_of(nn.RMSNorm(64, eps=1e-5, elementwise_affine=False), TensorFormulas()) is None


def test_what_has_an_epsilon_and_computes_something_else_is_no_norm() -> None:
    class Other(nn.Module):
        def __init__(self, what: str) -> None:
            super().__init__()
            self.eps, self.what = 0.02, what

        def forward(self, x: torch.Tensor) -> object:
            if self.what == "raises":
                raise RuntimeError("rows of 32")
            return (x, x) if self.what == "two" else x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt()

    assert [norm_of(Other(what), TensorFormulas()) for what in ("raises", "two", "sum")] == [None] * 3
