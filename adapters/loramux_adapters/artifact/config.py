"""adapter_config.json -> AdapterConfig. The text is hostile: nothing in it is imported, evaluated or trusted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loramux_adapters.artifact.pattern_table import PatternTable
from loramux_adapters.artifact.patterns import Budget, Pattern, PatternRefused
from loramux_adapters.artifact.reading.strict_json import (
    StrictJSONError,
    is_empty,
    is_int,
    is_number,
    parse_object,
    quoted,
)
from loramux_adapters.artifact.targets import ALL_LINEAR, Names, TargetRule
from loramux_adapters.errors import AdapterRejected

CONFIG_FILE = "adapter_config.json"
BASE_ID_KEY = "loramux_base_id"
CONVERTED_KEY = "loramux_converted_from"  # what a converted adapter was, in words
SOURCE_KEY = "loramux_source"  # where it was fetched from, in words
MAX_CONFIG_BYTES = 2**20
MAX_ALPHA = 1e6
MAX_RANK = 65_536
MAX_NAMES = 4096
MAX_LAYER_LISTS = 16
MAX_TRAINED_TOKENS = 65536
MAX_NAME_LENGTH = 1024
_SHOWN = 8  # names in a message

# Read below, each with its own check.
_READ = frozenset(
    "peft_type task_type r lora_alpha use_rslora rank_pattern alpha_pattern bias init_lora_weights target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save base_model_name_or_path use_dora "
    "lora_bias trainable_token_indices ensure_weight_tying".split()
) | {BASE_ID_KEY, CONVERTED_KEY, SOURCE_KEY}
# Fields that matter in training only, or say nothing about the weights. Their values are never looked at.
_INFORMATIONAL = frozenset(
    "auto_mapping revision peft_version inference_mode lora_dropout loftq_config eva_config corda_config "
    "lora_ga_config runtime_config ephemeral_gpu_offload megatron_core qalora_group_size "
    "merge_weights _name_or_path transformers_version".split()
)
# Options of PEFT, of whichever release, that are off while they are empty, and not served otherwise.
_OFF_WHILE_EMPTY = frozenset(
    "fan_in_fan_out megatron_config velora_config alora_invocation_tokens use_qalora "
    "monteclora_config layer_replication target_parameters use_bdlora arrow_config kasa_config "
    "enable_lora".split()
)
# Any other key is accepted, with a note, while its value says nothing by itself: null, false, zero or empty.
_TASKS: Mapping[str, str | None] = {
    "": None,
    "CAUSAL_LM": None,
    "SEQ_2_SEQ_LM": "task_type is SEQ_2_SEQ_LM, but the weights are a decoder's: they are served as CAUSAL_LM",
}
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# The others change the base weights, or the maths.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "lora_fa")
# They take the first A and B out of the base's weights, so the file is a difference to a base that nobody serves.
_RESIDUAL_INITS = re.compile("pissa(_niter_[0-9]+)?|olora|corda|lora_ga|loftq")
HOW_TO_CONVERT = (
    "which was trained on a base without its first A and B: have peft write it as a difference to the base itself, "
    "model.save_pretrained(directory, path_initial_model_for_weight_conversion=...) with the adapter as it was before "
    "training"
)
_LOFTQ_ONCE = {"loftq_bits": 4, "loftq_iter": 1}  # then that base is the weights in NF4, as they are served
_CONVERTED = ("ADALORA", "VERA", "IA3")  # artifact/other_kinds.py
_BIASES = {None: False, "none": False, "all": True, "lora_only": True}
_BASE_ID = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class AdapterConfig:
    """What the serving path reads of a PEFT config.

    Attributes:
        rank, alpha: where no pattern says otherwise.
        use_dora: every module has a magnitude, by which its changed weight's columns are scaled.
        lora_bias: every lora_B has a bias.
        trains_biases: biases of the base were trained, and replace its own.
        rank_pattern, alpha_pattern: exceptions by module pattern.
        target_modules: as written: names, a pattern or "all-linear", or None.
        rule: `target_modules` and its companions, ready to be asked.
        base_model_name: as written; a label for people.
        base_id: of the base it was made for, hex; None if it does not say.
        modules_to_save: modules that were trained as a whole, if any; their weights would be in the file.
        trained_tokens: name of a module -> the tokens whose rows were trained, in the order of the file; "" is the
            input embedding.
        ties_weights: what was trained of an embedding holds for an output head that shares its weight.
        notes: what was accepted and is worth a word.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    trains_biases: bool = False
    rank_pattern: PatternTable[int] = field(default_factory=lambda: PatternTable({}))
    alpha_pattern: PatternTable[float] = field(default_factory=lambda: PatternTable({}))
    target_modules: tuple[str, ...] | str | None = None
    rule: TargetRule = field(default_factory=lambda: TargetRule(None))
    base_model_name: str | None = None
    base_id: str | None = None
    modules_to_save: tuple[str, ...] = ()
    trained_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ties_weights: bool = False
    notes: tuple[str, ...] = ()


