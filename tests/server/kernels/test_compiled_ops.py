"""Compiled embeddings, norms and gated MLPs: a base's own numbers, row by row the same on every instruction set."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaTextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.operations import compiled_ops, use_compiled_ops
from support.tiny_models import ARCHITECTURES, save_tiny_model

LIBRARY = native_library()
ISAS = LIBRARY.isas if LIBRARY else ()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiler was there at installation")


class Gated(nn.Module):
    def __init__(self, width: int, inner: int, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = act
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            layer.weight.data = torch.randn_like(layer.weight) / width**0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Fused(nn.Module):
    """Gate and up in one layer, as Phi-3 has it."""

    def __init__(self, width: int, inner: int, act: nn.Module, *, gate_first: bool = True) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation_fn = act
        self._gate_first = gate_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if not self._gate_first:
            gate, up = up, gate
        y: torch.Tensor = self.down_proj(up * self.activation_fn(gate))
        return y


class Embedded(nn.Module):
    def __init__(self, embedding: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = head

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def norm_of(width: int, kind: type[nn.Module] = LlamaRMSNorm) -> nn.Module:
    norm: nn.Module = kind(width).bfloat16()
    norm.weight.data = (torch.rand(width) + 0.5).bfloat16()  # type: ignore[union-attr]
    return norm


def use(model: nn.Module, isa: int = -1) -> str:
    """What of it runs on compiled kernels, now."""
    assert LIBRARY is not None
    use_compiled_ops(model, Compiled(LIBRARY, ISAS[isa]))
    return compiled_ops(model)


@torch.inference_mode()
def own(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the module's own code gives."""
    y: torch.Tensor = type(module).forward(module, x)
    return y


@pytest.mark.parametrize("width", [16, 64, 576, 2048])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, Olmo2RMSNorm])
@torch.inference_mode()
def test_a_norm_gives_its_own_numbers_and_says_what_it_multiplies_with(width: int, kind: type[nn.Module]) -> None:
    norm = norm_of(width, kind)
    assert use(nn.Sequential(norm)) == "1 norm"
    x = torch.randn(1, 40, width) * 10.0 ** torch.linspace(-3, 3, 40)[:, None]
    torch.testing.assert_close(norm(x), own(norm, x), rtol=2e-6, atol=0)
    held = norm.loramux_norm
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + held.eps).rsqrt() * held.weight.double()  # type: ignore[union-attr,operator]
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=0)
    spread = x[..., None].expand(*x.shape, 2)[..., 0]
    assert torch.equal(norm(spread), norm(x)), "where the numbers lie changes nothing"


def test_what_means_something_else_keeps_its_own_code_in_fp32() -> None:
    for module in (nn.LayerNorm(64), nn.LayerNorm(64, bias=False), norm_of(50)):
        model = nn.Sequential(module.bfloat16())
        assert use(model) == "none"
        assert model(torch.randn(3, module.weight.numel())).dtype == torch.float32


