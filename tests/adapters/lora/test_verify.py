from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.artifact.format import WEIGHTS_FILE, digest_of
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected, BaseMismatch
from loramux_adapters.lora.verify import MAX_REASONS, check_adapter
from loramux_adapters.lora.weights import load_host_adapter
from support.adapter_files import TINY_LINEARS, write_adapter

BASE_ID = "ab" * 32
OTHER_ID = "cd" * 32
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
HEAD = torch.arange(96.0 * 64).reshape(96, 64)
BASE = BaseInfo(BASE_ID, TINY_LINEARS, lambda name, tensor: name == "lm_head.weight" and torch.equal(tensor, HEAD))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE)


def reasons_for(directory: Path, max_rank: int = 256) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        check_adapter(directory, BASE, max_rank)
    assert all(str(directory) not in reason for reason in caught.value.reasons)
    return caught.value.reasons


def test_an_adapter_that_fits_is_described(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, rank=4, targets=["q_proj", "lm_head"], rank_pattern={"lm_head": 256})
    checked = check_adapter(tmp_path, BASE, 256)
    assert (checked.rank, checked.target_modules) == (256, ["lm_head", "q_proj"])
    assert (checked.base_id, checked.base_verified) == (None, False)
    assert checked.config.rank == 4


def test_what_was_checked_is_returned_as_the_host_cache_keeps_it(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, rank=5)
    checked = check_adapter(tmp_path, BASE, 256)
    assert checked.version == checked.adapter.version == digest_of(checked.config, tmp_path)
    loaded = load_host_adapter(tmp_path)
    assert checked.adapter.nbytes == loaded.nbytes and checked.adapter.modules.keys() == loaded.modules.keys()
    for module, parts in loaded.modules.items():
        assert all(torch.equal(*both) for both in zip(parts, checked.adapter.modules[module], strict=True)), module


def test_the_weights_are_opened_once_for_their_header_and_once_for_their_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = os.open

    def watched(path: str | Path, *args: int, **kwargs: int) -> int:
        opened.append(Path(path).name)
        return plain(path, *args, **kwargs)

    write_adapter(tmp_path, TINY_LINEARS)
    monkeypatch.setattr(os, "open", watched)
    check_adapter(tmp_path, BASE, 256)
    assert opened.count(WEIGHTS_FILE) == 2


@pytest.mark.parametrize("rank", [1, 3, 256])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_rank_and_dtype_fits(tmp_path: Path, rank: int, dtype: str) -> None:
    write_adapter(tmp_path, TINY_LINEARS, rank=rank, dtype=dtype, targets=["q_proj"])
    assert check_adapter(tmp_path, BASE, 256).rank == rank


def test_the_base_id_is_read_from_the_config_or_the_card(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", TINY_LINEARS, extra_config={"loramux_base_id": BASE_ID})
    assert check_adapter(tmp_path / "a", BASE, 256).base_verified
    write_adapter(tmp_path / "b", TINY_LINEARS)
    (tmp_path / "b" / "card.json").write_text(json.dumps({"loramux_base_id": BASE_ID, "title": "x"}))
    assert check_adapter(tmp_path / "b", BASE, 256).base_verified


def test_another_base_is_refused_with_both_ids_unless_forced(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, extra_config={"loramux_base_id": OTHER_ID})
    with pytest.raises(BaseMismatch) as caught:
        check_adapter(tmp_path, BASE, 256)
    assert (caught.value.adapter_base_id, caught.value.served_base_id) == (OTHER_ID, BASE_ID)
    checked = check_adapter(tmp_path, BASE, 256, force=True)
    assert (checked.base_id, checked.base_verified) == (OTHER_ID, False)


def test_card_and_config_must_not_contradict_each_other(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, extra_config={"loramux_base_id": BASE_ID})
    (tmp_path / "card.json").write_text(json.dumps({"loramux_base_id": OTHER_ID}))
    assert "different bases" in reasons_for(tmp_path)[0]


@pytest.mark.parametrize("name", ["card.json", "fingerprint.json"])
@pytest.mark.parametrize("content", ["[]", "{", '{"a": NaN}', '{"loramux_base_id": 1}'])
def test_a_card_or_fingerprint_is_one_json_object(tmp_path: Path, name: str, content: str) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    (tmp_path / name).write_text(content)
    if name == "fingerprint.json" and "base_id" in content:
        check_adapter(tmp_path, BASE, 256)
    else:
        assert name in reasons_for(tmp_path)[0]


def test_a_module_the_base_does_not_have_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, {**TINY_LINEARS, "model.layers.7.self_attn.q_proj": (64, 64), "norm": (64, 64)})
    found = reasons_for(tmp_path)
    assert len(found) == 2 and "layers.7" in found[0] and "norm" in found[1]


def test_the_shapes_of_the_base_count(tmp_path: Path) -> None:
    write_adapter(tmp_path, {Q: (64, 32), "lm_head": (32, 96)})
    head, query = sorted(reasons_for(tmp_path))
    assert "lm_head" in head and "64 -> 32" in query and "64 -> 64" in query


