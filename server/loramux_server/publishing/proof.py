"""Proves an adapter before it is published: that it changes the base's answers, and answers as when it was made.

Both questions are background sequences in the engine's own queue, on the kernels that will serve the adapter, so they
hold up running requests by a few tokens of a step and no more.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from loramux_adapters.artifact.format import FINGERPRINT_FILE
from loramux_adapters.artifact.own_files import open_regular
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.verify import Checked
from loramux_server.engine.sequence import NOT_FINITE, AdapterUse, FinishReason, SamplingParams, TokenOutput
from loramux_server.engine.sequence import Sequence as EngineSequence
from loramux_server.errors import SequenceFailed, ServerBusy
from loramux_server.fingerprint.file import MAX_BYTES, Fingerprint, Witness, parse
from loramux_server.fingerprint.replay import ReplayOutcome, Scored, Verdict, foreign, judge

_PROBES = (8, 5, 24)  # tokens of each probe prompt; the later ones are asked only if the ones before showed nothing
_STRIDE = 7919  # a prime: probe prompts hold tokens from all over the vocabulary
_AT_A_TIME = 4  # sequences of one fingerprint in the engine's queue
_RETRY_SECONDS = 30


class Generate(Protocol):
    """`EngineClient.generate`."""

    def __call__(self, sequence: EngineSequence) -> AsyncIterator[TokenOutput]: ...


class ProofObserver(Protocol):
    """Told how proofs end, on the event loop."""

    def proved(self, *, acts: bool, fingerprint: str) -> None:
        """How its fingerprint replayed: a `ReplayOutcome`."""


class Prover:
    """Owner: the event loop; `prove_blocking` is for all other threads."""

    def __init__(
        self,
        generate: Generate,
        holding: Callable[[HostAdapter], AbstractContextManager[None]],
        forget: Callable[[str], None],
        observer: ProofObserver,
        *,
        base_id: str,
        numerics_id: str,
        vocabulary: int,
        context: int,
        timeout: float,
    ) -> None:
        """
        Args:
            holding: has the engine find this adapter in host memory while it lasts.
            forget: told of a version that was tried out and refused, so that it need not stay on the device.
            vocabulary: token ids are below it.
            context: longest prompt and reply together.
            timeout: seconds for one adapter.
        """
        self._generate = generate
        self._holding = holding
        self._forget = forget
        self._observer = observer
        self._base_id = base_id
        self._numerics_id = numerics_id
        self._vocabulary = vocabulary
        self._context = context
        self._timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._base: dict[int, bytes] = {}  # probe -> digest of the base's logits

    def start(self) -> None:
        """On the event loop, when the engine takes sequences."""
        self._loop = asyncio.get_running_loop()

    async def prove(
        self, directory: Path, checked: Checked, *, force: bool = False, allow_no_effect: bool = False
    ) -> ReplayOutcome:
        """How the fingerprint in `directory` replays. Nothing is stored, and nothing stays in host memory.

        Args:
            checked: what `check_adapter` found in these files; its adapter is what is tried out.
            force: take an adapter whose fingerprint does not replay.
            allow_no_effect: take one that leaves the base as it is.
        Raises:
            AdapterRejected: it has no effect, its output is not finite, or its fingerprint is malformed or does not
                replay.
            ServerBusy: there was not enough time beside the requests; also ServerDraining, EngineDead.
            SequenceFailed: the engine failed.
        """
        version = checked.version
        fingerprint = await asyncio.to_thread(_read_fingerprint, directory)
        if fingerprint is not None:
            self._check_fits(fingerprint)
        use = AdapterUse(version, checked.rank, checked.adapter.nbytes)
        try:
            with self._holding(checked.adapter):
                async with asyncio.timeout(self._timeout):
                    acts = await self._acts(use)
                    verdict = Verdict("none")
                    if fingerprint is not None:
                        verdict = await self._replay(fingerprint, use)
        except TimeoutError as error:
            raise ServerBusy(
                f"the adapter could not be tried out in {self._timeout:g} seconds beside the requests that are "
                "served; nothing was stored, try again later",
                retry_after=_RETRY_SECONDS,
            ) from error
        self._observer.proved(acts=acts, fingerprint=verdict.outcome)
        reasons = []
        if not acts and not allow_no_effect:
            reasons.append(
                "it has no effect: on the probe prompts every logit is exactly the base's (an untrained adapter, or "
                "one whose weights round to nothing); ?allow_no_effect=true stores it all the same"
            )
        if verdict.outcome == "mismatch" and not force:
            reasons.append(
                f"its fingerprint does not replay on this server: {verdict.reason}; ?force=true stores it all the same"
            )
        if reasons:
            self._forget(version)
            raise AdapterRejected(reasons)
        return verdict.outcome

    def prove_blocking(self, directory: Path, checked: Checked) -> ReplayOutcome:
        """`prove` for a thread that is not the event loop's; before `start` nothing is tried and it is "none"."""
        if self._loop is None:
            return "none"
        return asyncio.run_coroutine_threadsafe(self.prove(directory, checked), self._loop).result()

    async def _acts(self, use: AdapterUse) -> bool:
        """Whether any logit of any probe prompt is another than the base's."""
        params = SamplingParams(temperature=0.0, max_tokens=1, digests=True)
        for probe, length in enumerate(_PROBES):
            prompt = [(13 + probe + _STRIDE * position) % self._vocabulary for position in range(length)]
            if probe not in self._base:
                (output,) = await self._ask(prompt, params, ())
                assert output.digest is not None
                self._base[probe] = output.digest
            (output,) = await self._ask(prompt, params, (use,))
            if output.digest != self._base[probe]:
                return True
        return False

    async def _replay(self, fingerprint: Fingerprint, use: AdapterUse) -> Verdict:
        verdict = foreign(fingerprint, base_id=self._base_id, version=use.version)
        if verdict is not None:
            return verdict
        places, replay = asyncio.Semaphore(_AT_A_TIME), f"replay-{uuid.uuid4().hex}"

        async def score(witness: Witness) -> list[Scored]:
            params = SamplingParams(temperature=0.0, max_tokens=len(witness.tokens), logprobs=1, forced=witness.tokens)
            async with places:
                outputs = await self._ask(list(witness.ids), params, (use,), replay)
            return [_scored(output) for output in outputs]

        first, *others = fingerprint.prompts
        found = [await score(first)]  # the others find in the cache what they begin with as it does
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(score(witness)) for witness in others]
        except ExceptionGroup as several:
            raise several.exceptions[0] from several
        found += [task.result() for task in tasks]
        return judge(fingerprint.prompts, found, same_numerics=fingerprint.numerics_id == self._numerics_id)

    async def _ask(
        self, prompt: list[int], params: SamplingParams, adapters: tuple[AdapterUse, ...], group: str = ""
    ) -> Sequence[TokenOutput]:
        """All tokens of one background sequence.

        It finds nothing in the prefix cache but what sequences of this `group` computed, so that what is proved is what
        the adapter computes now.
        """
        name = f"proof-{uuid.uuid4().hex}"
        stream = self._generate(
            EngineSequence(name, prompt, params, adapters, background=True, cache_group=group or name)
        )
        try:
            outputs = [output async for output in stream]
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()
        last = outputs[-1]
        if last.finish_reason is FinishReason.LENGTH:
            return outputs
        if last.error == NOT_FINITE:
            raise AdapterRejected(["its output on the probe prompts is not finite"])
        raise SequenceFailed(f"the adapter could not be tried out: {last.error or 'the engine ended the attempt'}")

    def _check_fits(self, fingerprint: Fingerprint) -> None:
        reasons = []
        if any(token >= self._vocabulary for said in fingerprint.prompts for token in (*said.ids, *said.tokens)):
            reasons.append(f"fingerprint.json holds tokens that a vocabulary of {self._vocabulary} does not have")
        if any(len(said.ids) + len(said.tokens) > self._context for said in fingerprint.prompts):
            reasons.append(f"fingerprint.json holds a prompt and reply longer than the context of {self._context}")
        if reasons:
            raise AdapterRejected(reasons)


def _read_fingerprint(directory: Path) -> Fingerprint | None:
    path = directory / FINGERPRINT_FILE
    if not path.exists():
        return None
    with open_regular(path) as file:
        return parse(file.read(MAX_BYTES + 1))


def _scored(output: TokenOutput) -> Scored:
    assert output.logprob is not None
    ((_, best),) = output.logprob.top
    return Scored(output.logprob.logprob, best)
