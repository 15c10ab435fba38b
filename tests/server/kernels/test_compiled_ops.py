"""Compiled norms, gated MLPs and output heads: a base's own numbers, row by row, and only where they are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loramux_server.kernels.abi import Isa
from loramux_server.kernels.compiled_ops import compiled_ops, use_compiled_ops
from loramux_server.kernels.native import native_library
from support.tiny_models import save_tiny_model

LIBRARY = native_library()
VECTOR = LIBRARY is not None and LIBRARY.best_isa >= Isa.AVX512_BF16
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiler was there at installation")
needs_vectors = pytest.mark.skipif(not VECTOR, reason="the compiled head needs AVX512-BF16")


class Gated(nn.Module):
    def __init__(self, width: int, inner: int, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Headed(nn.Module):
    def __init__(self, width: int, columns: int, *, bias: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(width, columns, bias=bias)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def norm_of(width: int, kind: type[nn.Module] = LlamaRMSNorm) -> nn.Module:
    norm: nn.Module = kind(width).bfloat16()
    norm.weight.data = (torch.rand(width) + 0.5).bfloat16()  # type: ignore[union-attr]
    return norm


def use(model: nn.Module) -> None:
    assert LIBRARY is not None
    use_compiled_ops(model, LIBRARY, LIBRARY.best_isa)


def compiled(module: nn.Module) -> str:
    """What of it runs on compiled kernels, now."""
    model = module if isinstance(module, Headed) else nn.Sequential(module)
    use(model.bfloat16())
    return compiled_ops(model)


@torch.inference_mode()
def own(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the module's own code gives."""
    y: torch.Tensor = type(module).forward(module, x)
    return y


@pytest.mark.parametrize("width", [1, 31, 64, 576, 2049])
@torch.inference_mode()
def test_a_norm_gives_its_own_numbers_nearly_all_of_them_to_the_last_bit(width: int) -> None:
    norm = norm_of(width)
    assert compiled(norm) == "1 norm"
    x = (torch.randn(1, 40, width) * 3).bfloat16()
    torch.testing.assert_close(norm(x), own(norm, x), rtol=2**-7, atol=1e-6)
    assert (norm(x) == own(norm, x)).float().mean() > 0.99
    assert torch.equal(norm(x.float()), own(norm, x.float())), "other dtypes go their own way"


@pytest.mark.parametrize("kind", [GemmaRMSNorm])
def test_a_norm_that_means_something_else_keeps_its_own_code(kind: type[nn.Module]) -> None:
    assert compiled(norm_of(64, kind)) == "none"
    assert compiled(nn.LayerNorm(64)) == "none"
    assert compiled(nn.LayerNorm(64, bias=False)) == "none"


@torch.inference_mode()
def test_an_activation_is_right_for_every_number_there_is() -> None:
    gated = Gated(64, 128, nn.SiLU())
    for layer in (gated.gate_proj, gated.up_proj, gated.down_proj):
        layer.weight.data = torch.randn_like(layer.weight)
    assert compiled(gated) == "1 MLP"
    g = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 64)
    gated.gate_proj = gated.up_proj = gated.down_proj = nn.Identity()  # type: ignore[assignment]
    ours, its = gated(g), nn.functional.silu(g) * g
    finite = torch.isfinite(its.float()) & (its.float().abs() > 1e-30)
    assert torch.equal(ours.isnan(), its.isnan())
    torch.testing.assert_close(ours[finite], its[finite], rtol=2**-6, atol=0)
    assert (ours[finite] == its[finite]).float().mean() > 0.999


def test_an_mlp_with_another_activation_keeps_its_own_code() -> None:
    for act in (nn.GELU(), nn.ReLU()):
        gated = Gated(64, 128, act)
        for layer in (gated.gate_proj, gated.up_proj, gated.down_proj):
            layer.weight.data = torch.randn_like(layer.weight)
        assert compiled(gated) == "none"


@needs_vectors
@pytest.mark.parametrize(("width", "columns"), [(64, 320), (576, 1001), (50, 7), (33, 8), (2048, 15)])
@torch.inference_mode()
def test_a_head_gives_fp32_sums_rounded_once(width: int, columns: int) -> None:
    torch.manual_seed(0)  # of few columns one last bit is more than the share that may differ
    model = Headed(width, columns)
    model.head.weight.data = torch.randn(columns, width) / width**0.5
    assert compiled(model) == "1 head"
    assert model.head(torch.empty(0, width).bfloat16()).shape == (0, columns)
    for rows in (1, 2, 3, 4, 8, 9, 33):
        x = torch.randn(rows, width).bfloat16()
        expected = x.double() @ model.head.weight.double().T
        torch.testing.assert_close(model.head(x).double(), expected, rtol=2**-8, atol=1e-2 * float(expected.std()))


def test_a_head_with_a_bias_keeps_its_own_code() -> None:
    assert compiled(Headed(64, 320, bias=True)) == "none"


@torch.inference_mode()
def test_the_bits_of_a_row_depend_neither_on_its_company_nor_on_the_threads() -> None:
    gated, model, norm = Gated(512, 1024, nn.SiLU()), Headed(512, 1003), norm_of(512)
    for layer in (gated.gate_proj, gated.up_proj, gated.down_proj):
        layer.weight.data = torch.randn_like(layer.weight) / 23
    use(nn.ModuleList([gated.bfloat16(), norm]))
    use(model.bfloat16())
    gated.down_proj, gated.gate_proj, gated.up_proj = (nn.Identity() for _ in range(3))  # type: ignore[assignment]
    x = torch.randn(130, 512).bfloat16()
    threads = torch.get_num_threads()
    for module in (norm, gated, model.head):
        together = module(x)
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            try:
                assert torch.equal(module(x), together)
                assert torch.equal(torch.cat([module(row[None]) for row in x[:7]]), together[:7])
                assert torch.equal(module(x[3:90]), together[3:90])
            finally:
                torch.set_num_threads(threads)


@torch.inference_mode()
def test_a_whole_model_gives_its_own_logits(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path)
    its, ours = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval() for _ in range(2))
    use(ours)
    assert compiled_ops(ours) == f"2 MLPs, {'1 head, ' if VECTOR else ''}5 norms" and compiled_ops(its) == "none"
    ids = torch.randint(0, 320, (1, 40))
    expected, found = its(ids).logits.float(), ours(ids).logits.float()
    assert (found - expected).abs().max() < 0.05 * expected.std()
