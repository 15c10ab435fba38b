from __future__ import annotations

import builtins
import dataclasses
import importlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from loramux_adapters.artifact.config import MAX_CONFIG_BYTES, parse_config, rank_of, scale_of
from loramux_adapters.errors import AdapterRejected
from support.adapter_files import MINIMAL_CONFIG, config_bytes


def reasons_for(raw: bytes) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        parse_config(raw)
    return caught.value.reasons


def test_a_config_as_peft_writes_it_is_read() -> None:
    written: Any = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["v_proj", "q_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\..*": 3},
        use_rslora=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path="some/base",
    )
    config = parse_config(json.dumps(written.to_dict(), default=list).encode())
    assert (config.rank, config.alpha, config.use_rslora) == (4, 12.0, True)
    assert config.target_modules == ("q_proj", "v_proj")
    assert dict(config.rank_pattern) == {"q_proj": 2}
    assert config.base_model_name == "some/base" and config.base_id is None
    assert rank_of(config, "model.layers.0.self_attn.q_proj") == 2
    assert rank_of(config, "model.layers.0.self_attn.v_proj") == 4
    assert scale_of(config, "model.layers.1.self_attn.v_proj", 4) == 3 / math.sqrt(4)


def test_the_scale_is_alpha_over_rank_without_rslora() -> None:
    assert scale_of(parse_config(config_bytes()), "model.layers.0.self_attn.q_proj", 8) == 2.0


def test_every_field_of_peft_is_read_ignored_or_refused_by_name() -> None:
    for field in dataclasses.fields(LoraConfig):
        if field.name in MINIMAL_CONFIG or field.name == "lora_dropout":
            continue
        raw = config_bytes(**{field.name: {"x": 1}})
        try:
            parse_config(raw)
        except AdapterRejected as error:
            assert any(field.name in reason for reason in error.reasons), field.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", "yes"),
        ("modules_to_save", "embed_tokens"),
        ("modules_to_save", [1]),
        ("bias", "some"),
        ("bias", ["all"]),
        ("lora_bias", 1),
        ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [True]),
        ("trainable_token_indices", 7),
        ("trainable_token_indices", {"embed_tokens": []} | {"lm_head": [1.5]}),
        ("ensure_weight_tying", "yes"),
        ("target_parameters", ["x.weight"]),
        ("layer_replication", [[0, 2]]),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 1}),
        ("megatron_config", {"x": 1}),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("task_type", "TOKEN_CLS"),
        ("task_type", "FEATURE_EXTRACTION"),
        ("task_type", "no_such"),
        ("task_type", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", "no_such"),
        ("init_lora_weights", 1),
        ("some_future_option", 1),
        ("some_future_option", True),
        ("some_future_option", "x"),
        ("some_future_option", {"x": None}),
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", 8.0),
        ("r", "8"),
        ("r", None),
        ("r", 10**9),
        ("lora_alpha", 0),
        ("lora_alpha", -1),
        ("lora_alpha", False),
        ("lora_alpha", 1e30),
        ("lora_alpha", None),
        ("use_rslora", "yes"),
        ("rank_pattern", []),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"(?i)q": 8}),
        ("alpha_pattern", {"q_proj": 0}),
        ("target_modules", "(?i)x"),
        ("target_modules", "a" * 9000),
        ("target_modules", [1]),
        ("target_modules", {}),
        ("exclude_modules", "(?i)x"),
        ("exclude_modules", [1]),
        ("layers_to_transform", "x"),
        ("layers_to_transform", [True]),
        ("layers_pattern", ["la.*yers"]),
        ("base_model_name_or_path", 3),
        ("loramux_base_id", "abc"),
        ("loramux_base_id", 3),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(name: str, value: object) -> None:
    (reason,) = reasons_for(config_bytes(**{name: value}))
    assert name in reason


def test_an_unknown_key_that_says_nothing_is_accepted_with_a_note() -> None:
    (note,) = parse_config(config_bytes(a=None, b=False, c="", d=[], e={}, f=0)).notes
    assert note.endswith("off or empty: a, b, c, d, e, f")
    (note,) = parse_config(config_bytes(**{f"k{n}": None for n in range(1000)})).notes
    assert "k0, " in note and note.endswith(" and 992 more")


def test_an_unknown_key_is_refused_with_its_value() -> None:
    assert reasons_for(config_bytes(new_trick={"beta": 0.5})) == [
        'new_trick is {"beta": 0.5}, and is not known here: it could change the result'
    ]
    assert reasons_for(config_bytes(use_qalora=True)) == ["use_qalora is true, which is not served"]


def test_the_defaults_of_peft_are_accepted_without_a_note() -> None:
    written: Any = LoraConfig(target_modules=["q_proj"])
    assert parse_config(json.dumps(written.to_dict(), default=list).encode()).notes == ()


