"""generation_config.json beside an adapter: what requests that say nothing of it get, and how long its context may be.

The file is transformers' GenerationConfig, of which few fields are read. `max_length`, which there is the length of
prompt and reply together, is the one place that says an adapter's context: a tokenizer's `model_max_length` is not
looked at, since trainers write it unasked and hardly anyone means it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import (
    StrictJSONError,
    is_empty,
    is_int,
    is_number,
    parse_object,
    quoted,
)
from loramux_adapters.errors import AdapterRejected

GENERATION_FILE = "generation_config.json"  # kept only where it says something
MAX_BYTES = 64 * 2**10
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_COUNT = 2**31 - 1
MAX_TEMPERATURE = 2.0
MIN_PENALTY, MAX_PENALTY = 0.01, 100.0
_UNSAID_LENGTH = 20  # transformers' own default of max_length, which old releases wrote into every file
_SHOWN = 8  # names in a message

# They belong to the base and its tokenizer, or to the program that wrote the file.
_NOT_OURS = frozenset(
    "bos_token_id eos_token_id pad_token_id decoder_start_token_id transformers_version _from_model_config use_cache "
    "cache_implementation cache_config return_dict_in_generate output_attentions output_hidden_states output_scores "
    "output_logits return_legacy_cache trust_remote_code".split()
)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What an adapter's version says of generation; None, or no stop strings, where it says nothing.

    Attributes:
        temperature, top_p, top_k, min_p, repetition_penalty: for sampling; a temperature of 0 is greedy.
        stop: texts that end a reply.
        max_tokens: longest reply.
        context: longest prompt and reply together, in tokens.
        notes: what of the file is not applied, one sentence each; no part of what it says.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    context: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def said(self) -> dict[str, object]:
        """What it says, by our names."""
        values = {name: value for name, value in asdict(self).items() if name != "notes"}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def dump(self) -> bytes | None:
        """The file that says this and nothing else, always the same bytes; None if there is nothing to say."""
        said = {_KEYS[name]: value for name, value in self.said.items()}
        return json.dumps(said, indent=1, sort_keys=True).encode() if said else None

    def agreed(self, other: GenerationDefaults) -> GenerationDefaults:
        """What both say, and the shorter of their contexts."""
        contexts = [each.context for each in (self, other) if each.context is not None]
        both = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("context", "notes") and getattr(self, each.name) == getattr(other, each.name)
        }
        return GenerationDefaults(**both, context=min(contexts, default=None))


NOTHING_SAID = GenerationDefaults()
_KEYS = {  # our name -> transformers'
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop": "stop_strings",
    "max_tokens": "max_new_tokens",
    "context": "max_length",
}
_READ = frozenset(_KEYS.values()) | {"do_sample"}


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """Of the file in a PEFT directory; nothing is said where there is none. Raises `AdapterRejected`."""
    path = directory / GENERATION_FILE
    if not path.is_symlink() and not path.exists():
        return NOTHING_SAID
    with open_regular(path) as file:
        return parse_generation_defaults(file.read(MAX_BYTES + 1))


def parse_generation_defaults(raw: bytes) -> GenerationDefaults:
    """Raises `AdapterRejected` with every reason: it is no strict JSON object, or a value is out of range."""
    try:
        given = parse_object(raw, limit=MAX_BYTES)
    except StrictJSONError as error:
        raise AdapterRejected([f"{GENERATION_FILE} {error}"]) from error
    reader = _Reader(given)
    defaults = GenerationDefaults(
        temperature=reader.temperature(),
        top_p=reader.number("top_p", above=0, up_to=1),
        top_k=reader.top_k(),
        min_p=reader.number("min_p", least=0, up_to=1),
        repetition_penalty=reader.number("repetition_penalty", least=MIN_PENALTY, up_to=MAX_PENALTY),
        stop=reader.stops(),
        max_tokens=reader.count("max_new_tokens"),
        context=reader.context(),
        notes=tuple(reader.notes()),
    )
    if reader.reasons:
        raise AdapterRejected(reader.reasons)
    return defaults


class _Reader:
    """Reads the fields one by one and collects what is wrong with them. Null says nothing."""

    def __init__(self, given: Mapping[str, object]) -> None:
        self._given = given
        self._unsaid: list[str] = []
        self.reasons: list[str] = []

    def temperature(self) -> float | None:
        value = self.number("temperature", least=0, up_to=MAX_TEMPERATURE)
        do_sample = self._given.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            self._refuse("do_sample", "true or false")
        return 0.0 if do_sample is False else value

    def number(
        self, name: str, *, above: float | None = None, least: float | None = None, up_to: float
    ) -> float | None:
        """`above` excludes the bound itself, `least` does not."""
        low = f"above {above:g}" if above is not None else f"from {least:g}"

        def fits(value: float) -> bool:
            return (above is None or value > above) and (least is None or value >= least) and value <= up_to

        value = self._given.get(name)
        if value is None:
            return None
        if is_number(value) and isinstance(value, int | float) and fits(value):
            return float(value)
        self._refuse(name, f"a number {low} to {up_to:g}")
        return None

    def top_k(self) -> int | None:
        return self._int("top_k", 0, "0 (every token)")

    def count(self, name: str) -> int | None:
        return self._int(name, 1, "1")

    def context(self) -> int | None:
        value = self._int("max_length", 2, "2 (a token of a prompt and one of a reply)")
        if value == _UNSAID_LENGTH:
            self._unsaid.append(
                f"{GENERATION_FILE}: a max_length of {value} is what transformers writes unasked, and limits nothing"
            )
            return None
        return value

    def stops(self) -> tuple[str, ...]:
        value = self._given.get("stop_strings")
        found = [value] if isinstance(value, str) else [] if value is None else value
        if (
            not isinstance(found, list)
            or len(found) > MAX_STOPS
            or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in found)
        ):
            self._refuse("stop_strings", f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
            return ()
        return tuple(dict.fromkeys(found))

    def notes(self) -> Sequence[str]:
        others = [
            name
            for name, value in self._given.items()
            if name not in _READ and name not in _NOT_OURS and not _says_nothing(value)
        ]
        if not others:
            return self._unsaid
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        names = ", ".join(quoted(name, 40)[1:-1] for name in others[:_SHOWN])
        return [*self._unsaid, f"{GENERATION_FILE} says what is not applied here: {names}{more}"]

    def _int(self, name: str, least: int, shown: str) -> int | None:
        value = self._given.get(name)
        if value is None:
            return None
        if is_int(value) and isinstance(value, int) and least <= value <= MAX_COUNT:
            return value
        self._refuse(name, f"an integer from {shown} to {MAX_COUNT}")
        return None

    def _refuse(self, name: str, allowed: str) -> None:
        self.reasons.append(f"{name} in {GENERATION_FILE} is not {allowed}: correct it, or remove it")


def _says_nothing(value: object) -> bool:
    """Whether an option of transformers with this value is off."""
    return is_empty(value) or (is_number(value) and value == 1)
