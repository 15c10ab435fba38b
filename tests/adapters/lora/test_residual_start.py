"""PiSSA and OLoRA adapters as peft trains them become what peft itself converts them to, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters import nf4
from loramux_adapters.artifact.format import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.residual_start import Start, convert_residual, difference, first_columns
from loramux_adapters.lora.verify import check_adapter
from support.adapter_files import TINY_LINEARS, write_adapter
from support.tiny_models import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.tensor([[7, 3, 9, 40, 41, 6, 90, 13]])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 12}},
}


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32).eval()


def base_of(model: nn.Module) -> BaseInfo:
    linears = {p: (m.in_features, m.out_features) for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    return BaseInfo("aa" * 32, linears)


def weights_of(model: nn.Module) -> Callable[[str], torch.Tensor]:
    return lambda path: model.get_submodule(path).weight.detach()  # type: ignore[return-value]


def trained(directory: Path, init: str, *, base: Any = None, steps: int = 6, **settings: Any) -> torch.Tensor:
    """An adapter that peft trained for a few steps and saved unconverted; its logits [1, tokens, vocabulary]."""
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=init,  # type: ignore[arg-type]
        target_modules=["q_proj", "v_proj", "down_proj"],
        **(SETTINGS["plain"] | settings),
    )
    model: Any = get_peft_model(base or model_of(), config)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.02)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
    model.save_pretrained(directory)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


def converted_logits(directory: Path) -> torch.Tensor:
    """Of the files as LoRA on the base itself, by peft."""
    model: Any = PeftModel.from_pretrained(model_of(), directory)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


def without_a_mark(directory: Path) -> None:
    """peft refuses options that it does not know."""
    path = directory / CONFIG_FILE
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in fields.items() if not name.startswith("loramux")}))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_computes_on_the_base_what_was_trained_beside_it(tmp_path: Path, init: str, settings: str) -> None:
    expected = trained(tmp_path, init, **SETTINGS[settings])
    model = model_of()
    convert_residual(tmp_path, base_of(model), weights_of(model), 64)
    once = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    convert_residual(tmp_path, base_of(model), weights_of(model), 64)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == once, "it is LoRA now"
    checked = check_adapter(tmp_path, base_of(model), 64)
    assert checked.rank == 8
    name = {"pissa": "PiSSA", "olora": "OLoRA"}[init]
    assert f"converted from {name} of peft, begun at the base's 16-bit weights" in checked.notes
    without_a_mark(tmp_path)
    with torch.no_grad():
        bare = model(TOKENS).logits
    change = (expected - bare).abs().mean()
    assert change > 0.01
    assert (converted_logits(tmp_path) - expected).abs().mean() < 0.01 * change


def test_the_same_upload_becomes_the_same_version(tmp_path: Path) -> None:
    model, versions = model_of(), set()
    trained(tmp_path / "sent", "pissa")
    for copy in ("a", "b"):
        (tmp_path / copy).mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            (tmp_path / copy / file).write_bytes((tmp_path / "sent" / file).read_bytes())
        convert_residual(tmp_path / copy, base_of(model), weights_of(model), 64)
        versions.add(check_adapter(tmp_path / copy, base_of(model), 64).version)
    assert len(versions) == 1


def test_olora_that_began_in_nf4_is_told_from_one_that_began_in_16_bits(tmp_path: Path) -> None:
    """As peft has it on a base in NF4: A and B of the dequantized weights, the rest quantized again."""
    model, in_nf4 = model_of(), model_of()
    targets = ("q_proj", "v_proj", "down_proj")
    with torch.no_grad():
        for path, layer in in_nf4.named_modules():
            if path.endswith(targets):
                layer.weight.copy_(nf4.dequantize(*nf4.quantize(layer.weight)))
    expected = trained(tmp_path, "olora", base=in_nf4)
    convert_residual(tmp_path, base_of(model), weights_of(model), 64)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["loramux_converted_from"].endswith("the base in NF4")
    without_a_mark(tmp_path)
    served: Any = model_of()
    with torch.no_grad():
        for path, layer in served.named_modules():
            if path.endswith(targets):
                layer.weight.copy_(nf4.dequantize(*nf4.quantize(layer.weight)))
        bare = served(TOKENS).logits
        got = PeftModel.from_pretrained(served, tmp_path).eval()(TOKENS).logits
    assert (got - expected).abs().mean() < 0.01 * (expected - bare).abs().mean()


def test_what_is_beside_a_and_b_is_kept(tmp_path: Path) -> None:
    trained(tmp_path, "pissa", use_dora=True, lora_dropout=0.0)
    before = load_file(tmp_path / WEIGHTS_FILE)
    convert_residual(tmp_path, base_of(model_of()), weights_of(model_of()), 64)
    after = load_file(tmp_path / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    magnitudes = [name for name in before if "magnitude" in name]
    assert magnitudes and all(torch.equal(before[name], after[name]) for name in magnitudes)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa_niter_4", "corda"])
def test_any_other_stays_as_it_is(tmp_path: Path, init: object) -> None:
    write_adapter(tmp_path, TINY_LINEARS, extra_config={"init_lora_weights": init})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    convert_residual(tmp_path, base_of(model_of()), weights_of(model_of()), 64)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def refusal(directory: Path, max_rank: int = 64, base: Any = None, original: Any = None) -> str:
    model = base or model_of()
    before = (directory / WEIGHTS_FILE).read_bytes()
    with pytest.raises(AdapterRejected) as caught:
        convert_residual(directory, base_of(model), original or weights_of(model), max_rank)
    assert (directory / WEIGHTS_FILE).read_bytes() == before
    return "; ".join(caught.value.reasons)


def test_one_that_is_not_of_this_base_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    reason = refusal(tmp_path, base=model_of(seed=5))
    assert "trained on another base" in reason and "path_initial_model_for_weight_conversion" in reason


def test_twice_the_rank_must_be_served(tmp_path: Path) -> None:
    trained(tmp_path, "olora")
    assert "becomes LoRA of rank 8" in refusal(tmp_path, max_rank=4)
    convert_residual(tmp_path, base_of(model_of()), weights_of(model_of()), 8)


def test_weights_that_are_not_finite_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    first = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {first: tensors[first] * float("nan")}, tmp_path / WEIGHTS_FILE)
    assert "not finite" in refusal(tmp_path)
    save_file(tensors | {first: tensors[first][:-1].contiguous()}, tmp_path / WEIGHTS_FILE)
    assert "of other sizes than the base's" in refusal(tmp_path)
    save_file(tensors | {first: tensors[first][:, :-1].contiguous()}, tmp_path / WEIGHTS_FILE)
    assert "but lora_B of rank 3" in refusal(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    assert "in another shape" in refusal(tmp_path, original=lambda path: torch.zeros(2, 2))
    save_file({"other": torch.zeros(1)}, tmp_path / WEIGHTS_FILE)
    assert "holds no LoRA weights" in refusal(tmp_path)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (6, 40)])
def test_the_difference_is_that_of_the_products(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    start = first_columns(weight, 4)
    whole = torch.linalg.qr(weight)
    assert torch.allclose(start.b @ start.a, whole.Q[:, :4] @ whole.R[:4], atol=1e-5)
    now = Start(start.a + 0.01 * torch.randn_like(start.a), start.b + 0.01 * torch.randn_like(start.b))
    a, b = difference(now, start, 2.0, 8)
    assert (a.shape, b.shape) == ((8, shape[1]), (shape[0], 8))
    assert torch.allclose(b @ a, 2.0 * (now.b @ now.a - start.b @ start.a), atol=1e-5)


def test_a_scale_and_a_base_that_give_no_start_are_refused(tmp_path: Path) -> None:
    """And not left to a decomposition that fails."""
    trained(tmp_path, "pissa")
    config = tmp_path / CONFIG_FILE
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"lora_alpha": 1e-300}))
    assert "its scale is 2.5e-301" in refusal(tmp_path)
    config.write_text(json.dumps(fields))
    broken = model_of()
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.weight[0, 0] = float("inf")
    assert "checkpoint has values of" in refusal(tmp_path, base=broken)
