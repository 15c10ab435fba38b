"""What the API's tests put in place of the engine, the store, the tokenizer and the check."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from fastapi import FastAPI

from loramux_adapters.artifact.config import AdapterConfig
from loramux_adapters.artifact.coverage import LayerCount
from loramux_adapters.artifact.own_tokens import OwnTokens
from loramux_adapters.errors import AdapterNotFound, PinRefused, RollbackImpossible
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.verify import Checked
from loramux_adapters.store.store import AdapterRecord, Lease, Published, Staging, VersionRecord
from loramux_server.access.access_file import AccessFile
from loramux_server.access.audit_file import AuditFile
from loramux_server.api.app import create_app
from loramux_server.api.http.dependencies import Dependencies, GrammarsLike, Keys, Limits, ServedBase
from loramux_server.base.infill import Infill
from loramux_server.engine.scheduling.sequence import FinishReason, TokenLogprob, TokenOutput
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.errors import RequestError
from loramux_server.fingerprint.replay import ReplayOutcome
from loramux_server.grammar.shape import Shape
from loramux_server.metrics.metrics import Metrics
from loramux_server.publishing.lora_path import LoraPathRoot
from loramux_server.publishing.pins import Pins
from loramux_server.tools.conventions import Conventions
from loramux_server.tools.formats import CallFormat

BASE_NAME = "tiny-base"
CONTEXT = 128
END = 257  # the fake tokenizer's end token
VERSION = hashlib.sha256(b"pirate").hexdigest()


class FakeTokenizer:
    """One token per byte, a beginning token 256 and an end token 257.

    Attributes:
        encoded: the texts it was given.
        special: whether special tokens were allowed in the last of them.
        around: whether the tokens that a base expects around a text were.
        templates: the chat template of each conversation, None for the base's.
        conversations, variables: the messages of each, and what else its template was told.
        special_texts: of special tokens.
        opening: stands where the assistant's turn begins.
        spoken: how calls and thoughts are written.
    """

    vocab_size = 258
    special_ids = frozenset({256, 257})
    stop_ids = frozenset({257})
    longest_token = 1
    infill: Infill | None = None

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.special = True
        self.around = True
        self.templates: list[str | None] = []
        self.conversations: list[list[dict[str, Any]]] = []
        self.variables: list[dict[str, Any]] = []
        self.special_texts = {256: b"<begin>", 257: b"<end>"}
        self.opening = ""
        self.spoken = Conventions(CallFormat("hermes"), "tools", writes_calls=True, takes_results=True)

    def with_tokens(self, own: OwnTokens | None) -> FakeTokenizer:
        if own is None:
            return self
        extended = copy.copy(self)
        extended.vocab_size = own.size
        extended.special_texts = self.special_texts | {token.id: token.content.encode() for token in own.tokens}
        return extended

    def encode(self, text: str, *, special: bool = True, around: bool = True) -> list[int]:
        self.encoded.append(text)
        self.special, self.around = special, around
        return list(text.encode())

    def encode_piece(self, text: str, *, special: bool = True) -> list[int]:
        return self.encode(text, special=special, around=False)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        self.templates.append(chat_template)
        self.conversations.append([dict(message) for message in messages])
        self.variables.append(dict(template_kwargs or {}))
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return self.encode(text.removesuffix("\n") if continue_final_message else text + "assistant:" + self.opening)

    def conventions(self, chat_template: str | None = None) -> Conventions:
        return self.spoken

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        shown = [self.token_bytes(token) for token in token_ids if special or token < 256]
        return b"".join(shown).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else self.special_texts[token_id]


class FakeEngine:
    """Answers every sequence with `reply` of its adapter, byte by byte, then the end token.

    Attributes:
        refusal: raised instead of taking anything.
        hold_after: give out so many tokens, then nothing more until the iterator is closed.
        error_after: give out so many tokens, then fail the sequence.
        crash_after: give out so many tokens, then raise what is no error of ours.
        logprob_of: the log probability of each token of a reply.
    """

    def __init__(self) -> None:
        self.replies: dict[str | None, Sequence[int]] = {None: b"Hello world", "pirate": b"Arr, matey"}
        self.refusal: Exception | None = None
        self.hold_after: int | None = None
        self.error_after: int | None = None
        self.crash_after: int | None = None
        self.alive = True
        self.ready = True
        self.sequences: list[EngineSequence] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.holding = asyncio.Event()
        self.logprob_of: Callable[[EngineSequence], float] = lambda sequence: -0.5

    def submit(self, *sequences: EngineSequence) -> list[AsyncGenerator[TokenOutput, None]]:
        if self.refusal is not None:
            raise self.refusal
        return [self._generate(sequence) for sequence in sequences]

    async def _generate(self, sequence: EngineSequence) -> AsyncGenerator[TokenOutput, None]:
        self.sequences.append(sequence)
        self.running.add(sequence.id)
        try:
            async for output in self._outputs(sequence):
                yield output
        finally:
            self.running.discard(sequence.id)

    async def _outputs(self, sequence: EngineSequence) -> AsyncGenerator[TokenOutput, None]:
        if sequence.params.pooling:
            first = -1.0 if sequence.adapter else 1.0
            pooled = np.array([first * sequence.prompt[-1], len(sequence.prompt), sequence.params.pooling == "mean"])
            yield TokenOutput(finish_reason=FinishReason.LENGTH, pooled=pooled)
            return
        tokens = [*self.replies[sequence.adapter], END]
        if not sequence.params.max_tokens:
            yield self._first(sequence, TokenOutput(finish_reason=FinishReason.LENGTH))
            return
        for count, token in enumerate(tokens):
            if count == self.hold_after:
                self.holding.set()
                await asyncio.Event().wait()
            if count == self.error_after:
                yield TokenOutput(finish_reason=FinishReason.ERROR, error="the step of this request failed")
                return
            if count == self.crash_after:
                raise RuntimeError("a secret at 0x7f00 in /srv/model")
            await asyncio.sleep(0)
            yield self._output(sequence, token, count)
            if token in sequence.params.stop_token_ids or count + 1 == sequence.params.max_tokens:
                return

    def _output(self, sequence: EngineSequence, token: int, count: int) -> TokenOutput:
        finish = None
        if token in sequence.params.stop_token_ids:
            finish = FinishReason.STOP
        elif count + 1 == sequence.params.max_tokens:
            finish = FinishReason.LENGTH
        logprob = None
        if sequence.params.logprobs is not None:
            top = tuple((65 + rank, -1.0 - rank) for rank in range(sequence.params.logprobs))
            logprob = TokenLogprob(token, self.logprob_of(sequence), top)
        output = TokenOutput(token, logprob, finish)
        if finish is FinishReason.STOP:
            output = TokenOutput(finish_reason=finish, stopped_by=token, stopped_logprob=logprob)
        return self._first(sequence, output) if count == 0 else output

    def _first(self, sequence: EngineSequence, output: TokenOutput) -> TokenOutput:
        """Each token of a prompt is half as likely as the one before."""
        found: list[TokenLogprob] = []
        if sequence.params.prompt_logprobs is not None:
            for place, token in enumerate(sequence.prompt[sequence.params.prompt_logprobs_from :], start=1):
                top = tuple((65 + rank, -1.0 - rank) for rank in range(sequence.params.prompt_logprobs))
                found.append(TokenLogprob(token, -float(place), top))
        return replace(output, queue_seconds=0.002, first_token_seconds=0.01, prompt_logprobs=tuple(found))

    def abort(self, sequence_id: str) -> None:
        self.aborted.append(sequence_id)

    def residency(self, version: str) -> str:
        return "device" if version == VERSION else "disk"


@dataclass(frozen=True)
class FreeGrammar:
    """Of one sequence; everything may come."""

    shape: Shape
    ended = False
    is_ready = True
    is_slow = False
    mask_seconds = 0.0

    def advance(self, token: int) -> None: ...

    def on_ready(self, call: Callable[[], None]) -> None:
        call()

    def mask(self, patience: float | None = None) -> npt.NDArray[np.uint32]:
        return np.full(9, 2**32 - 1, np.uint32)


class FakeGrammars:
    """Refuses the regex "(", and everything where `failure` is set.

    `asked` are the shapes, each with its parameter, `threads` where they were asked for.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.asked: list[tuple[Shape, str]] = []
        self.threads: set[int] = set()

    def of(self, shape: Shape, param: str, own: OwnTokens | None = None) -> FreeGrammar:
        self.asked.append((shape, param))
        self.threads.add(threading.get_ident())
        if self.failure is not None:
            raise self.failure
        if shape == Shape("regex", "("):
            raise RequestError(f"'{param}': a group is not closed", param=param, code="invalid_value")
        return FreeGrammar(shape)


