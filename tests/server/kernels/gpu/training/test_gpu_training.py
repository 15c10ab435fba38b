"""Whole models trained on the Triton kernels: gradients beside peft's, runs that stop and go on, what is served."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramux_adapters.device.device import ON_CARD, Device
from loramux_adapters.errors import MemoryShort
from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_adapters.training.data.batches import TokenBatch
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.model.row_layout import PackedRows
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.optimizer import make_optimizer, state_bytes, why_not_8_bit
from loramux_adapters.training.run.plan import plan_memory
from loramux_adapters.training.run.trainer import Trainer
from loramux_server.cli import train, train_run
from loramux_server.cli.frame import call
from loramux_server.kernels.attention.paged_attention import AttentionStep, attend_reference
from support.emulated import EmulatedDevice
from support.fakes_training import Remembering
from support.gpu_steps import SIZES, TinySteps
from support.gpu_training import by_peft, cosine, devices, gradients, plain_products, rows, trained_on
from support.measured_memory import different_rows
from support.stepping import relative_difference
from support.tiny_models import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
RECIPE = Recipe(
    rank=8, alpha=16, batch_size=3, accumulation=2, epochs=4, learning_rate=0.02, seed=3, save_dtype="float32"
)


@pytest.fixture
def on() -> Iterator[Device]:
    """A card, or the emulated one."""
    device = devices()[-1]()
    with device.used():
        yield device


def tiny(device: Device, recipe: Recipe = RECIPE) -> LoraModel:
    return trained_on(device, "Llama", recipe, **SIZES)[0]


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 2", "Phi-3"])
def test_loss_and_every_gradient_are_those_of_peft_in_fp32(family: str) -> None:
    recipe, device = Recipe(rank=4, alpha=8), devices()[0]()
    with device.used():
        model, twin = trained_on(device, family, recipe)
        loss, ours = gradients(model, rows(), device)
    expected, theirs = by_peft(twin, recipe, rows())
    assert loss == pytest.approx(expected, rel=2e-3)
    assert list(ours) == list(theirs)
    worst = min((cosine(ours[name], theirs[name]), name) for name in theirs)
    together = [torch.cat([found[name].flatten() for name in theirs]) for found in (ours, theirs)]
    fp16 = device.activations == torch.float16
    assert worst[0] > (0.9995 if fp16 else 0.99), worst
    assert cosine(together[0], together[1]) > (0.9998 if fp16 else 0.995)


def test_layers_computed_twice_give_the_same_gradients(on: Device) -> None:
    again = dataclasses.replace(RECIPE, gradient_checkpointing=True)
    (one, kept), (other, twice) = (gradients(tiny(on, recipe), rows(), on) for recipe in (RECIPE, again))
    assert one == other
    for name, gradient in kept.items():
        assert torch.equal(gradient, twice[name]), name


def trainer(directory: Path, device: Device, observer: Remembering | None = None, recipe: Recipe = RECIPE) -> Trainer:
    with device.used():
        model = tiny(device, recipe)
    return Trainer(
        model,
        rows(6),
        rows(2, seed=1),
        recipe,
        run_dir=directory,
        data_sha256="d",
        base_id="b",
        observer=observer or Remembering(),
        checkpoint_every=2,
        device=device,
    )


def test_a_run_learns_and_its_adapter_is_served_as_it_was_trained(on: Device, tmp_path: Path) -> None:
    observer = Remembering()
    with pytest.MonkeyPatch.context() as patch:
        plain_products(patch)
        run = trainer(tmp_path / "run", on, observer)
        assert run.run().finished
    first, last = observer.epochs[0].held_loss, observer.epochs[-1].train_loss
    assert first is not None and last is not None and last < 0.7 * first

    model: Any = run._model
    model.save(tmp_path / "adapter", base_name="b", base_id="0" * 64, dtype="float32")
    ids = list(rows()[2].ids)
    with torch.no_grad():
        trained = on.take(logits_in_training(model, ids, on))
    steps = TinySteps(on, samples=24)
    with on.used(), torch.inference_mode():
        steps.slots.load(Slot(0, 8), load_host_adapter(tmp_path / "adapter"))
        base, served = (logits_served(steps, ids, adapter) for adapter in ((), (ScaledSlot(Slot(0, 8)),)))
    assert relative_difference(base, served) > 0.1
    assert relative_difference(trained, served) < 0.004


def logits_in_training(model: Any, ids: list[int], device: Device) -> torch.Tensor:
    body = getattr(model._model, model._model.base_model_prefix)
    states = body(
        input_ids=device.put(torch.tensor([ids])),
        position_ids=device.put(torch.arange(len(ids))[None]),
        use_cache=False,
        loramux_rows=PackedRows(0, (len(ids),)),
        loramux_ops=model._ops,
    ).last_hidden_state[0]
    logits: torch.Tensor = model._head.head.product(states)
    return logits


def logits_served(steps: TinySteps, ids: list[int], adapter: tuple[ScaledSlot, ...]) -> torch.Tensor:
    none = torch.zeros(0, dtype=torch.int32)
    step = AttentionStep(steps.cache, attend_reference, steps.tables[:1], none, none, ((0, 0, len(ids), 0),))
    lora = LoraRows.build([(adapter, len(ids))])
    return steps.device.take(steps.decoder.forward(ids, list(range(len(ids))), step, lora, lora)).clone()


def test_the_train_command_trains_on_the_kernels_of_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_products(monkeypatch)
    device = EmulatedDevice(kernels="triton")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "configure_logging", lambda level: None)  # it takes pytest's own handlers away
    monkeypatch.setattr(train, "_finish", lambda config, run, *, skip_bad: 0)
    monkeypatch.setattr(train_run, "device_of", lambda wanted, note: device)
    lines = [json.dumps({"prompt": f"free {n}", "completion": "ham spam".split()[n % 2]}) for n in range(6)]
    Path("data.jsonl").write_text("\n".join(lines))
    base = str(save_tiny_model(tmp_path / "base"))
    asked = ["--data", "data.jsonl", "--name", "a", "--base", base, "--cache-dir", "cache", "--batch-size", "3"]

    assert call(train.app, "loramux train", [*asked, "--rank", "4", "--gradient-checkpointing"], {}) == 0

    (card,) = tmp_path.rglob("card.json")
    assert json.loads(card.read_text())["training"]["device"] == "emulated device"
    assert "MiB in NF4" in capsys.readouterr().out
    assert sum(name == "_Plain" for _, name in device.started) >= 80


def test_a_run_that_has_no_room_says_what_to_lower_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_products(monkeypatch)
    whole, cut = Remembering(), Remembering()
    trainer(tmp_path / "whole", EmulatedDevice(), whole).run()

    small = EmulatedDevice()
    run = trainer(tmp_path / "cut", small, cut)

    def full(record: Any) -> None:
        if record.step == 3:
            small.refuses = range(small.allocations + 5, small.allocations + 1000)

    cut._after_step = full
    with pytest.raises(MemoryShort, match=r"step 4 does not fit into memory: raise accumulation .now 2., turn grad"):
        run.run()
    outcome = trainer(tmp_path / "cut", EmulatedDevice(early=0.3), cut).run()
    assert cut.plans[-1].first == 2 and outcome.finished
    assert [record.loss for record in cut.steps[3:]] == [record.loss for record in whole.steps[2:]]


def test_a_step_that_is_too_large_for_the_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_products(monkeypatch)
    device = EmulatedDevice()
    run = trainer(tmp_path, device)
    device._total = device.memory().held + 60_000
    with pytest.raises(MemoryShort, match="step 1 does not fit into memory"):
        run.run()


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed twice"])
def test_a_step_takes_what_was_planned_or_up_to_a_sixth_less(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_products(monkeypatch)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
    recipe = Recipe(rank=16, batch_size=2, gradient_checkpointing=again)
    device = EmulatedDevice(total=1 << 34)
    with device.used():
        model, twin = trained_on(device, "Llama", recipe, **sizes)
        optimizer = make_optimizer(model.trainable, recipe, device)
        batch = different_rows(2, 64, learned=16, vocabulary=2048)
        for _ in range(2):
            device.restart_peak()
            model.loss(batch, grad_scale=1.0)
            optimizer.step()
            optimizer.zero_grad()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(twin.config)
    planned = plan_memory(skeleton, recipe, sequence=64, learned=16, layout=ON_CARD, fp16=True)
    held = {value.data_ptr(): value.nbytes for state in optimizer.state.values() for value in tensors_of(state)}
    assert planned.optimizer == state_bytes(model.trainable, device) == pytest.approx(sum(held.values()), rel=0.01)
    assert 0.84 <= device.memory().peak / (planned.total - planned.context) <= 1


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Those that an optimizer keeps of one parameter; it shares some among all."""
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


def test_moments_are_kept_in_fp32_where_the_8_bit_optimizer_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    device, parameters = EmulatedDevice(), {"a": torch.nn.Parameter(torch.zeros(8192))}
    assert why_not_8_bit(device) == ""
    assert type(make_optimizer(parameters, RECIPE, device)).__name__ == "AdamW8bit"

    def refuse(*args: Any, **options: Any) -> None:
        raise NotImplementedError("no kernel image is available")

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", refuse)
    assert "no kernel image" in why_not_8_bit(device)
    assert type(make_optimizer(parameters, RECIPE, device)) is torch.optim.AdamW
    assert state_bytes(parameters, device) == 8 * 8192


def test_8_bits_that_give_other_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", lambda self: None)
    assert "off by 100%" in why_not_8_bit(EmulatedDevice())


def test_evaluation_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_products(monkeypatch)
    device = EmulatedDevice()
    with device.used():
        model = tiny(device)
        loss = model.loss(TokenBatch.of(rows()), grad_scale=1.0).loss_sum
        held = device.memory().held
        assert model.evaluate(TokenBatch.of(rows())).loss_sum == pytest.approx(loss, rel=1e-6)
        assert device.memory().held == held
