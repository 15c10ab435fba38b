"""Which experts a row goes through: transformers' routers are recognized, and computed the same on every processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from loramux_server.errors import BaseModelError
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.experts import ExpertForm, Experts
from loramux_server.kernels.layers.operations import compiled_ops
from loramux_server.kernels.layers.routing import CompiledRouting, Router, router_of
from support.tiny_models import tiny_config

LIBRARY = native_library()
ISAS = LIBRARY.isas if LIBRARY else ()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiler was there at installation")

ROUTERS: dict[str, tuple[type[nn.Module], str, dict[str, Any], bool]] = {
    "qwen3, normalized": (Qwen3MoeTopKRouter, "qwen3_moe", {"norm_topk_prob": True}, True),
    "qwen3, of all": (Qwen3MoeTopKRouter, "qwen3_moe", {"norm_topk_prob": False}, False),
    "mixtral": (MixtralTopKRouter, "mixtral", {}, True),
    "gpt-oss": (GptOssTopKRouter, "gpt_oss", {}, True),
}


def router(name: str) -> nn.Module:
    kind, architecture, changes, _ = ROUTERS[name]
    config = tiny_config(architecture, num_experts=20, num_local_experts=20, num_experts_per_tok=3, **changes)
    module = kind(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16().float()
    return module


class Block(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = gate, Experts(ExpertForm(20, 64, 32))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_recognized_and_its_compiled_forward_chooses_as_it_does(name: str) -> None:
    module = router(name)
    assert router_of("gate", module) == Router(3, ROUTERS[name][3])
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(4)) / 8
    theirs = module(x)
    found = []
    for isa in ISAS:
        assert LIBRARY is not None
        block = Block(router(name))
        CompiledRouting(Compiled(LIBRARY, isa)).use(block)
        assert compiled_ops(block) == "1 router"
        found.append(block.gate(x))
        alone = block.gate(x[7:8])
        assert all(torch.equal(part[7:8], own) for part, own in zip(found[-1], alone, strict=True))
    for ours in found:
        assert all(torch.equal(part, first) for part, first in zip(ours, found[0], strict=True))
    assert (found[0][2] == theirs[2]).float().mean() > 0.95, "12 bits change a choice only where it is close"
    same = (found[0][2] == theirs[2]).all(1)
    assert torch.allclose(found[0][1][same], theirs[1][same], atol=2e-3)


@pytest.mark.parametrize("count", [1, 3, 16, 40, 128])
def test_softmax_gives_its_numbers_for_every_count_and_the_same_on_every_instruction_set(count: int) -> None:
    x = torch.randn(9, count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-1, 2, 9)[:, None]
    assert LIBRARY is not None
    found = [CompiledRouting(Compiled(LIBRARY, isa)).softmax(x) for isa in ISAS]
    assert torch.allclose(found[0], x.softmax(-1), rtol=1e-5, atol=1e-7)
    assert all(torch.equal(y, found[0]) for y in found)
    for row in range(len(x)):
        assert torch.equal(CompiledRouting(LIBRARY.best).softmax(x[row : row + 1]), found[0][row : row + 1])


def test_of_equal_scores_the_first_expert_comes_first() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    _, weights, experts = Router(2, normalized=True).route(scores, lambda part: part.softmax(-1))
    assert experts.tolist() == [[1, 2]] and weights.tolist() == [[0.5, 0.5]]


def test_a_router_that_does_something_else_is_refused_by_name() -> None:
    class Odd(Qwen3MoeTopKRouter):
        def forward(self, hidden_states: torch.Tensor) -> Any:
            scores, weights, experts = super().forward(hidden_states)
            return scores, weights * 2.5, experts

    odd = Odd(tiny_config("qwen3_moe"))
    assert LIBRARY is not None
    with pytest.raises(BaseModelError, match=r"gate \(Odd\) chooses experts in a way that is not served"):
        CompiledRouting(LIBRARY.best).use(Block(odd))


def test_rows_of_a_width_that_no_kernel_takes_are_refused() -> None:
    narrow = Qwen3MoeTopKRouter(tiny_config("qwen3_moe", hidden_size=48))
    assert LIBRARY is not None
    with pytest.raises(BaseModelError, match="rows of 48 numbers"):
        CompiledRouting(LIBRARY.best).use(Block(narrow))