def record_of(
    name: str,
    version: str,
    *,
    rank: int = 8,
    target_modules: Sequence[str] = ("q_proj",),
    fingerprint: str = "none",
    older: Sequence[VersionRecord] = (),
    layers: LayerCount | None = None,
    notes: Sequence[str] = (),
) -> AdapterRecord:
    """An adapter of 1000 bytes whose current version is this one, and which keeps `older` ones too."""
    current = VersionRecord(
        version=version,
        rank=rank,
        target_modules=[*target_modules],
        nbytes=1000,
        created=1_700_000_000,
        base_verified=True,
        corrupt=False,
        fingerprint=fingerprint,
        layers=layers,
        notes=[*notes],
    )
    return AdapterRecord(
        name=name,
        version=version,
        rank=rank,
        target_modules=current.target_modules,
        nbytes=current.nbytes,
        created=current.created,
        updated=current.created,
        base_verified=current.base_verified,
        corrupt=current.corrupt,
        pinned=False,
        versions=[current, *older],
        references=0,
        fingerprint=fingerprint,
        layers=layers,
        notes=current.notes,
    )


@dataclass
class FakeStore:
    """Names in a dictionary, files below `root`. `leased` counts references that are held."""

    root: Path
    known: dict[str, AdapterRecord] = field(default_factory=dict)
    leased: int = 0
    failure: Exception | None = None
    pin_bytes: int = 1000
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # of what was published, by name

    def acquire(self, name: str, version_prefix: str | None = None) -> Lease:
        record = self.record(name)
        if version_prefix is not None and not record.version.startswith(version_prefix):
            raise AdapterNotFound("no version of it has this digest prefix")
        self.leased += 1
        return Lease(name, record.version, record.rank, record.nbytes, self._released)

    def _released(self, lease: Lease) -> None:
        self.leased -= 1

    def record(self, name: str) -> AdapterRecord:
        if self.failure is not None:
            raise self.failure
        if name not in self.known:
            raise AdapterNotFound("there is no adapter of this name")
        return self.known[name]

    def records(self, *, pinned: bool = False) -> list[AdapterRecord]:
        if self.failure is not None:
            raise self.failure
        return [record for record in self.known.values() if record.pinned or not pinned]

    def delete(self, name: str) -> None:
        self.record(name)
        del self.known[name]

    def rollback(self, name: str, version_prefix: str | None = None) -> Published:
        record = self.record(name)
        older = [one for one in record.versions[1:] if one.version.startswith(version_prefix or "")]
        if version_prefix is not None and record.version.startswith(version_prefix):
            return Published(name, record.version, "unchanged")
        if not older:
            raise RollbackImpossible("no older version") if version_prefix is None else AdapterNotFound("no such one")
        self.known[name] = record_of(name, older[0].version)
        return Published(name, older[0].version, "rolled_back")

    def pin(self, name: str) -> None:
        record = self.record(name)
        if record.nbytes > self.pin_bytes:
            raise PinRefused(name, record.nbytes, pinned=0, limit=self.pin_bytes)
        self.known[name] = replace(record, pinned=True)

    def unpin(self, name: str) -> None:
        self.known[name] = replace(self.record(name), pinned=False)

    def directory(self, version: str) -> Path:
        return self.root / version

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        directory = self.root / "staging"
        directory.mkdir()
        try:
            yield Staging(directory)
        finally:
            shutil.rmtree(directory)

    def publish(self, name: str, staging: Staging, checked: Checked, proof: ReplayOutcome) -> Published:
        if self.failure is not None:
            raise self.failure
        files = {path.name: path.read_bytes() for path in staging.directory.iterdir()}
        version = hashlib.sha256(repr((checked.version, sorted(files.items()))).encode()).hexdigest()
        old = self.known.get(name)
        self.files[name] = files
        self.known[name] = record_of(
            name,
            version,
            rank=checked.rank,
            target_modules=checked.target_modules,
            fingerprint=proof,
            layers=checked.layers,
            notes=checked.notes,
        )
        if old is None:
            return Published(name, version, "created")
        return Published(name, version, "unchanged" if old.version == version else "updated")


