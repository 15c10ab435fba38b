"""A scheduler on a fake device, driven step by step without a thread."""

from __future__ import annotations

from collections.abc import Collection

from loramux_adapters.lora.slots import UNBOUNDED, SlotTable
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.kv_blocks import KVBlocks
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import (
    Batch,
    RowResult,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)
from support.fakes_engine import FakeClock, FakeHost, FakeRunner, FakeStep, Kind, kind_of


class Bench:
    """What the engine does around the scheduler, in one `step`, with every invariant checked after it."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        rows: int = 32,
        beside: int = UNBOUNDED,
        num_blocks: int = 64,
        block_size: int = 4,
        max_kept: int = 0,
        instant: bool = True,
        ahead: bool = False,
    ) -> None:
        """`ahead`: a step is started before the results of the one before are read."""
        self.clock = FakeClock()
        self.host = FakeHost(instant=instant)
        self.blocks = KVBlocks(num_blocks, block_size, max_kept=max_kept)
        self.slots = SlotTable(rows, beside)
        self.scheduler = Scheduler(config or SchedulerConfig(), self.blocks, self.slots, self.host, self.clock)
        self.runner = FakeRunner(rows, self.blocks, self.host, ahead=ahead)
        self._under_way: tuple[Batch, FakeStep] | None = None
        self.ended: dict[str, str] = {}  # sequence id -> done, aborted, failed (its load), broken (its step)
        self.reasons: dict[str, str] = {}  # of failed loads
        self._added: dict[str, Sequence] = {}

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.check_fits(sequence)
            self.scheduler.add(sequence)
            self._added[sequence.id] = sequence

    def abort(self, ids: Collection[str]) -> None:
        for sequence in self.scheduler.abort(ids):
            self.ended[sequence.id] = "aborted"
        self.check()

    def step(self, *, fails: bool = False) -> Batch:
        """One step; with `fails` the device breaks in it, or in the one under way."""
        for sequence, reason in self.scheduler.prefetch():
            self.ended[sequence.id], self.reasons[sequence.id] = "failed", reason
        self.check()
        batch = self.scheduler.schedule()
        self.check()
        self._check_batch(batch)
        if fails:
            self.runner.failures = [RuntimeError("device lost")]
        before, self._under_way = self._under_way, None
        try:
            following = (batch, self.runner.start(batch)) if batch.rows else None
            for one in (before, following):
                if one is not None and one is following and one[1].ahead:
                    self._under_way = one
                elif one is not None:
                    self._update(one[0], one[1].results())
        except RuntimeError:
            for sequence in self.scheduler.roll_back():
                self.ended[sequence.id] = "broken"
            if before is not None and following is not None:
                following[1].results()  # whatever they are
        self.runner.failures = []
        self.check()
        return batch

    def _update(self, batch: Batch, results: list[RowResult]) -> None:
        self.scheduler.commit(batch)
        self.check()
        for row, result in zip([row for row in batch.rows if row.num_logits], results, strict=True):
            one = row.sequence
            if one.status is SequenceStatus.FINISHED:
                continue
            if result.scores:
                one.add_scores(result.scores)
            if result.token_id is not None:
                one.output.append(result.token_id)
            if len(one.output) == one.params.max_tokens and not one.in_prefill:
                self.scheduler.finish(one)
                self.ended[one.id] = "done"

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    @property
    def running(self) -> list[str]:
        return [sequence.id for sequence in self.scheduler.running]

    @property
    def waiting(self) -> list[str]:
        return [sequence.id for sequence in self.scheduler.waiting]

    def check(self) -> None:
        self.scheduler.check_integrity()
        waiting = {use.version for sequence in self.scheduler.waiting for use in sequence.adapters}
        for batch in self.scheduler.under_way:
            waiting |= {load.version for load in batch.slot_loads}
        assert self.host.pinned <= waiting, "the host cache holds what nobody waits for"

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._under_way is not None

    def check_empty(self) -> None:
        """Nothing is left behind once all sequences have ended."""
        assert not self.has_work
        assert self.blocks.used == 0 and not self.slots.pinned and not self.host.pinned

    def _check_batch(self, batch: Batch) -> None:
        config = self.scheduler.config
        decodes = [row for row in batch.rows if row.samples and row.first >= len(row.sequence.prompt)]
        most = max(config.max_batch_tokens, sum(not row.sequence.gives_way for row in decodes))
        background = [row for row in batch.rows if row.sequence.gives_way]
        assert batch.num_tokens <= most + (len(background) > 0)
        assert sum(row.num_tokens for row in background) <= config.max_background_tokens
        assert all(row.num_tokens == 1 and row.samples for row in decodes)
        before = self._under_way[0].rows if self._under_way is not None else []
        waits = {row.sequence.id for row in before if self._waits(row)}
        due = {one.id for one in self.scheduler.running if not one.gives_way}
        assert due - waits == {row.sequence.id for row in batch.rows if not row.sequence.gives_way}, (
            "one that runs was left out, or one that waits was not"
        )
        assert sum(max(0, row.num_scored - 1) for row in batch.rows) <= config.max_scored_tokens
        late = {one.id for one in self.scheduler.running if one.gives_way} - waits
        assert bool(late) == bool(background), "who has started goes on"
        for row in batch.rows:
            self._check_shared(row)
        runs: list[Kind] = []
        for row in batch.rows:
            if not runs or runs[-1] != kind_of(row.sequence):
                runs.append(kind_of(row.sequence))
        assert len(runs) == len(set(runs)), "the rows of the same adapters are not contiguous"
        assert () not in runs[1:], "base rows come first"
        assert {load.version for load in batch.slot_loads} <= {version for run in runs for version, _ in run}

    def _check_shared(self, row: ScheduledSequence) -> None:
        """Who shares another's prompt starts when that is read, and finds all complete blocks but what it needs."""
        one, size = row.sequence, self.blocks.block_size
        first = self._added.get(one.shares_prompt_with or "")
        in_blocks = one.logits_from // size * size
        if row.first > one.num_cached or first is None or not in_blocks or not self.blocks.keeps_content:
            return
        if first.status is SequenceStatus.RUNNING:
            assert one.num_cached == in_blocks
            under_way = [each for batch in self.scheduler.under_way for each in batch.rows if each.sequence is first]
            assert all(each.first >= len(first.prompt) for each in under_way), "its prompt is not read yet"
        assert first.status is not SequenceStatus.WAITING

    @staticmethod
    def _waits(row: ScheduledSequence) -> bool:
        """Whether its sequence has nothing for the next step until the results of this row are read."""
        return row.num_scored > 0 or (row.samples and row.reply_index + 1 == row.sequence.params.max_tokens)


def rows_of(batch: Batch) -> list[tuple[str, int, bool]]:
    """(sequence id, tokens, samples) of each row."""
    return [(row.sequence.id, row.num_tokens, row.samples) for row in batch.rows]
