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
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.verify import Checked
from loramux_server.engine.scheduling.sequence import NOT_FINITE, AdapterUse, FinishReason, SamplingParams, TokenOutput
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.errors import SequenceFailed, ServerBusy
from loramux_server.fingerprint.file import MAX_BYTES, Fingerprint, Witness, parse
from loramux_server.fingerprint.replay import ReplayOutcome, Scored, Verdict, foreign, judge

_PROBES = (8, 5, 24)  # tokens of each probe prompt; the later ones are asked only if the ones before showed nothing
_STRIDE = 7919  # a prime: probe prompts hold tokens from all over the vocabulary
_AT_A_TIME = 4  # sequences of one fingerprint in the engine's queue
_RETRY_SECONDS = 30
_MOST = 30  # times the seconds that a trial may stand still: how long all of it may take
_LOOKS = 10  # in these seconds, at how far it is


class Generate(Protocol):
    """`EngineClient.generate`."""

    def __call__(self, sequence: EngineSequence) -> AsyncIterator[TokenOutput]: ...


class ProofObserver(Protocol):
    """Told how proofs end, on the event loop."""

    def proved(self, *, acts: bool, fingerprint: str) -> None:
        """How its fingerprint replayed: a `ReplayOutcome`."""


class _Trial:
    """How far the sequences of one adapter's trial are. Owner: the event loop; the engine's counts are only read."""

    def __init__(self) -> None:
        self._sequences: list[EngineSequence] = []
        self._outputs = 0

    def began(self, sequence: EngineSequence) -> None:
        self._sequences.append(sequence)

    def told(self) -> None:
        """An output has come."""
        self._outputs += 1

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever the engine has done something for it."""
        return self._outputs, sum(sequence.num_computed for sequence in self._sequences)


class Prover:
    """Owner: the event loop; `prove_blocking` is for all other threads."""

    def __init__(
        self,
        generate: Generate,
        holding: Callable[[HostAdapter], AbstractContextManager[None]],
        is_resident: Callable[[str], bool],
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
            is_resident: whether a version is on the device now.
            forget: told of a version that is there for its trial alone and will not be published.
            vocabulary: token ids are below it.
            context: longest prompt and reply together.
            timeout: seconds in which a trial must get on; many times as long, it may take.
        """
        self._generate = generate
        self._holding = holding
        self._is_resident = is_resident
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
        self,
        directory: Path,
        checked: Checked,
        *,
        force: bool = False,
        allow_no_effect: bool = False,
        skip_replay: bool = False,
        keep: bool = True,
    ) -> ReplayOutcome:
        """How the fingerprint in `directory` replays. Nothing is stored, and nothing stays in host memory.

        Args:
            checked: what `check_adapter` found in these files; its adapter is what is tried out.
            force: take an adapter whose fingerprint does not replay.
            allow_no_effect: take one that leaves the base as it is.
            skip_replay: read its fingerprint, but do not replay it.
            keep: it will be published, so let it stay on the device.
        Raises:
            AdapterRejected: it has no effect, its output is not finite, or its fingerprint is malformed or does not
                replay.
            ServerBusy: it did not get on beside the requests; also ServerDraining, EngineDead.
            SequenceFailed: the engine failed.
        """
        fingerprint = await asyncio.to_thread(_read_fingerprint, directory)
        if fingerprint is not None:
            self._check_fits(fingerprint, checked)
        was_there = self._is_resident(checked.version)  # then some name has it already
        try:
            with self._holding(checked.adapter):
                acts, verdict = await self._tried(checked, None if skip_replay else fingerprint)
            if skip_replay and fingerprint is not None:
                verdict = Verdict("skipped")
            self._judge(acts, verdict, force=force, allow_no_effect=allow_no_effect)
        except BaseException:
            if not was_there:
                self._forget(checked.version)
            raise
        if not keep and not was_there:
            self._forget(checked.version)
        return verdict.outcome

    async def _tried(self, checked: Checked, fingerprint: Fingerprint | None) -> tuple[bool, Verdict]:
        """Whether it acts, and how the fingerprint replays. Raises ServerBusy if that does not get on, or not end."""
        use = AdapterUse(checked.version, checked.rank, checked.adapter.nbytes)
        trial = _Trial()
        try:
            async with asyncio.timeout(self._timeout) as deadline:
                watching = asyncio.create_task(self._put_off(deadline, trial))
                try:
                    acts = await self._acts(use, trial)
                    verdict = Verdict("none")
                    if fingerprint is not None:
                        verdict = await self._replay(fingerprint, use, trial)
                    return acts, verdict
                finally:
                    watching.cancel()
        except TimeoutError as error:
            raise ServerBusy(
                f"the trial of the adapter made no progress in {self._timeout:g} seconds beside the requests that are "
                f"served, or did not end in {self._timeout * _MOST:g}; nothing was stored, try again later",
                retry_after=_RETRY_SECONDS,
            ) from error

    async def _put_off(self, deadline: asyncio.Timeout, trial: _Trial) -> None:
        """Puts the deadline off while the trial gets on, for all the time that it may take."""
        loop = asyncio.get_running_loop()
        last, seen = loop.time() + self._timeout * _MOST, trial.progress
        while True:
            await asyncio.sleep(self._timeout / _LOOKS)
            if deadline.expired():
                return
            if trial.progress != seen:
                seen = trial.progress
                deadline.reschedule(min(loop.time() + self._timeout, last))

    def _judge(self, acts: bool, verdict: Verdict, *, force: bool, allow_no_effect: bool) -> None:
        """Raises AdapterRejected for what is not to be published."""
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
            raise AdapterRejected(reasons)

    def prove_blocking(self, directory: Path, checked: Checked) -> ReplayOutcome:
        """`prove` for a thread that is not the event loop's; before `start` nothing is tried and it is "none"."""
        if self._loop is None:
            return "none"
        return asyncio.run_coroutine_threadsafe(self.prove(directory, checked), self._loop).result()

    async def _acts(self, use: AdapterUse, trial: _Trial) -> bool:
        """Whether any logit of any probe prompt is another than the base's."""
        params = SamplingParams(temperature=0.0, max_tokens=1, digests=True)
        for probe, length in enumerate(_PROBES):
            prompt = [(13 + probe + _STRIDE * position) % self._vocabulary for position in range(length)]
            if probe not in self._base:
                (output,) = await self._ask(trial, prompt, params, ())
                assert output.digest is not None
                self._base[probe] = output.digest
            (output,) = await self._ask(trial, prompt, params, (use,))
            if output.digest != self._base[probe]:
                return True
        return False

    async def _replay(self, fingerprint: Fingerprint, use: AdapterUse, trial: _Trial) -> Verdict:
        verdict = foreign(fingerprint, base_id=self._base_id, version=use.version)
        if verdict is not None:
            return verdict
        places, replay = asyncio.Semaphore(_AT_A_TIME), f"replay-{uuid.uuid4().hex}"

        async def score(witness: Witness) -> list[Scored]:
            params = SamplingParams(temperature=0.0, max_tokens=len(witness.tokens), logprobs=1, forced=witness.tokens)
            async with places:
                outputs = await self._ask(trial, list(witness.ids), params, (use,), replay)
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
        self,
        trial: _Trial,
        prompt: list[int],
        params: SamplingParams,
        adapters: tuple[AdapterUse, ...],
        group: str = "",
    ) -> Sequence[TokenOutput]:
        """All tokens of one background sequence.

        It finds nothing in the prefix cache but what sequences of this `group` computed, so that what is proved is what
        the adapter computes now.
        """
        name = f"proof-{uuid.uuid4().hex}"
        sequence = EngineSequence(name, prompt, params, adapters, background=True, cache_group=group or name)
        trial.began(sequence)
        stream, outputs = self._generate(sequence), []
        try:
            async for output in stream:
                outputs.append(output)
                trial.told()
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()
        last = outputs[-1]
        if last.finish_reason is FinishReason.LENGTH:
            return outputs
        if last.error == NOT_FINITE:
            raise AdapterRejected(["its output on the probe prompts is not finite"])
        raise SequenceFailed(f"the adapter could not be tried out: {last.error or 'the engine ended the attempt'}")

    def _check_fits(self, fingerprint: Fingerprint, checked: Checked) -> None:
        tokens = checked.adapter.tokens
        sizes = {} if tokens is None else tokens.sizes
        # What is read has an embedding, what is said a row of the head; an adapter may add to either.
        reads, says = (max(self._vocabulary, sizes.get(side, 0)) for side in ("embedding", "head"))
        reasons = []
        if any(
            max(said.ids, default=0) >= reads or max(said.tokens, default=0) >= min(reads, says)
            for said in fingerprint.prompts
        ):
            reasons.append(f"fingerprint.json holds tokens that a vocabulary of {min(reads, says)} does not have")
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
