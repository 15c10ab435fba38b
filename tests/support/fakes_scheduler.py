"""A scheduler on a fake device, driven step by step without a thread."""

from __future__ import annotations

from collections.abc import Collection

from loramux_adapters.lora.slots import SlotTable
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.kv_blocks import KVBlocks
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import Batch, Sequence
from support.fakes_engine import FakeClock, FakeHost, FakeRunner, Kind, kind_of


class Bench:
    """What the engine does around the scheduler, in one `step`, with every invariant checked after it."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        rows: int = 32,
        num_blocks: int = 64,
        block_size: int = 4,
        max_kept: int = 0,
        instant: bool = True,
    ) -> None:
        self.clock = FakeClock()
        self.host = FakeHost(instant=instant)
        self.blocks = KVBlocks(num_blocks, block_size, max_kept=max_kept)
        self.slots = SlotTable(rows)
        self.scheduler = Scheduler(config or SchedulerConfig(), self.blocks, self.slots, self.host, self.clock)
        self.runner = FakeRunner(rows, self.blocks, self.host)
        self.ended: dict[str, str] = {}  # sequence id -> done, aborted, failed (its load), broken (its step)
        self.reasons: dict[str, str] = {}  # of failed loads

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.check_fits(sequence)
            self.scheduler.add(sequence)

    def abort(self, ids: Collection[str]) -> None:
        for sequence in self.scheduler.abort(ids):
            self.ended[sequence.id] = "aborted"
        self.check()

    def step(self, *, fails: bool = False) -> Batch:
        """One step; with `fails` the device breaks in it."""
        for sequence, reason in self.scheduler.prefetch():
            self.ended[sequence.id], self.reasons[sequence.id] = "failed", reason
        batch = self.scheduler.schedule()
        self._check_batch(batch)
        if batch.rows and fails:
            self.runner.batches.append(batch)
            for sequence in self.scheduler.roll_back(batch):
                self.ended[sequence.id] = "broken"
        elif batch.rows:
            results = self.runner.run(batch)
            self.scheduler.commit(batch)
            for row, result in zip([row for row in batch.rows if row.num_logits], results, strict=True):
                one = row.sequence
                if result.scores:
                    one.add_scores(result.scores)
                if result.token_id is not None:
                    one.output.append(result.token_id)
                if len(one.output) == one.params.max_tokens and not one.in_prefill:
                    self.scheduler.finish(one)
                    self.ended[one.id] = "done"
        self.check()
        return batch

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
        assert self.host.pinned <= waiting, "the host cache holds what nobody waits for"

    def check_empty(self) -> None:
        """Nothing is left behind once all sequences have ended."""
        assert not self.scheduler.has_work
        assert self.blocks.used == 0 and not self.slots.pinned and not self.host.pinned

    def _check_batch(self, batch: Batch) -> None:
        config = self.scheduler.config
        decodes = [row for row in batch.rows if not row.sequence.in_prefill]
        most = max(config.max_batch_tokens, sum(not row.sequence.gives_way for row in decodes))
        background = [row for row in batch.rows if row.sequence.gives_way]
        assert batch.num_tokens <= most + (len(background) > 0)
        assert sum(row.num_tokens for row in background) <= config.max_background_tokens
        assert all(row.num_tokens == 1 and row.samples for row in decodes)
        due = {one.id for one in self.scheduler.running if not one.gives_way}
        assert due == {row.sequence.id for row in batch.rows if not row.sequence.gives_way}, (
            "one that runs was left out"
        )
        assert sum(max(0, row.num_scored - 1) for row in batch.rows) <= config.max_scored_tokens
        late = {one.id for one in self.scheduler.running if one.gives_way}
        assert bool(late) == bool(background), "who has started goes on"
        runs: list[Kind] = []
        for row in batch.rows:
            if not runs or runs[-1] != kind_of(row.sequence):
                runs.append(kind_of(row.sequence))
        assert len(runs) == len(set(runs)), "the rows of the same adapters are not contiguous"
        assert () not in runs[1:], "base rows come first"
        assert {load.version for load in batch.slot_loads} <= {version for run in runs for version, _ in run}


def rows_of(batch: Batch) -> list[tuple[str, int, bool]]:
    """(sequence id, tokens, samples) of each row."""
    return [(row.sequence.id, row.num_tokens, row.samples) for row in batch.rows]
