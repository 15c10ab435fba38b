"""A PEFT directory as an artifact: which tensor belongs to which linear layer, and the digest that names a version.

Reads headers and bytes only, without torch; `weights` turns them into tensors. Never pickle, never peft.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from loramux_adapters.artifact.config import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    AdapterConfig,
    parse_config,
    rank_of,
    scale_of,
    trained_tokens_of,
)
from loramux_adapters.artifact.generation_defaults import (
    GENERATION_FILE,
    GenerationDefaults,
    read_generation_defaults,
)
from loramux_adapters.artifact.own_tokens import OWN_TOKENS_FILE, OwnTokens, read_own_tokens
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.artifact.safetensors_header import TensorSpec, read_header
from loramux_adapters.artifact.tensor_names import Kind, other_tool, role_of
from loramux_adapters.errors import AdapterRejected

__all__ = [
    "CARD_FILE",
    "CHAT_TEMPLATE_FILE",
    "CONFIG_FILE",
    "FINGERPRINT_FILE",
    "GENERATION_FILE",
    "KNOWN_FILES",
    "MLX_WEIGHTS_FILE",
    "PICKLES",
    "SOURCE_FILES",
    "TOKENIZER_FILES",
    "UPLOAD_PARTS",
    "WEIGHTS_FILE",
    "AdapterConfig",
    "Layout",
    "Pair",
    "TensorSpec",
    "VersionDigest",
    "digest_of",
    "pair_up",
    "parse_config",
    "pickle_reason",
    "rank_of",
    "read_chat_template",
    "read_config",
    "read_header",
    "scale_of",
]

WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "card.json"
FINGERPRINT_FILE = "fingerprint.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # kept only where it is another one than the base's
UPLOAD_PARTS: Mapping[str, str] = {  # of a form that carries an adapter, and the files that they hold
    "config": CONFIG_FILE,
    "weights": WEIGHTS_FILE,
    "card": CARD_FILE,
    "fingerprint": FINGERPRINT_FILE,
    "generation_config": GENERATION_FILE,
    "chat_template": CHAT_TEMPLATE_FILE,
    "chat_template_json": "chat_template.json",
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "special_tokens_map": "special_tokens_map.json",
    "added_tokens": "added_tokens.json",
    "vocab": "vocab.json",
    "vocab_txt": "vocab.txt",
    "merges": "merges.txt",
    "tokenizer_model": "tokenizer.model",
    "own_tokens": OWN_TOKENS_FILE,
}
KNOWN_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CARD_FILE,
    FINGERPRINT_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    OWN_TOKENS_FILE,
)
TOKENIZER_FILES = (  # looked at when an adapter comes in; the last two are kept where they say something
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    CHAT_TEMPLATE_FILE,
    OWN_TOKENS_FILE,
)
MAX_TEMPLATE_BYTES = 2**20
MLX_WEIGHTS_FILE = "adapters.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
SOURCE_FILES = (  # what is taken of a directory that somebody else wrote
    *dict.fromkeys((*KNOWN_FILES, *TOKENIZER_FILES, MLX_WEIGHTS_FILE)),
)

_DIGEST_DOMAIN = b"loramux adapter 1\n"
_CHUNK_BYTES = 2**20
_SAVED, _BEFORE = ".modules_to_save.", ".original_module."
_SHOWN_NAMES = 8
_OF_TOKENS: tuple[Literal["embedding_A", "embedding_B", "tokens"], ...] = ("embedding_A", "embedding_B", "tokens")
_BESIDE: tuple[Literal["magnitude", "lora_bias", "scale"], ...] = ("magnitude", "lora_bias", "scale")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two tensors of one linear layer: A [rank, in] and B [out, rank], under their names in the file."""

    a_name: str
    a: TensorSpec
    b_name: str
    b: TensorSpec

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Vector(NamedTuple):
    """A tensor beside the pairs, under its name in the file; most have one number for each output of a linear layer."""

    name: str
    spec: TensorSpec


VocabularyKind: TypeAlias = Literal["embedding_A", "embedding_B", "tokens", "whole"]
Vocabulary: TypeAlias = Mapping[str, Mapping[VocabularyKind, Vector]]  # by the module's path; its tensors are matrices
VectorKind: TypeAlias = Literal["magnitude", "lora_bias", "scale", "bias"]
Vectors: TypeAlias = Mapping[str, Mapping[VectorKind, Vector]]  # by the module's path


