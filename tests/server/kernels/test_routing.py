"""Which experts a row goes through: transformers' routers are recognized, and computed the same on every processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
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

GROUPED = {"n_group": 5, "topk_group": 2, "routed_scaling_factor": 2.5}
V2 = {"qk_rope_head_dim": 16, "routed_scaling_factor": 16.0}
# what computes one, its config, what that says beyond the tiny one's, and what is recognized
ROUTERS: dict[str, tuple[type[nn.Module], str, dict[str, Any], Router]] = {
    "qwen3, normalized": (Qwen3MoeTopKRouter, "qwen3_moe", {"norm_topk_prob": True}, Router(3, True)),
    "qwen3, of all": (Qwen3MoeTopKRouter, "qwen3_moe", {"norm_topk_prob": False}, Router(3, False)),
    "mixtral": (MixtralTopKRouter, "mixtral", {}, Router(3, True)),
    "gpt-oss": (GptOssTopKRouter, "gpt_oss", {}, Router(3, True)),
    "granite": (GraniteMoeTopKRouter, "granitemoe", {}, Router(3, True)),
    "ernie": (Ernie4_5_MoeTopKRouter, "ernie4_5_moe", {}, Router(3, True, corrected=True)),
    "glm, one group": (
        Glm4MoeTopkRouter,
        "glm4_moe",
        {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        Router(3, True, sigmoid=True, corrected=True),
    ),
    "deepseek v3": (
        DeepseekV3TopkRouter,
        "deepseek_v3",
        GROUPED,
        Router(3, True, sigmoid=True, corrected=True, groups=(5, 2), two=True, factor=2.5),
    ),
    "deepseek v3, not normalized": (
        DeepseekV3TopkRouter,
        "deepseek_v3",
        GROUPED | {"norm_topk_prob": False},
        Router(3, False, sigmoid=True, corrected=True, groups=(5, 2), two=True, factor=2.5),
    ),
    "deepseek v2, greedy": (
        DeepseekV2TopkRouter,
        "deepseek_v2",
        V2 | {"topk_method": "greedy", "routed_scaling_factor": 1.0},
        Router(3, False),
    ),
    "deepseek v2, in groups": (
        DeepseekV2TopkRouter,
        "deepseek_v2",
        V2 | {"topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 2},
        Router(3, False, groups=(5, 2), factor=16.0),
    ),
}


def router(name: str) -> nn.Module:
    kind, architecture, changes, _ = ROUTERS[name]
    counts = {"num_experts": 20, "num_local_experts": 20, "moe_num_experts": 20, "moe_k": 3, "num_experts_per_tok": 3}
    module = kind(tiny_config(architecture, **(counts | changes)))
    generator = torch.Generator().manual_seed(2)
    for each in (*module.parameters(), *module.buffers()):
        each.data = torch.randn(each.shape, generator=generator).bfloat16().float()
    return module


class Block(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = gate, Experts(ExpertForm(20, 64, 32))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_recognized_and_its_compiled_forward_chooses_as_it_does(name: str) -> None:
    module = router(name)
    assert router_of("gate", module) == ROUTERS[name][3]
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(4)) / 8
    weights, experts = by_number(*module(x)[1:])
    found = []
    for isa in ISAS:
        assert LIBRARY is not None
        block = Block(router(name))
        CompiledRouting(Compiled(LIBRARY, isa)).use(block)
        assert compiled_ops(block) == "1 router"
        found.append(block.gate(x))
        alone = block.gate(x[7:8])
        assert all(torch.equal(part[7:8], own) for part, own in zip(found[-1], alone, strict=True))
    for each in found:
        assert all(torch.equal(part, first) for part, first in zip(each, found[0], strict=True))
    ours, chosen = by_number(*found[0][1:])
    assert (chosen == experts).float().mean() > 0.95, "12 bits change a choice only where it is close"
    same = (chosen == experts).all(1)
    assert torch.allclose(ours[same], weights[same], rtol=2e-3, atol=2e-3)


def by_number(weights: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's in the order of its experts' numbers: some routers give them in none."""
    ordered, places = experts.sort(dim=-1)
    return weights.gather(1, places), ordered


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("experts", "groups", "chosen"),
    [(16, (4, 2), 2), (16, (4, 3), 1), (64, (8, 3), 6), (64, (8, 4), 1), (64, (8, 7), 2)],
)
def test_groups_are_recognized_though_they_seldom_change_a_choice(
    experts: int, groups: tuple[int, int], chosen: int, normalized: bool
) -> None:
    config = tiny_config(
        "deepseek_v3",
        n_routed_experts=experts,
        num_experts=experts,
        num_local_experts=experts,
        n_group=groups[0],
        topk_group=groups[1],
        num_experts_per_tok=chosen,
        norm_topk_prob=normalized,
        routed_scaling_factor=1.7,
    )
    expected = Router(chosen, normalized, True, True, groups, True, 1.7)
    assert router_of("gate", DeepseekV3TopkRouter(config)) == expected