def test_a_lone_half_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    edit(tmp_path, lambda tensors: tensors.pop(f"{PREFIX}{Q}.lora_B.weight"))
    (reason,) = reasons_for(tmp_path)
    assert Q in reason and "no lora_B" in reason


def test_a_rank_over_the_limit_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, rank_pattern={Q: 16})
    (reason,) = reasons_for(tmp_path, max_rank=8)
    assert Q in reason and "at most 8" in reason


def test_the_config_and_the_weights_must_agree_on_the_rank(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, extra_config={"rank_pattern": {"k_proj": 4}})
    found = reasons_for(tmp_path)
    assert len(found) == 2 and all("k_proj" in reason and "4 in the config" in reason for reason in found)


def test_weights_that_peft_would_ignore_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, targets=["q_proj", "v_proj"], extra_config={"target_modules": ["q_proj"]})
    found = reasons_for(tmp_path)
    assert len(found) == 2 and all("v_proj" in reason and "no target" in reason for reason in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4028e38])
@pytest.mark.parametrize("half", ["A", "B"])
def test_values_that_are_not_finite_on_the_device_are_refused(tmp_path: Path, value: float, half: str) -> None:
    write_adapter(tmp_path, TINY_LINEARS, alpha=8)
    edit(tmp_path, lambda tensors: tensors[f"{PREFIX}{Q}.lora_{half}.weight"].__setitem__((0, 0), value))
    (reason,) = reasons_for(tmp_path)
    assert Q in reason and "finite" in reason


def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, targets=["q_proj"], std_b=1e34, alpha=1e6)
    assert "finite" in reasons_for(tmp_path)[0]


def test_a_copy_of_a_base_weight_is_accepted_only_if_it_is_one(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, targets=["lm_head"])
    edit(tmp_path, lambda tensors: tensors.update({f"{PREFIX}lm_head.base_layer.weight": HEAD.clone()}))
    check_adapter(tmp_path, BASE, 256)
    edit(tmp_path, lambda tensors: tensors[f"{PREFIX}lm_head.base_layer.weight"].add_(1))
    assert "copy of the base" in reasons_for(tmp_path)[0]


def test_a_tensor_that_is_nothing_known_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    edit(tmp_path, lambda tensors: tensors.update({"surprise": torch.ones(1)}))
    assert "'surprise'" in reasons_for(tmp_path)[0]


def test_an_adapter_without_lora_weights_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, {})
    assert "no LoRA weights" in reasons_for(tmp_path)[0]
    save_file({f"{PREFIX}lm_head.base_layer.weight": HEAD}, tmp_path / WEIGHTS_FILE)
    assert "no LoRA weights" in reasons_for(tmp_path)[0]


def test_files_that_are_not_served_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    (tmp_path / "README.md").write_text("harmless")
    check_adapter(tmp_path, BASE, 256)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    found = reasons_for(tmp_path)
    assert any("adapter_model.bin" in reason and "pickle" in reason for reason in found)
    assert any(f"{WEIGHTS_FILE} is missing" in reason for reason in found)


def test_a_tokenizer_that_is_not_the_bases_is_a_reason_among_others(tmp_path: Path) -> None:
    def refuse(directory: Path) -> str | None:
        raise AdapterRejected(["tokenizer.json adds tokens"])

    write_adapter(tmp_path, {})
    with pytest.raises(AdapterRejected) as caught:
        check_adapter(tmp_path, replace(BASE, own_template=refuse), 256)
    assert caught.value.reasons[0] == "tokenizer.json adds tokens"
    assert "no LoRA weights" in caught.value.reasons[1]


def test_a_chat_template_of_its_own_is_part_of_the_version(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    plain = check_adapter(tmp_path, BASE, 256)
    own = check_adapter(tmp_path, replace(BASE, own_template=lambda directory: "{{ messages }}"), 256)
    assert plain.chat_template is None and plain.version == digest_of(plain.config, tmp_path)
    assert own.chat_template == "{{ messages }}" and own.version != plain.version
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert own.version == digest_of(own.config, tmp_path) == load_host_adapter(tmp_path).version


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS_FILE, "card.json"])
def test_links_are_not_followed(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "real", TINY_LINEARS)
    (tmp_path / "real" / "card.json").write_text("{}")
    directory = write_adapter(tmp_path / "upload", TINY_LINEARS)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(tmp_path / "real" / name)
    assert name in reasons_for(directory)[0]


def test_reasons_come_from_both_files_and_are_bounded(tmp_path: Path) -> None:
    write_adapter(tmp_path, {f"no.such.{i}": (4, 4) for i in range(60)}, extra_config={"use_dora": True})
    found = reasons_for(tmp_path)
    assert "use_dora" in found[0] and "no.such" in found[1]
    assert len(found) == MAX_REASONS + 1 and found[-1] == "and 41 more"
