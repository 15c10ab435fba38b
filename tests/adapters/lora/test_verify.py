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
from loramux_adapters.artifact.own_tokens import OwnToken, OwnTokens
from loramux_adapters.base_info import AdapterText, BaseInfo
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
    assert not any("is missing" in reason for reason in found)


def test_a_tokenizer_that_is_not_the_bases_is_a_reason_among_others(tmp_path: Path) -> None:
    def refuse(directory: Path) -> AdapterText:
        raise AdapterRejected(["tokenizer.json adds tokens"])

    write_adapter(tmp_path, {})
    with pytest.raises(AdapterRejected) as caught:
        check_adapter(tmp_path, replace(BASE, own_text=refuse), 256)
    assert caught.value.reasons[0] == "tokenizer.json adds tokens"
    assert "no LoRA weights" in caught.value.reasons[1]


def test_a_chat_template_of_its_own_is_part_of_the_version(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    plain = check_adapter(tmp_path, BASE, 256)
    own = check_adapter(tmp_path, replace(BASE, own_text=lambda directory: AdapterText("{{ messages }}")), 256)
    assert plain.chat_template is None and plain.version == digest_of(plain.config, tmp_path)
    assert own.chat_template == "{{ messages }}" and own.version != plain.version
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert own.version == digest_of(own.config, tmp_path) == load_host_adapter(tmp_path).version


def test_own_tokens_are_refused_where_nothing_of_the_vocabulary_is_served(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    own = AdapterText(None, OwnTokens((OwnToken(320, "<new>"),)))
    with pytest.raises(AdapterRejected, match="adds tokens to the base's, and nothing is known here"):
        check_adapter(tmp_path, replace(BASE, own_text=lambda directory: own), 256)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS_FILE, "card.json"])
def test_links_are_not_followed(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "real", TINY_LINEARS)
    (tmp_path / "real" / "card.json").write_text("{}")
    directory = write_adapter(tmp_path / "upload", TINY_LINEARS)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(tmp_path / "real" / name)
    assert name in reasons_for(directory)[0]


def test_reasons_come_from_both_files_and_are_bounded(tmp_path: Path) -> None:
    write_adapter(tmp_path, {f"no.such.{i}": (4, 4) for i in range(60)}, extra_config={"fan_in_fan_out": True})
    found = reasons_for(tmp_path)
    assert "fan_in_fan_out" in found[0] and "no.such" in found[1]
    assert len(found) == MAX_REASONS + 1 and found[-1] == "and 41 more"


def notes_of(directory: Path) -> list[str]:
    return check_adapter(directory, BASE, 256).notes


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def test_an_ordinary_adapter_has_no_notes_and_reaches_all_layers(tmp_path: Path) -> None:
    checked = check_adapter(write_adapter(tmp_path, TINY_LINEARS), BASE, 256)
    assert checked.notes == [] and checked.layers == (2, 2)


def test_the_name_of_an_adapter_in_its_tensors_makes_no_difference(tmp_path: Path) -> None:
    write_adapter(tmp_path / "plain", TINY_LINEARS, targets=["q_proj"])
    write_adapter(tmp_path / "named", TINY_LINEARS, targets=["q_proj"])
    edit(tmp_path / "named", rename(".weight", ".pirate.weight"))
    plain, named = (check_adapter(tmp_path / name, BASE, 256) for name in ("plain", "named"))
    assert named.version == plain.version and named.notes == []


def test_several_adapters_in_one_file_are_refused_by_their_names(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, targets=["q_proj", "k_proj"])
    edit(tmp_path, rename("q_proj.lora_A.weight", "q_proj.lora_A.pirate.weight"))
    assert reasons_for(tmp_path) == ["the tensors are of 2 adapters, 'default', 'pirate': send each of them alone"]


@pytest.mark.parametrize(
    ("old", "new", "tool"),
    [
        (".lora_A.weight", ".lora_down.weight", "Kohya"),
        (".lora_B.weight", ".lora.up.weight", "diffusers"),
        (".lora_A.weight", ".lora_a", "mlx-lm"),
    ],
)
def test_names_of_other_tools_are_one_reason_with_what_helps(tmp_path: Path, old: str, new: str, tool: str) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    edit(tmp_path, rename(old, new))
    (reason,) = reasons_for(tmp_path)
    assert "15 tensors, " in reason and tool in reason