@dataclass
class FakeCheck:
    """Accepts everything, unless `failure` is set. `seen` are the file names of each upload, `forced` its flag."""

    failure: Exception | None = None
    seen: list[list[str]] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)

    def __call__(self, directory: Path, *, force: bool) -> Checked:
        self.seen.append(sorted(path.name for path in directory.iterdir()))
        self.forced.append(force)
        if self.failure is not None:
            raise self.failure
        return Checked(
            config=AdapterConfig(rank=4, alpha=4.0),
            adapter=HostAdapter(version="0" * 64, rank=4, nbytes=0, modules={}),
            target_modules=["q_proj", "v_proj"],
            base_id=None,
            base_verified=False,
        )


@dataclass
class FakeProve:
    """Accepts everything, unless `failure` is set; `seen` are the flags that were set of each call."""

    failure: Exception | None = None
    outcome: ReplayOutcome = "none"
    seen: list[set[str]] = field(default_factory=list)

    async def __call__(
        self,
        directory: Path,
        checked: Checked,
        *,
        force: bool = False,
        allow_no_effect: bool = False,
        skip_replay: bool = False,
        keep: bool = True,
    ) -> ReplayOutcome:
        assert (directory / "adapter_model.safetensors").exists()
        flags = {"force": force, "allow_no_effect": allow_no_effect, "skip_replay": skip_replay, "keep": keep}
        self.seen.append({flag for flag, given in flags.items() if given})
        if self.failure is not None:
            raise self.failure
        return self.outcome