class ZeroForOthers(nn.Module):
    """Experts of groups that do not count have zero in place of what they are chosen by, as older code had it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.e_score_correction_bias = nn.Parameter(torch.zeros(32, 64)), nn.Parameter(torch.zeros(32))
        self.top_k, self.n_group, self.topk_group = 2, 4, 2

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = x @ self.weight.T
        shares = scores.sigmoid()
        grouped = (shares + self.e_score_correction_bias).view(-1, 4, 8)
        counts = torch.zeros(len(x), 4).scatter(1, grouped.topk(2).values.sum(-1).topk(2).indices, 1.0)
        chosen = (grouped * counts[..., None]).flatten(1).topk(2).indices
        weights = shares.gather(1, chosen)
        return scores, weights / weights.sum(1, keepdim=True), chosen


def test_another_value_for_groups_that_do_not_count_is_not_served() -> None:
    with pytest.raises(BaseModelError, match="in a way that is not served"):
        router_of("gate", ZeroForOthers())


def test_routers_of_one_model_are_told_apart_by_their_settings() -> None:
    model = nn.ModuleList(Block(router("qwen3, normalized")) for _ in range(3))
    model[1].gate.top_k = 2
    assert LIBRARY is not None
    CompiledRouting(LIBRARY.best).use(model)
    assert [block.gate.loramux_router.chosen for block in model] == [3, 2, 3]


@pytest.mark.parametrize("count", [1, 3, 16, 40, 128])
def test_softmax_gives_its_numbers_for_every_count_and_the_same_on_every_instruction_set(count: int) -> None:
    x = torch.randn(9, count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-1, 2, 9)[:, None]
    assert LIBRARY is not None
    found = [CompiledRouting(Compiled(LIBRARY, isa)).softmax(x) for isa in ISAS]
    assert torch.allclose(found[0], x.softmax(-1), rtol=1e-5, atol=1e-7)
    assert all(torch.equal(y, found[0]) for y in found)
    for row in range(len(x)):
        assert torch.equal(CompiledRouting(LIBRARY.best).softmax(x[row : row + 1]), found[0][row : row + 1])


def test_a_sigmoid_is_right_for_every_size_of_number_and_the_same_alone_and_on_every_instruction_set() -> None:
    x = torch.cat([-torch.logspace(2, -9, 500), torch.logspace(-9, 2, 501)]).view(7, 143)
    assert LIBRARY is not None
    found = [CompiledRouting(Compiled(LIBRARY, isa)).sigmoid(x) for isa in ISAS]
    torch.testing.assert_close(found[0].double(), x.double().sigmoid(), rtol=1e-5, atol=1e-30)
    assert all(torch.equal(y, found[0]) for y in found)
    assert torch.equal(CompiledRouting(LIBRARY.best).sigmoid(x[3:4, 5:6]), found[0][3:4, 5:6])


def test_groups_are_compared_by_their_best_or_by_the_sum_of_their_two_best() -> None:
    scores = torch.tensor([[5.0, 0.0, 3.0, 3.0, 1.0, 4.0]])
    for two, expected in ((False, [0, 1]), (True, [2, 3])):
        router = Router(2, normalized=False, sigmoid=True, groups=(3, 1), two=two)
        assert router.route(scores, lambda part: part.softmax(-1))[2].tolist() == [expected]


def test_corrections_decide_who_is_chosen_and_not_how_much_it_counts() -> None:
    scores, corrections = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([5.0, 0.0, 0.0])
    router = Router(2, normalized=False, sigmoid=True, corrected=True, factor=2.0)
    _, weights, experts = router.route(scores, lambda part: part.softmax(-1), corrections)
    assert experts.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, 2 * torch.tensor([[0.0, 2.0]]).sigmoid())


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
