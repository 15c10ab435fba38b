"""What runs in the next step: continuous batching with chunked prefill. Plain Python; admission.py says who may start.

One step of the engine is `prefetch`, `schedule`, the runner's forward, then `commit` (it worked) or `roll_back` (it
did not), then `finish` for every sequence that ended.

The next step may be scheduled, and started, before this one is committed. A token that this one chooses is then fed
to the next before anybody knows it (`ScheduledSequence.follows`). A sequence that ends meanwhile has a row in a step
that was started; that row's result means nothing. What the sequence held is given to others only by steps that are
started later, and steps are done in the order in which they were started: so nobody writes what another still reads.
Copies of adapters alone may be made beside the step under way, and are told whether they must wait for it
(`SlotLoad.in_use`).

    tokens of a step:  | one per running sequence, always | more of prompts, oldest first, up to max_batch_tokens |
                       | background: of what is left at most max_background_tokens, but one for the first of them |

A sequence starts only when there is a token for it, and each that runs has one in every batch, but for those that
wait for the results of a step under way. So when the steps under way fail, no running sequence is left behind, and no
slot half loaded. Two kinds may sit a step out, and what these hold was loaded by a step that worked: background
sequences, which take no more of a prompt at a time than `max_background_tokens` even when they count as ordinary ones;
and sequences whose grammar has not said yet what may come next (`Sequence.sits_out`). The mask of a grammar is usually
made while the step runs whose logits it is for. Where it is not there in time, no token is chosen: the sequence reads
its newest token again when it is, with the same bits, and nobody waits for it meanwhile. It keeps what it holds.

Text that is scored (prompt logprobs, continuations) is read like a prompt, but logits are needed at each of its
positions, so that a step takes at most `max_scored_tokens` of it, beside one for each sequence. Text whose mean state
is asked for counts as such.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from collections.abc import Sequence as ReadOnlyList

from loramux_adapters.lora.slots import Slot, SlotTable, bucket_of
from loramux_server.engine.scheduling.admission import (
    LEAST_COUNTED,
    Admitted,
    HostView,
    SchedulerConfig,
    WaitingQueues,
)
from loramux_server.engine.scheduling.fair_share import REPLY_WEIGHT, FairShare, Line
from loramux_server.engine.scheduling.kv_blocks import KVBlocks, extend_keys
from loramux_server.engine.scheduling.sequence import (
    Batch,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    SlotLoad,
)
from loramux_server.errors import RequestError

_NOBODY: Set[Sequence] = frozenset()


class Scheduler:
    """Queues, and who holds which KV blocks and slots. Owner: the engine thread (`check_fits`: any thread)."""

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: KVBlocks,
        slots: SlotTable,
        host: HostView,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.slots = slots
        self._host = host
        self._clock = clock
        self._share = FairShare()
        self._waiting = WaitingQueues(config, blocks, slots, host, self._share, clock)
        self._running: list[Sequence] = []  # in order of admission
        self._steps: list[Batch] = []  # scheduled, and neither committed nor rolled back yet; the oldest first
        self._chosen_for: Set[Sequence] = _NOBODY  # whose newest token the step under way chooses
        self._given_up: list[tuple[Batch, Slot]] = []  # slots of those that ended under way, and the last step then

    @property
    def running(self) -> ReadOnlyList[Sequence]:
        """Sequences that hold KV blocks, in order of admission."""
        return self._running

    @property
    def sitting_out(self) -> list[Sequence]:
        """Those of `running` that are in no step before their masks are made."""
        return [sequence for sequence in self._running if sequence.sits_out]

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that have not started, in order of arrival; a copy, for tests."""
        return [entry.sequence for entry in self._waiting]

    @property
    def lines(self) -> Iterable[Line]:
        """Those that have not started, by flow."""
        return self._waiting.lines()

    @property
    def waiting_by_adapter(self) -> Mapping[str | None, int]:
        """How many have not started, by the names they were asked for under; without the server's own work."""
        return self._waiting.by_adapter

    @property
    def under_way(self) -> ReadOnlyList[Batch]:
        """Steps that were scheduled and neither committed nor rolled back, the oldest first; for tests."""
        return self._steps

    @property
    def has_work(self) -> bool:
        return bool(self._running) or len(self._waiting) > 0

    def check_fits(self, sequence: Sequence) -> None:
        """Raises RequestError if the sequence could not start even on an idle server. Reads constants only."""
        if not sequence.prompt:
            raise RequestError("the prompt has no tokens", param="prompt", code="empty_prompt")
        if sequence.params.max_tokens < sequence.params.least_tokens:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")
        if self.blocks.blocks_for(sequence.max_total) > self.blocks.num_blocks:
            raise RequestError(
                f"the prompt has {len(sequence.prompt)} tokens and max_tokens is {sequence.params.max_tokens}, "
                f"the server's KV cache has room for {self.blocks.num_blocks * self.blocks.block_size} in all",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if not all(sequence.params.continuations):
            raise RequestError("a continuation has no tokens")
        ranks = {use.version: use.rank for use in sequence.adapters}
        if not self.slots.fits(*ranks.values()):
            rows = sum(bucket_of(rank) for rank in ranks.values())
            is_one = len(ranks) == 1
            words = "the adapter's rank {} takes" if is_one else "the adapters' ranks {} together take"
            raise RequestError(
                f"{words.format(', '.join(map(str, ranks.values())))} {rows} rows, "
                f"the server's adapter memory has {self.slots.rows}",
                param="model" if is_one else "adapters",
                code="adapter_too_large",
            )
        summed = sum(max(LEAST_COUNTED, bucket_of(use.rank)) for use in sequence.adapters)
        if summed > self.config.max_ranks:
            raise RequestError(
                f"the adapters' ranks {', '.join(map(str, ranks.values()))} are {summed} together, each rounded up to "
                f"a power of two of at least {LEAST_COUNTED}; this server takes {self.config.max_ranks} in one request "
                "(--max-summed-rank)",
                param="model" if len(ranks) == 1 else "adapters",
                code="adapter_too_large",
            )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence for which `check_fits` passed."""
        sequence.is_long = 0 < self.config.long_from < sequence.max_total
        self._waiting.add(sequence)

    def abort(self, ids: Collection[str]) -> list[Sequence]:
        """Ends these sequences, waiting or running, and returns them; other ids are ignored."""
        if not ids:
            return []
        aborted = [sequence for sequence in self._running if sequence.id in ids]
        for sequence in aborted:
            self.finish(sequence)
        return aborted + self._waiting.remove(ids)

    def prefetch(self) -> list[tuple[Sequence, str]]:
        """Asks for adapters that waiting sequences need; returns those whose load failed, finished, with the reason."""
        return self._waiting.prefetch()

    def schedule(self) -> Batch:
        """The next step, to be followed by `commit` or `roll_back`; one step before it may be under way.

        A batch without rows needs neither: nothing can run until a load ends, a mask is made, something arrives or the
        step under way is done.
        """
        assert len(self._steps) < 2, "the step before the last was neither committed nor rolled back"
        self._chosen_for = {row.sequence for row in self._steps[0].rows if row.samples} if self._steps else _NOBODY
        ordinary = [sequence for sequence in self._running if not sequence.gives_way]
        tokens = self.config.max_batch_tokens - len(ordinary)  # left beside the one of each, though it may not need it
        scored = self.config.max_scored_tokens
        assert tokens >= 0, "whoever has started runs in every step"
        rows: list[ScheduledSequence] = []
        for sequence in self._with_more(ordinary):
            rows.append(self._turn(sequence, tokens + 1, scored))
            tokens -= rows[-1].num_tokens - 1
            scored -= max(0, rows[-1].num_heads - 1)
        admitted = self._waiting.admit(self.config.max_num_seqs - len(ordinary), tokens)
        self._running += admitted.sequences
        for sequence in admitted.sequences:
            assert tokens > 0, "whoever starts runs at once"
            rows.append(self._turn(sequence, tokens, scored))
            tokens -= rows[-1].num_tokens
            scored -= max(0, rows[-1].num_heads - 1)
        rows += self._background(tokens, scored, admitted)
        if self._steps:
            self._mark_idle(admitted.slot_loads)
        now = self._clock()
        for row in rows:
            sequence = row.sequence
            if sequence.scheduled_at is None:
                sequence.scheduled_at = now
            sequence.num_computed += row.num_tokens
            if row.samples and not sequence.gives_way:
                self._share.charge(sequence.flow, REPLY_WEIGHT, sequence.weight)
        rows.sort(key=lambda row: (row.num_states > 0, row.sequence.slots))
        batch = Batch(rows, admitted.slot_loads)
        if rows:
            self._steps.append(batch)
        return batch

    def _with_more(self, running: list[Sequence]) -> list[Sequence]:
        """Those that have something for the next step, as far as that is known while another is under way.

        A reply whose last token is being chosen has nothing more, and ends when it is known. Whose text is being
        scored waits: what it reads next depends on the scores. So does whom a grammar holds: the mask of what comes
        next depends on the token.
        """
        running = [one for one in running if not one.sits_out]
        if not self._steps:
            return running
        scored = {row.sequence for row in self._steps[0].rows if row.num_scored}
        return [one for one in running if one not in scored and (one.in_prefill or self._chooses_more(one))]

    def _chooses_more(self, sequence: Sequence) -> bool:
        is_chosen = sequence in self._chosen_for
        if is_chosen and sequence.params.grammar is not None and not sequence.params.forced:
            return False
        return len(sequence.output) + is_chosen < sequence.params.max_tokens

    def _mark_idle(self, loads: Iterable[SlotLoad]) -> None:
        """Says which of these slots the step under way does not read.

        A slot that is given to another was unpinned. Where that was before this step was scheduled, none of its rows
        has it, and all steps before are done.
        """
        self._given_up = [one for one in self._given_up if one[0] is self._steps[-1]]
        for load in loads:
            load.in_use = any(load.slot.overlaps(slot) for _, slot in self._given_up)

    def _background(self, tokens: int, scored: int, admitted: Admitted) -> list[ScheduledSequence]:
        """Turns of sequences that give way, those among them that start now; the step has so many tokens left."""
        waiting = [sequence for sequence in self._running if sequence.gives_way]
        spare = min(tokens, self.config.max_background_tokens)
        rows: list[ScheduledSequence] = []
        for sequence in self._with_more(waiting):
            if spare > 0 or not rows:  # the first has its turn in every step, so that whoever has started ends
                rows.append(self._turn(sequence, max(1, spare), scored))
                spare -= rows[-1].num_tokens
        started = self._waiting.admit_background(self.config.max_background_tokens - len(waiting), spare)
        for sequence in started.sequences:
            assert spare > 0, "whoever starts runs at once"
            rows.append(self._turn(sequence, spare, scored))
            spare -= rows[-1].num_tokens
        self._running += started.sequences
        admitted.slot_loads += started.slot_loads
        return rows

    def commit(self, batch: Batch, late: Set[Sequence] = _NOBODY) -> None:
        """The oldest step under way worked: its tokens are in the cache, its slot loads are resident.

        The results of steps before it are known, and written to `Sequence.output`. Rows of sequences that have ended
        since it was scheduled are passed over.

        Args:
            late: for whom no token was chosen, since their masks were not there. They read their last token again.
        """
        assert self._steps and self._steps[0] is batch, "not the oldest step under way"
        self._close(self._steps.pop(0))
        finished = SequenceStatus.FINISHED
        for row in batch.rows:
            if row.sequence.status is finished:
                continue
            is_late = row.sequence in late
            if is_late:
                row.sequence.num_computed -= 1
                row.sequence.waits_for_mask = True
            self._publish(row, row.first + row.num_tokens - is_late)
            if row.first < len(row.sequence.prompt) <= row.first + row.num_tokens:
                self._waiting.release_held(row.sequence)

    def roll_back(self) -> list[Sequence]:
        """The oldest step under way failed, and with it whatever was scheduled on top of it.

        Finishes and returns the sequences of all these steps; what they loaded is not believed to be resident.
        """
        steps, self._steps = self._steps, []
        running = {row.sequence: None for batch in steps for row in batch.rows}  # each once, in order
        failed = [sequence for sequence in running if sequence.status is SequenceStatus.RUNNING]
        for sequence in failed:
            self.finish(sequence)
        for batch in steps:
            self._close(batch)
            for load in batch.slot_loads:
                self.slots.drop(load.version)
        return failed

    def finish(self, sequence: Sequence) -> None:
        """Ends a running sequence: its blocks are free, its slots are unpinned (the adapters stay resident)."""
        self._running.remove(sequence)
        self.blocks.free(sequence.blocks, soon=sequence.background)
        sequence.blocks = []
        if self._steps:
            self._given_up += [(self._steps[-1], one.slot) for one in sequence.slots]
        for version in {use.version for use in sequence.adapters}:
            self.slots.release(version)
        sequence.slots = ()
        sequence.status = SequenceStatus.FINISHED
        self._waiting.release_held(sequence)
        if not sequence.gives_way:
            self._share.leave(sequence.flow)

    def check_integrity(self) -> None:
        """Asserts that blocks and slots are held by running sequences and by nobody else."""
        self.blocks.check_integrity()
        self.slots.check_integrity()
        self._waiting.check_integrity()
        assert sum(not sequence.gives_way for sequence in self._running) <= self.config.max_num_seqs
        assert sum(sequence.gives_way for sequence in self._running) <= self.config.max_background_tokens
        size = self.blocks.block_size
        held = [block for sequence in self._running for block in sequence.blocks]
        assert len(set(held)) == self.blocks.used, "KV blocks are lost"
        own = [block for sequence in self._running for block in sequence.blocks[sequence.num_cached // size :]]
        assert len(own) == len(set(own)), "KV blocks that are written to are shared"
        under_way = [row for batch in self._steps for row in batch.rows]
        assert len(self._steps) <= 2 and all(row.sequence.status is not SequenceStatus.WAITING for row in under_way)
        for sequence in self._running:
            assert sequence.status is SequenceStatus.RUNNING
            assert len(sequence.blocks) == self.blocks.blocks_for(sequence.max_total)
            rows = [row for row in under_way if row.sequence is sequence]
            chosen = len(sequence.output) + sum(row.samples for row in rows)
            assert len(rows) < 2 or not rows[0].num_scored, "what is read depends on scores that are not known"
            assert chosen <= sequence.params.max_tokens
            assert sequence.num_computed <= len(sequence.prompt) + chosen + len(sequence.continuation)
            assert max(sequence.num_computed, len(sequence.prompt) + chosen - 1) <= sequence.max_total
            end = rows[-1].first + rows[-1].num_tokens if rows else sequence.num_computed
            assert sequence.num_computed == end, "rows of two steps do not follow each other"
            assert [(one.slot, one.scale) for one in sequence.slots] == [
                (self.slots.lookup(use.version), use.scale) for use in sequence.adapters
            ]
        versions = {use.version for sequence in self._running for use in sequence.adapters}
        assert versions == set(self.slots.pinned), "slots are pinned by nobody, or used without a pin"

    def _turn(self, sequence: Sequence, tokens: int, scored: int) -> ScheduledSequence:
        """Its part of a step: its newest token, or as much of what it reads as it may have tokens.

        `scored`: of text that is scored, so many tokens beside one.
        """
        repeats, sequence.waits_for_mask = sequence.waits_for_mask, False
        if not sequence.in_prefill:
            return ScheduledSequence(sequence, 1, True, follows=sequence in self._chosen_for, repeats=repeats)
        if sequence.background:
            tokens = min(tokens, self.config.max_background_tokens)
        unscored = max(0, sequence.logits_from - sequence.num_computed)
        count = min(sequence.num_uncomputed, tokens, unscored + 1 + scored)
        ends_prompt = sequence.num_computed + count == len(sequence.prompt)
        return ScheduledSequence(
            sequence,
            count,
            samples=ends_prompt and sequence.params.max_tokens > 0,
            num_scored=max(0, count - unscored) if sequence.params.scores_text else 0,
            num_states=max(0, count - unscored) if sequence.params.pooling else 0,
            repeats=repeats,
        )

    def _publish(self, row: ScheduledSequence, end: int) -> None:
        """Makes the blocks that this step completed known to those that come after; all tokens up to there are known.

        end: behind the last position that no step writes again.

        Not what is behind a prompt with continuations: they are written over one another.
        """
        size = self.blocks.block_size
        if row.first // size == end // size or not self.blocks.keeps_content:
            return
        sequence = row.sequence
        if sequence.params.continuations:
            end = min(end, len(sequence.prompt))
        extend_keys(sequence, size, end)
        for index in range(row.first // size, end // size):
            self.blocks.publish(sequence.blocks[index], sequence.keys[index])

    def _close(self, batch: Batch) -> None:
        """Ends the step: the copies in `batch.slot_loads` were made, or never will be, so their host pins go."""
        for load in batch.slot_loads:
            self._host.unpin(load.version)
