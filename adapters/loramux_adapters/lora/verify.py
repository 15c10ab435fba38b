"""Checks an uploaded adapter against the base it is to run on, before anything of it is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from loramux_adapters.artifact.config import BASE_ID_KEY, check_base_id, rank_of
from loramux_adapters.artifact.coverage import LayerCount, coverage_of
from loramux_adapters.artifact.format import (
    CARD_FILE,
    FINGERPRINT_FILE,
    PICKLES,
    WEIGHTS_FILE,
    AdapterConfig,
    Layout,
    Pair,
    Vectors,
    Vocabulary,
    doubles_that_differ,
    pair_up,
    pickle_reason,
    read_config,
    read_header,
)
from loramux_adapters.artifact.generation_defaults import (
    NOTHING_SAID,
    GenerationDefaults,
    read_generation_defaults,
)
from loramux_adapters.artifact.own_tokens import OwnTokens
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import StrictJSONError, parse_object, quoted
from loramux_adapters.base_info import AdapterText, BaseInfo
from loramux_adapters.errors import AdapterRejected, BaseMismatch, VectorsNotServed
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.token_reading import side_of, token_reasons
from loramux_adapters.lora.weights import read_adapter, read_tensor

MAX_REASONS = 20  # and notes
MAX_METADATA_BYTES = 4 * 2**20
_SHOWN = 8  # names in a message
NO_OWN_TOKENS = (
    "its tokenizer adds tokens to the base's, and nothing is known here of the base's embedding; send it "
    "without its tokenizer files if its prompts and replies need none of them"
)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Checked:
    """What the check found out.

    Attributes:
        adapter: its weights, ready to be copied to the device. Whoever holds this object holds their memory.
        target_modules: last parts of the module paths that carry weights ("q_proj"), sorted.
        base_id: that the adapter names, None if it names none.
        base_verified: it names the base that is served.
        layers: how many of the base's layers carry weights; None for a base without numbered layers.
        notes: what was accepted and is worth a word to whoever sent it, one sentence each.
        chat_template: that it brings in place of the base's; None if it brings none.
        generation: what requests that say nothing of it get, and how long its context may be.
        own_tokens: that it adds to the base's tokenizer; None if it adds none.
    """

    config: AdapterConfig
    adapter: HostAdapter
    target_modules: list[str]
    base_id: str | None
    base_verified: bool
    layers: LayerCount | None = None
    notes: list[str] = field(default_factory=list)
    chat_template: str | None = None
    generation: GenerationDefaults = NOTHING_SAID
    own_tokens: OwnTokens | None = None

    @property
    def version(self) -> str:
        """The digest of what it computes, under which it is stored."""
        return self.adapter.version

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return self.adapter.rank


def check_adapter(directory: Path, base: BaseInfo, max_rank: int, *, force: bool = False) -> Checked:
    """Check a PEFT directory (adapter_config.json, adapter_model.safetensors, card.json?, fingerprint.json?,
    generation_config.json?).

    Tokenizer files beside them have to mean what the base's mean, and may add tokens; these, and another chat template,
    are part of what is returned.

    Every tensor must be half of a pair of a linear layer of the base, with that layer's shape and the configured rank,
    at most `max_rank`, and finite; or a copy of a base weight that PEFT wrote beside them. The files are only read, and
    the LoRA weights once: what is digested and checked is what is returned, to be tried out and served.

    While it runs it takes the memory of those weights in bf16 and a few MiB (`read_adapter`), and nothing is read
    before names and shapes are found to fit. How many checks run at a time, and how many results are held, is the
    caller's to bound.
    Raises `AdapterRejected` with every reason, `BaseMismatch` if it names another base (not with `force`).
    """
    instead = _instead_of_weights(directory)
    reasons = [*instead]
    config = _collect(reasons, lambda: read_config(directory))
    card = _collect(reasons, lambda: _read_metadata(directory / CARD_FILE))
    _collect(reasons, lambda: _read_metadata(directory / FINGERPRINT_FILE))
    own_text = _collect(reasons, lambda: base.own_text(directory)) or AdapterText()
    generation = _collect(reasons, lambda: read_generation_defaults(directory)) or NOTHING_SAID
    base_id = _collect(reasons, lambda: _base_id_of(config, card))
    if base_id is not None and base_id != base.base_id and not force:
        raise BaseMismatch(base_id, base.base_id)
    specs = None if instead else _collect(reasons, lambda: read_header(directory / WEIGHTS_FILE))
    layout = pair_up(specs or {})
    reasons += layout.reasons
    vocabulary = {} if config is None else layout.vocabulary(config)
    holds = layout.pairs or layout.scales or any(side_of(base, module) for module in vocabulary)
    if specs is not None and not holds and not layout.reasons:
        reasons.append(f"{WEIGHTS_FILE} holds no LoRA weights")
    reasons += _layout_reasons(layout, config, base, max_rank)
    if layout.doubles and specs is not None:
        reasons += _collect(reasons, lambda: doubles_that_differ(directory, layout, specs)) or []
    vectors = {} if config is None else layout.vectors(config)
    if config is not None:
        reasons += _vector_reasons(vectors, layout, config, base)
        reasons += token_reasons(vocabulary, config, base, max_rank)
    if config is None or reasons:
        raise AdapterRejected(_at_most(reasons))
    adapter, not_finite = read_adapter(
        directory,
        config,
        layout.pairs,
        base.convert,
        vectors=vectors,
        weights=base.weights,
        vocabulary=vocabulary,
        chat_template=own_text.chat_template,
        own_tokens=own_text.tokens,
        generation=generation,
    )
    reasons += _token_memory_reasons(adapter, base)
    reasons += _own_token_reasons(own_text.tokens, adapter, base)
    reasons += _foreign_tensors(directory, layout, vocabulary, config, base)
    reasons += [f"module {quoted(module)} has values that are not finite in bf16" for module in not_finite]
    elsewhere = [module for module in layout.pairs if base.module_of(module) is None]
    reasons += _elsewhere_reasons(elsewhere, adapter)
    if reasons:
        raise AdapterRejected(_at_most(reasons))
    adapter = _in_the_base(adapter, base)
    trained = adapter.modules.keys() | _places(layout.scales, base)
    coverage = coverage_of(trained, config, base.linears)
    notes = [
        *_file_notes(directory),
        *config.notes,
        *generation.notes,
        *_elsewhere_notes(elsewhere),
        *_weights_notes(layout, config, adapter),
        *coverage.notes,
        *_own_token_notes(own_text.tokens),
    ]
    return Checked(
        config=config,
        adapter=adapter,
        target_modules=sorted({module.rpartition(".")[2] for module in trained}),
        base_id=base_id,
        base_verified=base_id == base.base_id,
        layers=coverage.layers,
        notes=_at_most(notes),
        chat_template=own_text.chat_template,
        generation=generation,
        own_tokens=own_text.tokens,
    )


def _collect(reasons: list[str], read: Callable[[], T]) -> T | None:
    try:
        return read()
    except AdapterRejected as error:
        reasons += error.reasons
        return None


def _at_most(reasons: list[str]) -> list[str]:
    if len(reasons) <= MAX_REASONS:
        return reasons
    return [*reasons[:MAX_REASONS], f"and {len(reasons) - MAX_REASONS} more"]


def _instead_of_weights(directory: Path) -> list[str]:
    """Which files are there that hold weights and are not read, where those that are read are missing."""
    if (directory / WEIGHTS_FILE).exists():
        return []
    return [
        *(pickle_reason(name) for name in PICKLES if (directory / name).exists()),
        *(
            f"{quoted(path.name)} is a GGUF file: send the PEFT directory that it was converted from, or "
            "bring it into that form with `loramux adapters convert`"
            for path in sorted(directory.glob("*.gguf"))
        ),
    ]


def _file_notes(directory: Path) -> list[str]:
    return [
        f"{name} is left out: pickles are never read, and {WEIGHTS_FILE} is there"
        for name in PICKLES
        if (directory / name).exists()
    ]


def _weights_notes(layout: Layout, config: AdapterConfig, adapter: HostAdapter) -> list[str]:
    notes = []
    saved = {part for parameter in layout.base_tensors for part in parameter.split(".")}
    absent = [name for name in config.modules_to_save if name.rpartition(".")[2] not in saved]
    if absent:
        names = ", ".join(quoted(name, 40)[1:-1] for name in absent[:_SHOWN])
        notes.append(f"modules_to_save names {names}, but the file holds no weights for it: it is served without them")
    if any("F64" in (pair.a.dtype, pair.b.dtype) for pair in layout.pairs.values()):
        notes.append("the weights are F64; they are rounded to bf16 as those of any other type")
    if config.use_dora:
        notes.append("DoRA: the norms that its magnitudes replace are those of the weights as they are served here")
    notes += _token_notes(adapter)
    if config.trains_biases and layout.biases:
        notes.append(f"{len(layout.biases)} biases of the base are replaced by its own")
    idle = [
        module
        for module, parts in adapter.modules.items()
        if module not in adapter.affine and any(map(_is_zero, parts))
    ]
    if len(idle) == len(adapter.modules) and not adapter.affine and not adapter.tokens:
        notes.append("every product of lora_B and lora_A is zero: the adapter changes nothing")
    elif idle:
        notes.append(
            f"{len(idle)} of {len(adapter.modules)} modules change nothing: their lora_A or lora_B is all zeros"
        )
    return notes


def _token_notes(adapter: HostAdapter) -> list[str]:
    """What is changed of embedding and output head."""
    own = adapter.tokens
    if own is None:
        return []
    counts = [
        f"{len(rows.tokens)} rows of the {what}"
        for rows, what in ((own.embedding, "embedding"), (own.head, "output head"))
        if rows is not None
    ]
    if own.a is not None:
        counts.append("the embedding by LoRA")
    notes = [f"it changes {' and '.join(counts)}, {own.nbytes / 2**20:.1f} MiB beside its layers"] if counts else []
    added = {side: size - own.base_sizes[side] for side, size in own.sizes.items() if size > own.base_sizes[side]}
    return notes + [f"it adds {max(added.values())} tokens to the base's"] if added else notes


def _token_memory_reasons(adapter: HostAdapter, base: BaseInfo) -> list[str]:
    own, most = adapter.tokens, base.token_bytes
    if own is None or most is None or own.nbytes <= most:
        return []
    return [
        f"its own rows of embedding and output head take {own.nbytes / 2**20:.1f} MiB, and this server has "
        f"{most / 2**20:.1f} MiB for those of all adapters: raise --token-memory-mib, or train fewer tokens"
    ]


def _own_token_reasons(own: OwnTokens | None, adapter: HostAdapter, base: BaseInfo) -> list[str]:
    """Tokens that no row of numbers stands for."""
    if own is None:
        return []
    if base.weights is None or base.weights.tokens is None:
        return [NO_OWN_TOKENS]
    if adapter.tokens is not None:
        rows = adapter.tokens.sizes["embedding"]
    else:
        rows = base.weights.tokens.size("embedding")
    without = [token for token in own.tokens if token.id >= rows]
    if not without:
        return []
    return [
        f"its tokenizer adds {quoted(without[0].content, 60)} as token {without[0].id}, and there are embeddings for 0 "
        f"to {rows - 1} only: save the resized embedding with the adapter (modules_to_save: embed_tokens and lm_head)"
    ]


def _own_token_notes(own: OwnTokens | None) -> list[str]:
    if own is None:
        return []
    shown = ", ".join(quoted(token.content, 40) for token in own.tokens[:_SHOWN])
    more = "" if len(own.tokens) <= _SHOWN else f" and {len(own.tokens) - _SHOWN} more"
    ends = "".join(f"; {text!r} ends its replies too" for name, text in own.ends if name == "eos_token")
    return [f"its tokenizer adds {shown}{more} to the base's{ends}"]


def _in_the_base(adapter: HostAdapter, base: BaseInfo) -> HostAdapter:
    """The adapter with its weights by the paths that the base has."""
    modules = {base.module_of(module): parts for module, parts in adapter.modules.items()}
    affine = {base.module_of(module): part for module, part in adapter.affine.items()}
    return replace(
        adapter,
        modules={place: parts for place, parts in modules.items() if place is not None},
        affine={place: part for place, part in affine.items() if place is not None},
    )


def _places(modules: Iterable[str], base: BaseInfo) -> set[str]:
    """Where these modules of an adapter are in the base, as far as they are served."""
    return {place for place in map(base.module_of, modules) if place is not None}


def _elsewhere_reasons(modules: list[str], adapter: HostAdapter) -> list[str]:
    """Of modules of a part of the model that is not served: those whose absence would be felt."""
    return [
        f"module {quoted(module)} is of the part that takes images or sound, which is not served: train the adapter "
        "on the language part alone"
        for module in modules
        if not any(map(_is_zero, adapter.modules[module]))
    ]


def _elsewhere_notes(modules: list[str]) -> list[str]:
    if not modules:
        return []
    return [
        f"{len(modules)} modules, {quoted(modules[0])} the first, are of the part that takes images or sound, which is "
        "not served; their weights are zero and change nothing"
    ]


def _is_zero(part: torch.Tensor) -> bool:
    """`part` [rank, features]. The first row tells of nearly all that it is not: the others need not be looked at."""
    return not part[0].any() and not part.any()


def _read_metadata(path: Path) -> dict[str, object]:
    """A JSON file that may be absent; raises `AdapterRejected` if it is there and is not one JSON object."""
    if not path.is_symlink() and not path.exists():
        return {}
    try:
        with open_regular(path) as file:
            return parse_object(file.read(MAX_METADATA_BYTES + 1), limit=MAX_METADATA_BYTES)
    except StrictJSONError as error:
        raise AdapterRejected([f"{path.name} {error}"]) from error


def _base_id_of(config: AdapterConfig | None, card: dict[str, object] | None) -> str | None:
    try:
        in_card = check_base_id((card or {}).get(BASE_ID_KEY))
    except ValueError as error:
        raise AdapterRejected([f"{BASE_ID_KEY} in {CARD_FILE} {error}"]) from error
    in_config = config.base_id if config is not None else None
    if in_card and in_config and in_card != in_config:
        raise AdapterRejected([f"{CARD_FILE} and the config name different bases in {BASE_ID_KEY}"])
    return in_card or in_config


def _layout_reasons(layout: Layout, config: AdapterConfig | None, base: BaseInfo, max_rank: int) -> list[str]:
    """What can be said of names and shapes without reading data."""
    reasons = []
    places: dict[str, str] = {}  # in the base -> what the file calls it
    for module, pair in layout.pairs.items():
        place = base.module_of(module)
        if place is not None and places.setdefault(place, module) != module:
            reasons.append(f"modules {quoted(places[place])} and {quoted(module)} are the same")
        why = _pair_reason(module, pair, config, base, max_rank)
        if why is not None:
            reasons.append(f"module {quoted(module)} {why}")
    return reasons


def _pair_reason(module: str, pair: Pair, config: AdapterConfig | None, base: BaseInfo, max_rank: int) -> str | None:
    place = base.module_of(module)
    if place is None:
        return None  # judged by its numbers
    if place not in base.linears:
        return "is no linear layer of the base"
    in_features, out_features = base.linears[place]
    if pair.a.shape[1] != in_features or pair.b.shape[0] != out_features:
        found = f"{pair.a.shape[1]} -> {pair.b.shape[0]}"
        return f"has weights for {found} features, the base has {in_features} -> {out_features} there"
    if pair.rank > max_rank:
        return f"has rank {pair.rank}, this server takes at most {max_rank}"
    if config is None:
        return None
    if pair.rank != rank_of(config, module):
        return f"has rank {pair.rank} in the weights and {rank_of(config, module)} in the config"
    if not config.rule.matches(module):
        return "has weights but is no target of the config (target_modules and its companions)"
    return None


def _vector_reasons(vectors: Vectors, layout: Layout, config: AdapterConfig, base: BaseInfo) -> list[str]:
    """What can be said of magnitudes and biases without reading them, and of those that are missing."""
    reasons = []
    for wanted, kind, option in (
        (config.use_dora, "magnitude", "use_dora"),
        (config.lora_bias, "lora_bias", "lora_bias"),
    ):
        having = {module for module, kinds in vectors.items() if kind in kinds}
        what = "a DoRA magnitude (use_dora)" if kind == "magnitude" else "a bias of lora_B (lora_bias)"
        if wanted:
            reasons += [f"module {quoted(module)} lacks {what}" for module in sorted(layout.pairs.keys() - having)]
        elif having:
            reasons.append(f"module {quoted(min(having))} has {what}, and {option} is not true in the config")
        reasons += [
            f"module {quoted(module)} has {what} but no lora_A and lora_B"
            for module in sorted(having - layout.pairs.keys())
        ]
    for module, kinds in vectors.items():
        if module not in base.linears:
            if "scale" in kinds:
                reasons.append(f"module {quoted(module)} is no linear layer of the base")
            continue  # a bias: it may be a copy of the base's; anything else has no pair either
        for kind, vector in kinds.items():
            if vector.spec.shape != (base.linears[module][1],):
                reasons.append(
                    f"tensor {quoted(vector.name)} is of shape {[*vector.spec.shape]}, the base has "
                    f"{base.linears[module][1]} outputs there"
                )
            elif kind == "bias" and base.weights is not None and base.weights.bias(module) is None:
                reasons.append(f"tensor {quoted(vector.name)} is a bias, and the base has none there")
    if vectors and (base.weights is None or not base.weights.vectors):
        reasons += VectorsNotServed().reasons
    return reasons


def _foreign_tensors(
    directory: Path, layout: Layout, vocabulary: Vocabulary, config: AdapterConfig, base: BaseInfo
) -> list[str]:
    """Why tensors that are no LoRA weights are no copies of the base's either."""
    saved = {name.rpartition(".")[2] for name in config.modules_to_save}
    reasons = []
    read = {f"{module}.weight" for module, parts in vocabulary.items() if "whole" in parts and side_of(base, module)}
    for parameter, tensor_name in layout.base_tensors.items():
        if parameter in read:
            continue
        if config.trains_biases and parameter.removesuffix(".bias") in base.linears and parameter.endswith(".bias"):
            continue
        if not base.tensor_equals(parameter, read_tensor(directory, tensor_name)):
            what = "neither a LoRA weight nor a copy of the base's"
            if config.trains_biases and parameter.endswith(".bias"):
                what = "a trained bias of what is no linear layer, which is not served"
            if saved & {*parameter.split(".")}:
                what = "a fully trained module (modules_to_save) that is no embedding and no output head: not served"
                if base.weights is None or base.weights.tokens is None:
                    what = "a fully trained module (modules_to_save), which is not served here"
            elif side_of(base, parameter.removesuffix(".weight")):
                what = "another embedding or output head than the base's, and modules_to_save does not name it"
            reasons.append(f"tensor {quoted(tensor_name)} is {what}")
    return reasons