@dataclass
class Layout:
    """What the tensors of a file are.

    Attributes:
        pairs: module path in the base -> its pair; complete and with equal rank on both sides.
        base_tensors: parameter name in the base -> tensor name in the file, for copies of base weights.
        beside: module path -> what it has beside its pair, by its tensors' names.
        biases: module path -> those of `base_tensors` that are its bias.
        matrices: module path -> those of `base_tensors` that are its weight.
        of_tokens: module path -> what there is of the vocabulary's.
        doubles: names of two tensors of which the second repeats the first, which is read.
        reasons: what does not fit together, one sentence each.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    base_tensors: dict[str, str] = field(default_factory=dict)
    beside: dict[str, dict[VectorKind, Vector]] = field(default_factory=dict)
    biases: dict[str, Vector] = field(default_factory=dict)
    matrices: dict[str, Vector] = field(default_factory=dict)
    of_tokens: dict[str, dict[VocabularyKind, Vector]] = field(default_factory=dict)
    doubles: list[tuple[str, str]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def vocabulary(self, config: AdapterConfig) -> dict[str, dict[VocabularyKind, Vector]]:
        """What was trained of embeddings and output heads, as far as names and config tell: matrices that the config
        names in modules_to_save, and beside trained tokens or LoRA on an embedding all that peft saved whole.
        """
        found = {module: dict(kinds) for module, kinds in self.of_tokens.items()}
        saved = {name.rpartition(".")[2] for name in config.modules_to_save}
        for module, matrix in self.matrices.items():
            if self.of_tokens or module.rpartition(".")[2] in saved:
                found.setdefault(module, {})["whole"] = matrix
        return found

    @property
    def scales(self) -> set[str]:
        """Modules whose output is scaled."""
        return {module for module, kinds in self.beside.items() if "scale" in kinds}

    def vectors(self, config: AdapterConfig) -> dict[str, dict[VectorKind, Vector]]:
        """What there is beside the pairs: DoRA's magnitudes, biases of lora_B, output scales, and biases of the base
        where the config says that it trained them. The same module may have several, and no pair."""
        found = {module: dict(kinds) for module, kinds in self.beside.items()}
        if config.trains_biases:
            for module, bias in self.biases.items():
                found.setdefault(module, {})["bias"] = bias
        return found


def read_config(directory: Path) -> AdapterConfig:
    """Read and check adapter_config.json of a PEFT directory; raises `AdapterRejected`."""
    with open_regular(directory / CONFIG_FILE) as file:
        return parse_config(file.read(MAX_CONFIG_BYTES + 1))


def pickle_reason(name: str) -> str:
    """Why weights in a file of this name are refused, and what to do."""
    return (
        f"{name} is a pickle, which is never read; where you trust it, convert it: "
        "import torch, safetensors.torch as st; "
        f"st.save_file(torch.load({name!r}, weights_only=True), {WEIGHTS_FILE!r})"
    )


def read_chat_template(directory: Path) -> str | None:
    """The chat template beside an adapter, None if there is none; raises `AdapterRejected` if it is no text."""
    path = directory / CHAT_TEMPLATE_FILE
    if not path.is_symlink() and not path.exists():
        return None
    with open_regular(path) as file:
        data = file.read(MAX_TEMPLATE_BYTES + 1)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise AdapterRejected([f"{CHAT_TEMPLATE_FILE} has more than {MAX_TEMPLATE_BYTES} bytes"])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise AdapterRejected([f"{CHAT_TEMPLATE_FILE} is not UTF-8"]) from error


def pair_up(specs: Mapping[str, TensorSpec]) -> Layout:
    """Sort the tensors of a file into pairs and copies of base weights; never raises, see `Layout.reasons`."""
    layout = Layout()
    for path, names in _halves(specs, layout).items():
        if "base" in names:
            layout.base_tensors[path] = name = names["base"]
            module, _, last = path.rpartition(".")
            if last == "bias":
                layout.biases[module] = Vector(name, specs[name])
            if last == "weight" and len(specs[name].shape) == 2:
                layout.matrices[module] = Vector(name, specs[name])
        of_tokens: dict[VocabularyKind, Vector] = {
            kind: Vector(names[kind], specs[names[kind]]) for kind in _OF_TOKENS if kind in names
        }
        if of_tokens:
            layout.of_tokens[path] = of_tokens
        beside: dict[VectorKind, Vector] = {
            kind: Vector(names[kind], specs[names[kind]]) for kind in _BESIDE if kind in names
        }
        if beside:
            layout.beside[path] = beside
        if "A" not in names and "B" not in names:
            continue
        if "A" not in names or "B" not in names:
            present, absent = ("A", "B") if "A" in names else ("B", "A")
            layout.reasons.append(f"module {quoted(path)} has lora_{present} but no lora_{absent}")
            continue
        pair = Pair(names["A"], specs[names["A"]], names["B"], specs[names["B"]])
        if len(pair.a.shape) != 2 or len(pair.b.shape) != 2 or 0 in pair.a.shape + pair.b.shape:
            layout.reasons.append(f"module {quoted(path)} has weights that are not matrices")
        elif pair.a.shape[0] != pair.b.shape[1]:
            layout.reasons.append(
                f"module {quoted(path)} has lora_A of rank {pair.a.shape[0]} but lora_B of rank {pair.b.shape[1]}"
            )
        else:
            layout.pairs[path] = pair
    return layout


def _halves(specs: Mapping[str, TensorSpec], layout: Layout) -> dict[str, dict[Kind, str]]:
    """Path -> kind -> name of the tensor. Empty if the file as a whole is not of one adapter, named as peft does it."""
    reasons = layout.reasons
    halves: dict[str, dict[Kind, str]] = {}
    adapters: set[str] = set()
    foreign: dict[str, list[str]] = {}  # how a tool names tensors -> tensors named so
    for name in specs:
        if (plain := name.replace(_BEFORE, ".")) != name and plain in specs:
            continue  # what a saved module was before: peft writes it with resized vocabularies, and never reads it
        if (plain := name.replace(_SAVED, ".")) != name and plain in specs:
            layout.doubles.append((plain, name))
            continue
        try:
            path, kind, adapter = role_of(name)
        except AdapterRejected as error:
            reasons.extend(error.reasons)
            continue
        tool = other_tool(name) if kind == "base" else None
        if tool is not None:
            foreign.setdefault(tool, []).append(name)
            continue
        adapters |= {adapter} - {""}
        found = halves.setdefault(path, {})
        if kind in found and len(adapters) < 2:
            reasons.append(f"tensors {quoted(found[kind])} and {quoted(name)} are the same weight")
        found[kind] = name
    if len(adapters) > 1:
        shown = ", ".join(quoted(adapter, 40) for adapter in sorted(adapters)[:_SHOWN_NAMES])
        reasons[:] = [f"the tensors are of {len(adapters)} adapters, {shown}: send each of them alone"]
    for tool, names in foreign.items():
        reasons.append(f"{len(names)} tensors, {quoted(names[0])} the first, are named {tool}")
    return {} if foreign or len(adapters) > 1 else halves


class VersionDigest:
    """The version id, as an adapter's weights are read: sha256 over what it computes and over nothing else.

    That is, in the order of module paths, the scale and both tensors (dtype, shape, bytes), then the vectors beside
    them, then what is of the vocabulary. The order of tensors in the file, spelling of the config, training-only
    fields, card and fingerprint do not count. A chat template of its own does: it changes what the adapter is asked.
    So do generation defaults: they change how it answers.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256(_DIGEST_DOMAIN)

    def begin(self, module: str, pair: Pair, scale: float) -> None:
        """The next module, in the order of paths; `update` with all bytes of its A, then of its B, has to follow."""
        line = [module, scale.hex(), pair.a.dtype, pair.a.shape, pair.b.dtype, pair.b.shape]
        self._hash.update(json.dumps(line).encode() + b"\n")

    def update(self, data: bytes | memoryview) -> None:
        self._hash.update(data)

    def vector(self, module: str, kind: VectorKind, spec: TensorSpec, data: bytes) -> None:
        """After the pairs, in the order of paths and kinds."""
        line = [module, kind, spec.dtype, spec.shape]
        self._hash.update(b"vector " + json.dumps(line).encode() + b"\n" + data)

    def of_tokens(self, config: AdapterConfig, module: str, kind: VocabularyKind, spec: TensorSpec) -> None:
        """After the vectors, in the order of paths and kinds; `update` with all bytes of the tensor has to follow."""
        line: list[object] = [module, kind, spec.dtype, spec.shape]
        if kind == "tokens":
            line += [trained_tokens_of(config, module), config.ties_weights]
        elif kind == "whole":
            line.append(config.ties_weights)
        elif kind == "embedding_A" and spec.shape and spec.shape[0]:
            line.append(scale_of(config, module, spec.shape[0]).hex())
        self._hash.update(b"tokens " + json.dumps(line).encode() + b"\n")

    def generation_defaults(self, defaults: GenerationDefaults) -> None:
        """After the modules: what comes with them; says how long it is, so that no template could be taken for it."""
        said = defaults.dump()
        if said is not None:
            self._hash.update(b"generation defaults %d\n" % len(said) + said)

    def own_tokens(self, own: OwnTokens | None) -> None:
        """After the defaults, as these are."""
        if own is not None:
            said = own.dump()
            self._hash.update(b"own tokens %d\n" % len(said) + said)

    def chat_template(self, source: str | None) -> None:
        """At the end: a template that comes with them."""
        if source is not None:
            self._hash.update(b"chat template\n" + source.encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_of(config: AdapterConfig, directory: Path) -> str:
    """The version id of an adapter whose weights are not needed otherwise.

    Raises `AdapterRejected` if the weights cannot be read.
    """
    path = directory / WEIGHTS_FILE
    layout = pair_up(read_header(path))
    if layout.reasons:
        raise AdapterRejected(layout.reasons)
    digest = VersionDigest()
    with open_regular(path) as file:
        for module, pair in sorted(layout.pairs.items()):
            digest.begin(module, pair, scale_of(config, module, pair.rank))
            for spec in (pair.a, pair.b):
                _digest_bytes(digest, file, spec)
        for module, kind, vector in in_order(layout.vectors(config)):
            digest.vector(module, kind, vector.spec, read_vector(file.fileno(), vector.spec))
        for module, of_tokens, matrix in tokens_in_order(layout.vocabulary(config)):
            digest.of_tokens(config, module, of_tokens, matrix.spec)
            _digest_bytes(digest, file, matrix.spec)
    digest.generation_defaults(read_generation_defaults(directory))
    digest.own_tokens(read_own_tokens(directory))
    digest.chat_template(read_chat_template(directory))
    return digest.hexdigest()


def most_rows(directory: Path) -> int:
    """The largest number of tokens that an adapter's saved embedding or output head has rows for; 0: it saves none.

    A matrix of another layer that is saved whole counts too: it has fewer rows than a vocabulary has tokens.
    Raises `AdapterRejected` if the files cannot be read.
    """
    vocabulary = pair_up(read_header(directory / WEIGHTS_FILE)).vocabulary(read_config(directory))
    return max((parts["whole"].spec.shape[0] for parts in vocabulary.values() if "whole" in parts), default=0)


def has_digest(directory: Path, digest: str) -> bool:
    """Whether a stored version's files have this digest, or had it when modules that were saved whole did not count.

    Then these are copies of the base's: no other were taken. Raises `AdapterRejected`, OSError.
    """
    config = read_config(directory)
    if digest_of(config, directory) == digest:
        return True
    return bool(config.modules_to_save) and digest_of(without_saved(config), directory) == digest


def without_saved(config: AdapterConfig) -> AdapterConfig:
    """The config as it was read when modules that were saved whole did not count."""
    return replace(config, modules_to_save=())


def doubles_that_differ(directory: Path, layout: Layout, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Why tensors that are said twice are not the same. Raises AdapterRejected: the file cannot be read."""
    reasons = []
    with open_regular(directory / WEIGHTS_FILE) as file:
        for first, second in layout.doubles:
            one, other = specs[first], specs[second]
            if (one.dtype, one.shape) != (other.dtype, other.shape) or _content(file, one) != _content(file, other):
                reasons.append(f"tensors {quoted(first)} and {quoted(second)} are the same weight with other numbers")
    return reasons


def _content(file: BufferedReader, spec: TensorSpec) -> str:
    digest = VersionDigest()
    _digest_bytes(digest, file, spec)
    return digest.hexdigest()


def _digest_bytes(digest: VersionDigest, file: BufferedReader, spec: TensorSpec) -> None:
    file.seek(spec.offset)
    remaining = spec.nbytes
    while remaining:
        chunk = file.read(min(remaining, _CHUNK_BYTES))
        if not chunk:
            raise AdapterRejected([f"{WEIGHTS_FILE} ended while it was read"])
        remaining -= len(chunk)
        digest.update(chunk)


def in_order(vectors: Vectors) -> list[tuple[str, VectorKind, Vector]]:
    """As a digest takes them."""
    return [(module, kind, kinds[kind]) for module, kinds in sorted(vectors.items()) for kind in sorted(kinds)]


def tokens_in_order(vocabulary: Vocabulary) -> list[tuple[str, VocabularyKind, Vector]]:
    """As a digest takes them."""
    return [(module, kind, kinds[kind]) for module, kinds in sorted(vocabulary.items()) for kind in sorted(kinds)]


def read_vector(file: int, spec: TensorSpec) -> bytes:
    """Its bytes, from an open file; raises `AdapterRejected`."""
    data = os.pread(file, spec.nbytes, spec.offset)
    if len(data) < spec.nbytes:
        raise AdapterRejected([f"{WEIGHTS_FILE} ended while it was read"])
    return data
