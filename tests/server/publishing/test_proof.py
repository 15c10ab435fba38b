"""An adapter is tried out before it is published; here on a fake engine with made-up logits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from loramux_adapters.artifact.format import digest_of, read_config
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.token_rows import SIDES, Side, TokenRows
from loramux_adapters.lora.verify import Checked
from loramux_server.engine.scheduling.sequence import NOT_FINITE, FinishReason, Sequence, TokenLogprob, TokenOutput
from loramux_server.errors import SequenceFailed, ServerBusy
from loramux_server.fingerprint.file import Fingerprint, Witness
from loramux_server.publishing.proof import Prover
from support.adapter_files import TINY_LINEARS, write_adapter

BASE_ID, NUMERICS, VOCABULARY, CONTEXT = "ba5e" * 16, "here", 300, 64


class FakeEngine:
    """Logits depend on the prompt's length and, if the adapter `acts` on prompts so long, on the adapter."""

    def __init__(self) -> None:
        self.acts_from = 0  # shortest prompt on which the adapter shows
        self.offset = 0.0  # added to the log probability of every token
        self.error: str | None = None  # of adapter sequences
        self.hangs = False
        self.pause = 0.0  # before each token, and before each of so many parts of a prompt that are read
        self.reads = 0
        self.sequences: list[Sequence] = []
        self.running = self.most = 0

    async def generate(self, sequence: Sequence) -> AsyncIterator[TokenOutput]:
        self.sequences.append(sequence)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            if self.hangs:
                await asyncio.Event().wait()
            if self.error is not None and sequence.adapters:
                yield TokenOutput(finish_reason=FinishReason.ERROR, error=self.error)
                return
            for _ in range(self.reads):
                await asyncio.sleep(self.pause)
                sequence.num_computed += 1
            for index in range(sequence.params.max_tokens):
                await asyncio.sleep(self.pause)
                yield self._output(sequence, index)
        finally:
            self.running -= 1

    def _output(self, sequence: Sequence, index: int) -> TokenOutput:
        length, params = len(sequence.prompt), sequence.params
        acts = sequence.adapters and length >= self.acts_from
        reason = FinishReason.LENGTH if index + 1 == params.max_tokens else None
        if not params.forced:
            return TokenOutput(1, None, reason, digest=b"%d %d" % (length, bool(acts)) if params.digests else None)
        logprob = -0.5 - index + self.offset
        return TokenOutput(params.forced[index], TokenLogprob(params.forced[index], logprob, ((9, logprob),)), reason)


class Rig:
    def __init__(self, directory: Path, timeout: float = 10.0) -> None:
        self.directory = directory
        self.engine = FakeEngine()
        self.held: list[HostAdapter] = []
        self.resident: set[str] = set()
        self.forgotten: list[str] = []
        self.proofs: list[tuple[bool, str]] = []
        self.version = digest_of(read_config(directory), directory)
        self.checked = Checked(read_config(directory), HostAdapter(self.version, 8, 100, {}), ["q_proj"], None, False)
        self.prover = Prover(
            self.engine.generate,
            self.holding,
            self.resident.__contains__,
            self.forgotten.append,
            self,
            base_id=BASE_ID,
            numerics_id=NUMERICS,
            vocabulary=VOCABULARY,
            context=CONTEXT,
            timeout=timeout,
        )

    @contextmanager
    def holding(self, adapter: HostAdapter) -> Iterator[None]:
        self.held.append(adapter)
        try:
            yield
        finally:
            self.held.remove(adapter)

    def proved(self, *, acts: bool, fingerprint: str) -> None:
        self.proofs.append((acts, fingerprint))

    def write_fingerprint(self, **changes: object) -> None:
        said = Witness("p", (1, 2, 3), "r", (4, 5), (-0.5, -1.5))
        fingerprint = Fingerprint(NUMERICS, BASE_ID, self.version, (said,) * 9)
        raw = json.dumps(replace(fingerprint, **changes).as_json())  # type: ignore[arg-type]
        (self.directory / "fingerprint.json").write_text(raw)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(write_adapter(tmp_path / "adapter", TINY_LINEARS))


@pytest.mark.anyio
async def test_an_adapter_that_changes_any_logit_is_accepted_after_one_short_prompt(rig: Rig) -> None:
    assert await rig.prover.prove(rig.directory, rig.checked) == "none"
    base, probe = rig.engine.sequences
    assert base.adapters == () and probe.adapters[0].version == rig.version and probe.adapters[0].rank == 8
    assert base.prompt == probe.prompt and len(probe.prompt) <= 8
    assert all(sequence.background and sequence.adapter is None for sequence in rig.engine.sequences)
    assert rig.proofs == [(True, "none")] and rig.held == [] and rig.forgotten == []