@dataclass
class Server:
    """The app and the fakes behind it. The adapter `pirate` is registered."""

    engine: FakeEngine
    store: FakeStore
    check: FakeCheck
    tokenizer: FakeTokenizer
    metrics: Metrics
    deps: Dependencies
    app: FastAPI

    def client(self, **options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, **({"base_url": "http://localhost"} | options))

    async def post(self, path: str, body: object) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, json=body)

    def metric(self, line: str) -> float:
        """The value of the sample that is written like this; 0 if there is none."""
        for row in self.metrics.render().decode().splitlines():
            name, _, value = row.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0


def usage_of(prompt: int, completion: int) -> dict[str, Any]:
    """The `usage` of a reply whose prompt was not in the cache."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return counts | {"prompt_tokens_details": {"cached_tokens": 0}}


def make_server(
    root: Path,
    *,
    keys: Keys | None = None,
    context: int = CONTEXT,
    reply: int | None = None,
    lora_path_root: LoraPathRoot | None = None,
    grammars: GrammarsLike | None = None,
    **limits: Any,
) -> Server:
    engine, store, check, tokenizer = FakeEngine(), FakeStore(root), FakeCheck(), FakeTokenizer()
    store.known["pirate"] = record_of("pirate", VERSION)
    keys = replace(keys or Keys(), file=AccessFile(root / "keys"), audit=AuditFile(root / "keys"))
    deps = Dependencies(
        engine=engine,
        store=store,
        pins=Pins(store, host=lambda versions: None, device=lambda versions: None, host_bytes=0, device_rows=0),
        tokenizer=tokenizer,
        check=check,
        prove=FakeProve(),
        publish=store.publish,
        metrics=Metrics(),
        base=ServedBase(BASE_NAME, base_id="ba5e" * 16, context=context, reply=reply or context, created=1_700_000_000),
        keys=keys,
        limits=replace(Limits(), **limits),
        grammars=grammars or FakeGrammars(),
        lora_path_root=lora_path_root,
    )
    return Server(engine, store, check, tokenizer, deps.metrics, deps, create_app(deps))