def parse_config(raw: bytes) -> AdapterConfig:
    """Parse and check the bytes of adapter_config.json; raises `AdapterRejected` with every reason found."""
    try:
        fields = parse_object(raw, limit=MAX_CONFIG_BYTES)
    except StrictJSONError as error:
        raise AdapterRejected([f"{CONFIG_FILE} {error}"]) from error
    return _ConfigReader(fields).read()


def rank_of(config: AdapterConfig, module: str) -> int:
    """The rank that the config states for the module at this path."""
    return config.rank_pattern.match(module, config.rank)


def scale_of(config: AdapterConfig, module: str, rank: int) -> float:
    """The factor on B A for the module at this path: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    alpha = config.alpha_pattern.match(module, config.alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def trained_tokens_of(config: AdapterConfig, module: str) -> tuple[int, ...]:
    """The tokens whose rows were trained in the module at this path, in the order of the file."""
    for name, tokens in config.trained_tokens.items():
        if name and (module == name or module.endswith(f".{name}")):
            return tokens
    return config.trained_tokens.get("", ())


def check_base_id(value: object) -> str | None:
    """A base id as a config or a card carries it; raises ValueError if it is not one."""
    if value is None or (isinstance(value, str) and _BASE_ID.fullmatch(value)):
        return value
    raise ValueError("is not a sha256 in lower-case hex")


N = TypeVar("N", int, float)


class _ConfigReader:
    """Reads the fields one by one and collects what is wrong with them."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields
        self._reasons: list[str] = []
        self._notes: list[str] = []
        self._budget = Budget()

    def read(self) -> AdapterConfig:
        self._check_kind()
        self._check_unread()
        source = self._text(SOURCE_KEY)
        if source:
            self._notes.append(f"fetched from {quoted(source, 160)[1:-1]}")
        converted_from = self._text(CONVERTED_KEY)
        if converted_from:
            self._notes.append(f"converted from {quoted(converted_from, 160)[1:-1]}")
        config = AdapterConfig(
            rank=self._rank("r", self._fields.get("r")),
            alpha=self._alpha("lora_alpha", self._fields.get("lora_alpha")),
            use_rslora=self._flag("use_rslora"),
            use_dora=self._flag("use_dora"),
            lora_bias=self._flag("lora_bias"),
            trains_biases=self._trains_biases(),
            rank_pattern=self._table("rank_pattern", self._rank),
            alpha_pattern=self._table("alpha_pattern", self._alpha),
            target_modules=self._target_modules(),
            rule=self._rule(),
            base_model_name=self._text("base_model_name_or_path"),
            base_id=self._base_id(),
            modules_to_save=self._modules_to_save(),
            trained_tokens=self._trained_tokens(),
            ties_weights=self._flag("ensure_weight_tying"),
            notes=tuple(self._notes),
        )
        if self._reasons:
            raise AdapterRejected(list(dict.fromkeys(self._reasons)))
        return config

    def _refuse(self, name: str, why: str) -> None:
        self._reasons.append(f"{name} {why}")

    def _check_kind(self) -> None:
        peft_type = self._fields.get("peft_type")
        if peft_type is None and "lora_parameters" in self._fields:
            self._refuse("peft_type", "is missing; this is a config of mlx-lm, which an upload converts")
        elif peft_type in _CONVERTED:
            self._refuse("peft_type", f"is {peft_type}, which a server converts when it is uploaded: push it to one")
        elif peft_type != "LORA":
            self._refuse("peft_type", "is not LORA")
        self._check_task()
        if self._fields.get("use_dora") is True and self._fields.get("lora_bias") is True:
            self._refuse("lora_bias", "is true beside use_dora, which peft does not compute either")
        init = self._fields.get("init_lora_weights")
        if isinstance(init, str):
            init = init.lower()
        if init == "loftq" and self._fields.get("loftq_config") == _LOFTQ_ONCE:
            self._notes.append(
                "its A and B began with what NF4 loses of the base (LoftQ), and the base is served in NF4"
            )
        elif not any(init is plain or (isinstance(init, str) and init == plain) for plain in _PLAIN_INITS):
            known = isinstance(init, str) and _RESIDUAL_INITS.fullmatch(init) is not None
            why = HOW_TO_CONVERT if known else "which changes the base or is not known"
            self._refuse("init_lora_weights", f"is {quoted(str(init), 40)}, {why}")

    def _trains_biases(self) -> bool:
        value = self._fields.get("bias")
        if value is None or (isinstance(value, str) and value in _BIASES):
            return _BIASES[value]
        self._refuse("bias", 'is none of "none", "all" and "lora_only"')
        return False

    def _check_task(self) -> None:
        task = self._fields.get("task_type")
        if task is None:
            return
        if not isinstance(task, str):
            self._refuse("task_type", "is neither a text nor null")
        elif task in _TASKS:
            self._notes += [note for note in (_TASKS[task],) if note]
        elif task in _HEADS:
            self._refuse("task_type", f"is {task}: it was trained for an output of its own, which is no text")
        else:
            self._refuse("task_type", f"is {quoted(task, 40)}: only adapters that generate text are served (CAUSAL_LM)")

    def _check_unread(self) -> None:
        said_nothing = []
        for name, value in self._fields.items():
            if name in _READ or name in _INFORMATIONAL or (name in _OFF_WHILE_EMPTY and is_empty(value)):
                continue
            shown = quoted(json.dumps(value), 60)[1:-1]
            if name in _OFF_WHILE_EMPTY:
                self._refuse(name, f"is {shown}, which is not served")
            elif is_empty(value):
                said_nothing.append(quoted(name, 40)[1:-1])
            else:
                self._refuse(quoted(name)[1:-1], f"is {shown}, and is not known here: it could change the result")
        if said_nothing:
            more = f" and {len(said_nothing) - _SHOWN} more" if len(said_nothing) > _SHOWN else ""
            names = ", ".join(said_nothing[:_SHOWN])
            self._notes.append(f"the config has options that are not known here, and off or empty: {names}{more}")

    def _modules_to_save(self) -> tuple[str, ...]:
        if is_empty(self._fields.get("modules_to_save")):
            return ()
        return tuple(sorted(self._names("modules_to_save")))

    def _trained_tokens(self) -> dict[str, tuple[int, ...]]:
        value = self._fields.get("trainable_token_indices")
        if is_empty(value):
            return {}
        named = value if isinstance(value, dict) else {"": value}
        found: dict[str, tuple[int, ...]] = {}
        for name, tokens in named.items():
            ids: list[Any] = tokens if isinstance(tokens, list) and len(named) <= MAX_NAMES else []
            if not 0 < len(ids) <= MAX_TRAINED_TOKENS or not all(is_int(token) and token >= 0 for token in ids):
                self._refuse(
                    "trainable_token_indices", f"is no list of up to {MAX_TRAINED_TOKENS} token ids, or none by module"
                )
            elif len(set(ids)) < len(ids):
                self._refuse("trainable_token_indices", "names a token twice")
            else:
                found[name] = tuple(ids)
        return found

    def _flag(self, name: str) -> bool:
        value = self._fields.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        self._refuse(name, "is neither true nor false")
        return False

    def _text(self, name: str) -> str | None:
        value = self._fields.get(name)
        if value is None or (isinstance(value, str) and len(value) <= MAX_NAME_LENGTH):
            return value
        self._refuse(name, f"is not a text of at most {MAX_NAME_LENGTH} characters")
        return None

    def _base_id(self) -> str | None:
        try:
            return check_base_id(self._fields.get(BASE_ID_KEY))
        except ValueError as error:
            self._refuse(BASE_ID_KEY, str(error))
            return None

    def _rank(self, name: str, value: object) -> int:
        if isinstance(value, int) and is_int(value) and 1 <= value <= MAX_RANK:
            return value
        self._refuse(name, f"is not an integer from 1 to {MAX_RANK}")
        return 1

    def _alpha(self, name: str, value: object) -> float:
        if isinstance(value, int | float) and is_number(value) and 0 < value <= MAX_ALPHA:
            return float(value)
        self._refuse(name, f"is not a number above 0 and up to {MAX_ALPHA:.0f}")
        return 1.0

    def _table(self, name: str, read: Callable[[str, object], N]) -> PatternTable[N]:
        value = self._fields.get(name)
        empty: PatternTable[N] = PatternTable({})
        if value is None:
            return empty
        if not isinstance(value, dict) or len(value) > MAX_NAMES:
            self._refuse(name, f"is not an object of at most {MAX_NAMES} patterns")
            return empty
        try:
            entries = {key: read(f"{name} of {quoted(key)}", entry) for key, entry in value.items()}
            return PatternTable(entries, self._budget, name=name)
        except PatternRefused as error:
            self._refuse(name, str(error))
            return empty

    def _target_modules(self) -> tuple[str, ...] | str | None:
        value = self._fields.get("target_modules")
        if value is None or isinstance(value, str):
            return value
        return tuple(sorted(self._names("target_modules")))

    def _names(self, name: str) -> frozenset[str]:
        value = self._fields.get(name)
        if (
            isinstance(value, list)
            and len(value) <= MAX_NAMES
            and all(isinstance(item, str) and item for item in value)
        ):
            return frozenset(value)
        self._refuse(name, f"is not a text or a list of at most {MAX_NAMES} names")
        return frozenset()

    def _selector(self, name: str) -> Names | Pattern | None:
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            return Names(self._names(name))
        try:
            return Pattern(value, self._budget)
        except PatternRefused as error:
            self._refuse(name, f"is a regular expression that {error}")
            return None

    def _rule(self) -> TargetRule:
        value = self._fields.get("target_modules")
        if isinstance(value, str) and value.lower() == ALL_LINEAR:
            targets: Names | Pattern | str | None = ALL_LINEAR
        else:
            targets = self._selector("target_modules")
        excluded = self._selector("exclude_modules") if self._fields.get("exclude_modules") else None
        return TargetRule(targets, excluded, self._layers(), self._layer_lists())

    def _layers(self) -> frozenset[int] | None:
        value = self._fields.get("layers_to_transform")
        layers = value if isinstance(value, list) else [] if value is None else [value]
        if len(layers) > MAX_NAMES or not all(is_int(layer) for layer in layers):
            self._refuse("layers_to_transform", "is not a layer number or a list of them")
            return None
        return frozenset(layers) or None

    def _layer_lists(self) -> tuple[str, ...]:
        value = self._fields.get("layers_pattern")
        names = value if isinstance(value, list) else [value] if value else []
        is_plain = all(isinstance(name, str) and re.fullmatch(r"\w+", name) for name in names)
        if len(names) > MAX_LAYER_LISTS or not is_plain:
            self._refuse("layers_pattern", f"is not a plain module name or a list of at most {MAX_LAYER_LISTS}")
            return ()
        return tuple(names)