@pytest.mark.anyio
async def test_the_base_is_asked_once_for_all_adapters(rig: Rig) -> None:
    for _ in range(3):
        await rig.prover.prove(rig.directory, rig.checked)
    assert sum(not sequence.adapters for sequence in rig.engine.sequences) == 1


@pytest.mark.anyio
async def test_an_adapter_that_shows_only_on_a_longer_prompt_acts(rig: Rig) -> None:
    rig.engine.acts_from = 20
    await rig.prover.prove(rig.directory, rig.checked)
    assert rig.proofs == [(True, "none")]


@pytest.mark.anyio
async def test_an_adapter_without_effect_is_refused_unless_that_is_allowed(rig: Rig) -> None:
    rig.engine.acts_from = 1000
    with pytest.raises(AdapterRejected, match="no effect.*allow_no_effect=true"):
        await rig.prover.prove(rig.directory, rig.checked, force=True)
    assert rig.forgotten == [rig.version] and rig.held == []
    assert await rig.prover.prove(rig.directory, rig.checked, allow_no_effect=True) == "none"
    assert rig.proofs == [(False, "none")] * 2


@pytest.mark.anyio
async def test_a_fingerprint_that_replays_bit_for_bit_is_exact_and_few_prompts_run_at_a_time(rig: Rig) -> None:
    rig.write_fingerprint()
    assert await rig.prover.prove(rig.directory, rig.checked) == "exact"
    replayed = [sequence for sequence in rig.engine.sequences if sequence.params.forced]
    assert len(replayed) == 9 and all(sequence.background for sequence in replayed)
    assert replayed[0].prompt == [1, 2, 3] and replayed[0].params.forced == (4, 5)
    assert 1 < rig.engine.most <= 4


@pytest.mark.anyio
async def test_another_path_may_differ_a_little_and_the_same_path_may_not(rig: Rig) -> None:
    rig.engine.offset = 0.05
    rig.write_fingerprint(numerics_id="elsewhere")
    assert await rig.prover.prove(rig.directory, rig.checked) == "within_tolerance"
    rig.write_fingerprint()
    with pytest.raises(AdapterRejected, match="does not replay.*force=true"):
        await rig.prover.prove(rig.directory, rig.checked, allow_no_effect=True)
    assert await rig.prover.prove(rig.directory, rig.checked, force=True) == "mismatch"
    assert [outcome for _, outcome in rig.proofs] == ["within_tolerance", "mismatch", "mismatch"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "reason"), [({"base_id": "0" * 64}, "another base"), ({"version": "0" * 64}, "another adapter")]
)
async def test_a_foreign_fingerprint_is_a_mismatch_without_a_replay(
    rig: Rig, changes: dict[str, object], reason: str
) -> None:
    rig.write_fingerprint(**changes)
    with pytest.raises(AdapterRejected, match=reason):
        await rig.prover.prove(rig.directory, rig.checked)
    assert not any(sequence.params.forced for sequence in rig.engine.sequences)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "said",
    [Witness("p", (1, VOCABULARY), "r", (4,), (-0.5,)), Witness("p", (1,) * CONTEXT, "r", (4,), (-0.5,))],
    ids=["token", "length"],
)
async def test_a_fingerprint_that_the_base_cannot_run_is_refused_before_anything_runs(rig: Rig, said: Witness) -> None:
    rig.write_fingerprint(prompts=(said,))
    with pytest.raises(AdapterRejected, match="fingerprint.json holds"):
        await rig.prover.prove(rig.directory, rig.checked, force=True)
    assert rig.engine.sequences == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("ids", "tokens", "fits"),
    [((1, 301), (301,), True), ((1, 302), (4,), False), ((1, 2), (302,), False), ((301,), (303,), False)],
)
async def test_a_fingerprint_may_hold_tokens_that_the_adapter_adds(
    rig: Rig, ids: tuple[int, ...], tokens: tuple[int, ...], fits: bool
) -> None:
    sizes: dict[Side, int] = {"embedding": VOCABULARY + 2, "head": VOCABULARY + 4}
    own = TokenRows(None, None, None, None, sizes, dict.fromkeys(SIDES, VOCABULARY))
    checked = replace(rig.checked, adapter=replace(rig.checked.adapter, tokens=own))
    rig.write_fingerprint(prompts=(Witness("p", ids, "r", tokens, (-0.5,)),))
    if fits:
        assert await rig.prover.prove(rig.directory, checked) == "exact"
    else:
        with pytest.raises(AdapterRejected, match="a vocabulary of 302 does not have"):
            await rig.prover.prove(rig.directory, checked)


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}', "null"])
async def test_a_fingerprint_that_is_none_is_refused(rig: Rig, text: str) -> None:
    (rig.directory / "fingerprint.json").write_text(text)
    with pytest.raises(AdapterRejected, match="fingerprint.json"):
        await rig.prover.prove(rig.directory, rig.checked)