def test_f64_is_rounded_once_with_a_note(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS, targets=["q_proj"])
    single = check_adapter(tmp_path, BASE, 256)
    edit(tmp_path, lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()}))
    double = check_adapter(tmp_path, BASE, 256)
    assert single.notes == [] and "F64" in double.notes[0]
    for module, parts in double.adapter.modules.items():
        assert all(map(torch.equal, parts, single.adapter.modules[module]))
    assert load_host_adapter(tmp_path).version == double.version


@pytest.mark.parametrize("value", [1e300, -1e39, float("inf"), float("nan")])
@pytest.mark.parametrize("half", ["A", "B"])
def test_f64_beyond_the_range_of_what_is_served_is_refused(tmp_path: Path, value: float, half: str) -> None:
    write_adapter(tmp_path, TINY_LINEARS, targets=["q_proj"])

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})
        tensors[f"{PREFIX}{Q}.lora_{half}.weight"][0, 0] = value

    edit(tmp_path, widen)
    assert reasons_for(tmp_path) == [f"module '{Q}' has values that are not finite in bf16"]


def test_a_module_to_save_without_weights_is_noted_and_one_with_weights_is_refused_by_its_option(
    tmp_path: Path,
) -> None:
    write_adapter(tmp_path, TINY_LINEARS, extra_config={"modules_to_save": ["embed_tokens", "lm_head"]})
    (note,) = notes_of(tmp_path)
    assert "modules_to_save names embed_tokens, lm_head, but" in note
    edit(tmp_path, lambda tensors: tensors.update({f"{PREFIX}lm_head.base_layer.weight": HEAD}))
    (note,) = notes_of(tmp_path)
    assert "modules_to_save names embed_tokens, but" in note
    edit(tmp_path, lambda tensors: tensors.update({f"{PREFIX}model.embed_tokens.weight": HEAD}))
    (reason,) = reasons_for(tmp_path)
    assert "embed_tokens.weight' is a fully trained module (modules_to_save)" in reason


def test_a_pickle_beside_the_weights_is_left_out_with_a_note(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    assert notes_of(tmp_path) == [
        "adapter_model.bin is left out: pickles are never read, and adapter_model.safetensors is there"
    ]


def test_a_pickle_or_a_gguf_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    (reason,) = reasons_for(tmp_path)
    assert "weights_only=True" in reason and "'adapter_model.safetensors'" in reason
    (tmp_path / "adapter_model.bin").rename(tmp_path / "pirate-f16.gguf")
    assert reasons_for(tmp_path) == [
        "'pirate-f16.gguf' is a GGUF file: send the PEFT directory that it was converted from, or bring it into "
        "that form with `loramux adapters convert`"
    ]


@pytest.mark.parametrize("half", ["A", "B"])
def test_modules_that_change_nothing_are_counted(tmp_path: Path, half: str) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    edit(tmp_path, lambda tensors: tensors[f"{PREFIX}{Q}.lora_{half}.weight"].zero_())
    assert notes_of(tmp_path) == ["1 of 15 modules change nothing: their lora_A or lora_B is all zeros"]


def test_an_adapter_that_changes_nothing_says_so(tmp_path: Path) -> None:
    assert notes_of(write_adapter(tmp_path, TINY_LINEARS, std_b=0)) == [
        "every product of lora_B and lora_A is zero: the adapter changes nothing"
    ]


def test_layers_without_weights_are_counted_and_noted(tmp_path: Path) -> None:
    half = {module: sizes for module, sizes in TINY_LINEARS.items() if ".1." not in module}
    checked = check_adapter(write_adapter(tmp_path, half), BASE, 256)
    assert checked.layers == (1, 2)
    assert checked.notes == ["1 of 2 layers carry weights: the config leaves none out, but there are none for layer 1"]


def test_notes_are_bounded(tmp_path: Path) -> None:
    linears = {f"model.layers.{layer}.m{name}": (8, 8) for layer in range(40) for name in range(40)}
    some = {module: sizes for module, sizes in linears.items() if hash(module) % 2}
    checked = check_adapter(write_adapter(tmp_path, some, rank=1), BaseInfo(BASE_ID, linears), 256)
    assert 5 < len(checked.notes) <= MAX_REASONS + 1 and all(len(note) < 300 for note in checked.notes)