def test_every_field_of_this_peft_is_known() -> None:
    """A new release may add one: then `artifact/config.py` reads it, or lists it by what it does."""
    for field in dataclasses.fields(LoraConfig):
        assert (
            parse_config(config_bytes(**({field.name: None} if field.name not in MINIMAL_CONFIG else {}))).notes == ()
        )


def test_fields_that_old_releases_of_peft_wrote_are_accepted() -> None:
    assert parse_config(config_bytes(enable_lora=None, merge_weights=False, lora_dropout=0.1)).notes == ()
    assert "enable_lora" in reasons_for(config_bytes(enable_lora=[True, False]))[0]


def test_a_decoder_that_was_trained_as_another_task_is_accepted_with_a_note() -> None:
    assert "SEQ_2_SEQ_LM" in parse_config(config_bytes(task_type="SEQ_2_SEQ_LM")).notes[0]
    for task in ("CAUSAL_LM", None):
        assert parse_config(config_bytes(task_type=task)).notes == ()


def test_modules_to_save_are_read() -> None:
    assert parse_config(config_bytes(modules_to_save=["lm_head", "embed_tokens"])).modules_to_save == (
        "embed_tokens",
        "lm_head",
    )
    assert parse_config(config_bytes(modules_to_save=[])).modules_to_save == ()


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_is_accepted(init: object) -> None:
    parse_config(config_bytes(init_lora_weights=init))


def test_all_reasons_are_given_at_once() -> None:
    found = reasons_for(config_bytes(use_qalora=True, bias="some", r=0, modules_to_save=[""]))
    assert [reason.split()[0] for reason in found] == ["use_qalora", "r", "bias", "modules_to_save"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe{\x00}\x00",
        b'{"r": "\xff"}',
        b"\xef\xbb\xbf{}",
        b'{"r": 8, "r": 9}',
        b'{"base_model_name_or_path": "\\ud83d"}',
        b'{"x": {"a": 1, "a": 2}}',
        b'{"lora_alpha": NaN}',
        b'{"lora_alpha": -Infinity}',
        b'{"lora_alpha": 1e999}',
        b'{"r": ' + b"9" * 5000 + b"}",
        b'{"auto_mapping": ' + b"[" * 20 + b"]" * 20 + b"}",
        b'{"auto_mapping": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"auto_mapping": ' + b'{"a":' * 100_000,
        b"{}" + b" " * MAX_CONFIG_BYTES,
        b"{} {}",
    ],
)
def test_what_is_not_one_plain_json_object_is_refused(raw: bytes) -> None:
    (reason,) = reasons_for(raw)
    assert reason.startswith("adapter_config.json ")


def test_a_whole_surrogate_pair_is_text() -> None:
    assert parse_config(config_bytes(base_model_name_or_path="\U0001f600")).base_model_name == "\U0001f600"


def test_reasons_do_not_carry_control_characters_or_long_text() -> None:
    for reason in reasons_for(config_bytes(**{"\x1b[31m\n" + "x" * 10_000: 1})):
        assert reason.isprintable() and len(reason) < 300


def test_nothing_a_config_names_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real_import, real_import_module = builtins.__import__, importlib.import_module

    def spy(name: str, *args: Any, **kwargs: Any) -> Any:
        imported.append(name)
        return real_import(name, *args, **kwargs)

    def spy_module(name: str, package: str | None = None) -> Any:
        imported.append(name)
        return real_import_module(name, package)

    raw = config_bytes(
        auto_mapping={"base_model_class": "x", "parent_library": "evil_library"},
        megatron_core="evil_core",
        peft_version="evil_version",
        revision="evil_revision",
        base_model_name_or_path="evil/base",
        runtime_config={"module": "evil_runtime"},
    )
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", spy)
        patch.setattr(importlib, "import_module", spy_module)
        parse_config(raw)
        for name in ("tokenizer_kwargs", "auto_map", "_attn_implementation_internal"):
            with pytest.raises(AdapterRejected):
                parse_config(config_bytes(**{name: "evil"}))
    assert not [name for name in imported if "evil" in name]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELD_NAMES = st.sampled_from([field.name for field in dataclasses.fields(LoraConfig)] + ["loramux_base_id", "zzz"])


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(FIELD_NAMES, JSON_VALUES, max_size=5))
def test_any_values_are_read_or_refused(fields: dict[str, object]) -> None:
    try:
        config = parse_config(config_bytes(**fields))
    except AdapterRejected as error:
        assert error.reasons
    else:
        assert config.rank >= 1 and math.isfinite(config.alpha) and config.alpha > 0


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=60) | st.text(alphabet='{}[]",:0e-.+ntrue\\u', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with pytest.raises(AdapterRejected):
        parse_config(raw)