@pytest.mark.anyio
async def test_output_that_is_not_finite_is_the_adapters_fault_and_other_failures_are_ours(rig: Rig) -> None:
    rig.engine.error = NOT_FINITE
    with pytest.raises(AdapterRejected, match="not finite"):
        await rig.prover.prove(rig.directory, rig.checked)
    rig.engine.error = "the step failed"
    with pytest.raises(SequenceFailed, match="the step failed"):
        await rig.prover.prove(rig.directory, rig.checked)
    assert rig.held == []


@pytest.mark.anyio
async def test_a_failure_within_a_replay_is_that_failure(rig: Rig) -> None:
    rig.write_fingerprint()
    plain = rig.engine._output

    def failing(sequence: Sequence, index: int) -> TokenOutput:
        if sequence.params.forced:
            return TokenOutput(finish_reason=FinishReason.ERROR, error=NOT_FINITE)
        return plain(sequence, index)

    rig.engine._output = failing  # type: ignore[method-assign]
    with pytest.raises(AdapterRejected, match="not finite"):
        await rig.prover.prove(rig.directory, rig.checked)


@pytest.mark.anyio
async def test_an_engine_without_time_for_it_means_try_again_and_leaves_nothing_behind(rig: Rig) -> None:
    slow = Rig(rig.directory, timeout=0.01)
    slow.engine.hangs = True
    with pytest.raises(ServerBusy, match=r"no progress in 0\.01 seconds.*nothing was stored") as error:
        await slow.prover.prove(slow.directory, slow.checked)
    assert error.value.retry_after > 1
    assert slow.engine.running == 0 and slow.held == [] and slow.proofs == []
    assert slow.forgotten == [slow.version]


@pytest.mark.anyio
@pytest.mark.parametrize(("reads", "tokens"), [(12, 1), (0, 12)], ids=["reading a prompt", "with tokens"])
async def test_a_trial_that_gets_on_has_more_time_than_one_that_stands_still(rig: Rig, reads: int, tokens: int) -> None:
    busy = Rig(rig.directory, timeout=0.2)
    busy.write_fingerprint(
        prompts=(Witness("p", (1, 2), "r", (4,) * tokens, tuple(-0.5 - at for at in range(tokens))),)
    )
    busy.engine.reads, busy.engine.pause = reads, 0.05
    assert await busy.prover.prove(busy.directory, busy.checked) == "exact"
    busy.engine.pause = 0.5
    with pytest.raises(ServerBusy):
        await busy.prover.prove(busy.directory, busy.checked)


@pytest.mark.anyio
async def test_a_trial_that_gets_on_and_never_ends_is_given_up(rig: Rig) -> None:
    async def generate(sequence: Sequence) -> AsyncIterator[TokenOutput]:
        while True:
            await asyncio.sleep(0.001)
            yield TokenOutput(5, None, None)

    endless = Rig(rig.directory, timeout=0.02)
    endless.prover._generate = generate
    with pytest.raises(ServerBusy, match=r"did not end in 0\.6"):
        await asyncio.wait_for(endless.prover.prove(endless.directory, endless.checked), 5)


@pytest.mark.anyio
async def test_a_replay_can_be_skipped_and_that_is_the_outcome(rig: Rig) -> None:
    rig.write_fingerprint(base_id="0" * 64)
    assert await rig.prover.prove(rig.directory, rig.checked, skip_replay=True) == "skipped"
    assert rig.proofs == [(True, "skipped")] and not any(sequence.params.forced for sequence in rig.engine.sequences)
    (rig.directory / "fingerprint.json").unlink()
    assert await rig.prover.prove(rig.directory, rig.checked, skip_replay=True) == "none"


@pytest.mark.anyio
async def test_what_is_not_to_be_published_does_not_stay_on_the_device(rig: Rig) -> None:
    await rig.prover.prove(rig.directory, rig.checked)
    assert rig.forgotten == []
    await rig.prover.prove(rig.directory, rig.checked, keep=False)
    assert rig.forgotten == [rig.version]
    rig.resident.add(rig.version)
    await rig.prover.prove(rig.directory, rig.checked, keep=False)
    assert rig.forgotten == [rig.version], "some name has it"


@pytest.mark.anyio
async def test_other_threads_wait_for_the_event_loop_to_try_it_out(rig: Rig) -> None:
    assert rig.prover.prove_blocking(rig.directory, rig.checked) == "none" and rig.proofs == [], "before the start"
    rig.prover.start()
    rig.write_fingerprint()
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(rig.prover.prove_blocking(rig.directory, rig.checked)))
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.001)
    assert found == ["exact"]