ACTIVATIONS: list[nn.Module] = [nn.SiLU(), nn.GELU(approximate="tanh")]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=["SiLU", "GELU"])
@pytest.mark.parametrize("kind", [Gated, Fused])
@torch.inference_mode()
def test_an_mlp_gives_its_own_numbers(act: nn.Module, kind: type[Gated] | type[Fused]) -> None:
    mlp = kind(64, 128, act).bfloat16()
    assert use(nn.Sequential(mlp)) == "1 MLP"
    assert (mlp.loramux_mlp.gelu, mlp.loramux_mlp.fused) == (act is ACTIVATIONS[1], kind is Fused)  # type: ignore[union-attr]
    x = torch.randn(2, 5, 64) * 4
    torch.testing.assert_close(mlp(x), own(mlp, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=["SiLU", "GELU"])
@torch.inference_mode()
def test_an_activation_is_right_for_every_size_of_number(act: nn.Module) -> None:
    gated = Gated(64, 64, act)
    assert use(nn.Sequential(gated)) == "1 MLP"
    gated.gate_proj = gated.up_proj = gated.down_proj = nn.Identity()  # type: ignore[assignment]
    sizes = torch.cat([-(10.0 ** torch.linspace(2, -20, 1024)), 10.0 ** torch.linspace(-20, 18, 1024)]).view(-1, 64)
    expected = act(sizes.double()) * sizes.double()
    torch.testing.assert_close(
        gated(sizes).double(), expected, rtol=1e-6, atol=1e-5 if act is ACTIVATIONS[1] else 1e-34
    )
    for odd in (float("nan"), float("inf")):
        assert not gated(torch.full((1, 64), odd)).isfinite().any()


def test_an_mlp_that_does_something_else_keeps_its_own_code() -> None:
    for mlp in (Gated(64, 128, nn.GELU()), Gated(64, 128, nn.ReLU()), Fused(64, 128, nn.SiLU(), gate_first=False)):
        assert use(nn.Sequential(mlp.bfloat16())) == "none"
    odd = Gated(64, 128, nn.SiLU()).bfloat16()
    odd.forward = lambda x: type(odd).forward(odd, x) * 1.01  # type: ignore[method-assign]
    assert use(nn.Sequential(odd)) == "none"


@torch.inference_mode()
def test_an_embedding_keeps_its_bytes_and_gives_its_numbers_in_fp32() -> None:
    tokens = torch.tensor([[3, 0, 99, 3]])
    for module, factor in (
        (nn.Embedding(100, 48, padding_idx=99), 1.0),
        (GemmaTextScaledWordEmbedding(100, 48, 0, embed_scale=6.9282), 6.9282),
    ):
        model = Embedded(module.bfloat16())
        factor = float(getattr(module, "embed_scale", factor))
        assert use(model) == "1 embedding"
        assert module.weight.dtype == torch.bfloat16 and module.loramux_embedding.factor == factor  # type: ignore[union-attr]
        assert torch.equal(module(tokens), module.weight.float()[tokens] * torch.tensor(factor))


@torch.inference_mode()
def test_an_embedding_that_a_dense_head_multiplies_with_becomes_fp32_with_it() -> None:
    embedding, head = nn.Embedding(100, 48), nn.Linear(48, 100, bias=False)
    head.weight = embedding.weight
    model = Embedded(embedding, head).bfloat16()
    assert use(model) == "1 embedding"
    assert model.head is not None and model.head(embedding(torch.tensor([[1]]))).dtype == torch.float32
    assert head.weight is embedding.weight


@torch.inference_mode()
def test_the_bits_of_a_row_depend_on_nothing_but_the_row() -> None:
    """Neither on its company nor on threads nor on the instruction set."""
    modules = [norm_of(512), Gated(512, 1024, nn.SiLU()), Fused(512, 1024, nn.GELU(approximate="tanh"))]
    x = torch.randn(130, 512)
    x[7, 3] = float("nan")
    expected: list[torch.Tensor] = []
    threads = torch.get_num_threads()
    for isa in range(len(ISAS)):
        for which, fresh in enumerate(modules):
            module = copy.deepcopy(fresh)
            use(nn.Sequential(module), isa)
            if module._modules:  # only what is between the products
                module._modules.update({name: nn.Identity() for name in module._modules if name != "gate_up_proj"})
                module._modules.update({} if isinstance(module, Gated) else {"gate_up_proj": nn.Identity()})
            together = module(x)
            if isa == 0:
                expected.append(together)
                assert together.isfinite().all(-1).sum() == 129
            assert torch.equal(together.view(torch.int32), expected[which].view(torch.int32)), ISAS[isa].label
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                try:
                    assert torch.equal(module(x[8:]), together[8:])
                    assert torch.equal(torch.cat([module(row[None]) for row in x[:7]]), together[:7])
                finally:
                    torch.set_num_threads(threads)


COMPILED = {
    "llama": "2 MLPs, 1 embedding, 5 norms",
    "qwen3": "2 MLPs, 1 embedding, 9 norms",
    "gemma": "2 MLPs, 1 embedding, 5 norms",
    "gemma2": "2 MLPs, 1 embedding, 9 norms",
    "gemma3_text": "2 MLPs, 1 embedding, 13 norms",
    "phi3": "2 MLPs, 1 embedding, 5 norms",
    "olmo2": "2 MLPs, 1 embedding, 9 norms",
    "granite": "2 MLPs, 1 embedding, 5 norms",
    "gpt_neox": "1 embedding",
}


@pytest.mark.parametrize("architecture", COMPILED)
@torch.inference_mode()
def test_a_whole_model_gives_the_logits_that_it_has_in_fp32(architecture: str, tmp_path: Path) -> None:
    assert architecture in ARCHITECTURES
    directory = save_tiny_model(tmp_path, architecture)
    its = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    assert use(ours) == COMPILED[architecture] and compiled_ops(its) == "none"
    ids = torch.randint(0, 256, (1, 40))
    expected, found = its(ids).logits, ours(ids).logits
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.std()
