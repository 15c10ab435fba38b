"""A whole engine, thread included, on a fake device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from loramux_adapters.lora.slots import SlotTable
from loramux_server.engine.engine import Engine
from loramux_server.engine.inbox import Inbox
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.kv_blocks import KVBlocks
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import FinishReason, TokenOutput
from support.fakes_engine import FakeClock, FakeHost, FakeMetrics, FakeRunner, sequence


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for another thread to make it true."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


class Deliveries:
    """Where an engine without an event loop delivers. `final(id)` waits for the last output of a sequence."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, TokenOutput]]] = []
        self._news = threading.Condition()

    def __call__(self, outputs: list[tuple[str, TokenOutput]]) -> None:
        with self._news:
            self.calls.append(outputs)
            self._news.notify_all()

    def of(self, sequence_id: str) -> list[TokenOutput]:
        return [output for call in self.calls for id, output in call if id == sequence_id]

    def tokens(self, sequence_id: str) -> list[int]:
        return [output.token_id for output in self.of(sequence_id) if output.token_id is not None]

    def final(self, sequence_id: str) -> TokenOutput:
        def last() -> TokenOutput | None:
            outputs = self.of(sequence_id)
            return outputs[-1] if outputs and outputs[-1].finish_reason is not None else None

        with self._news:
            assert self._news.wait_for(lambda: last() is not None, 10), f"{sequence_id} got no last output"
        output = last()
        assert output is not None
        return output

    def reason(self, sequence_id: str) -> FinishReason | None:
        return self.final(sequence_id).finish_reason


class Rig:
    """An engine on a fake device, with everything in reach of the test."""

    def __init__(
        self,
        *,
        config: SchedulerConfig | None = None,
        rows: int = 32,
        num_blocks: int = 64,
        block_size: int = 4,
        max_kept: int = 0,
        max_waiting: int = 64,
        instant: bool = True,
        watchdog_timeout: float = 60.0,
        warm_up: Callable[[], None] = lambda: None,
        ahead: bool = False,
    ) -> None:
        """`ahead`: a step is started before the results of the one before are read."""
        self.clock = FakeClock()
        self.inbox = Inbox(max_waiting)
        self.host = FakeHost(instant=instant, on_ready=self.inbox.wake)
        self.blocks = KVBlocks(num_blocks, block_size, max_kept=max_kept)
        self.slots = SlotTable(rows)
        self.scheduler = Scheduler(config or SchedulerConfig(), self.blocks, self.slots, self.host, self.clock)
        self.runner = FakeRunner(rows, self.blocks, self.host, ahead=ahead)
        self.metrics = FakeMetrics()
        self.deliveries = Deliveries()
        self.engine = Engine(
            self.scheduler,
            self.runner,
            self.inbox,
            self.metrics,
            warm_up=warm_up,
            watchdog_timeout=watchdog_timeout,
            clock=self.clock,
        )

    def start(self) -> Rig:
        self.engine.start(self.deliveries)
        self.engine.wait_until_warm()
        return self

    def stop(self) -> None:
        """Ends the engine and checks that it let go of everything."""
        self.runner.gate.set()
        self.engine.drain(10)
        assert not self.engine.alive
        assert self.blocks.used == 0 and not self.slots.pinned and not self.host.pinned
        self.scheduler.check_integrity()

    def hold_step(self, *ids: str) -> None:
        """Submits these sequences and returns while the step that starts them is under way, until the gate is set."""
        self.runner.gate.clear()
        self.runner.entered.clear()
        for name in ids:
            self.engine.submit(sequence(name, max_tokens=9))
        assert self.runner.entered.wait(10)
