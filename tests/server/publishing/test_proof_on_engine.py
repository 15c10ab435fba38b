"""The proof of an upload on the real engine, thread and kernels included, with a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import AdapterCorrupt, AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter, HostCache
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.slots import SlotTable
from loramux_adapters.lora.verify import Checked, check_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.build import limits_of
from loramux_server.engine.client import EngineClient
from loramux_server.engine.engine import Engine
from loramux_server.engine.inbox import Inbox
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.kv_blocks import KVBlocks
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.scheduling.sequence import AdapterUse, SamplingParams, Sequence
from loramux_server.fingerprint.file import Fingerprint, Witness
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import probe_kv_shape
from loramux_server.kernels.choice import choose_kernels
from loramux_server.publishing.proof import Prover
from support.adapter_files import write_adapter
from support.fakes_engine import FakeMetrics
from support.tiny_models import save_tiny_model

CPU = CpuDevice()
BLOCKS, ROWS = 128, 64
PROMPTS = [(5, 6, 7, 8), tuple(range(20, 50)), (1,)]


class Rig:
    """An engine as the server wires it, without HTTP and without a store."""

    def __init__(self, base: BaseModel) -> None:
        shape = probe_kv_shape(base.model, CPU, whole_numbers=base.kernels.whole_numbers)
        kernels = choose_kernels(CPU, base.kernels.name, shape)
        slots = AdapterSlots(
            base.model, ROWS, kernels.add_lora, kernels.copy_slot, head=head_path(base.model), device=CPU
        )
        self.inbox = Inbox(64)
        self.host = HostCache(self.published, 1 << 30, on_ready=self.inbox.wake)
        runner = ModelRunner(
            base.model,
            slots=slots,
            cache=KVCache(shape, BLOCKS, CPU),
            kernels=kernels,
            host_adapter=self.host.get,
            device=CPU,
            limits=limits_of(SchedulerConfig(), BLOCKS),
        )
        self.scheduler = Scheduler(SchedulerConfig(), KVBlocks(BLOCKS, BLOCK_SIZE), SlotTable(ROWS), self.host)
        self.metrics = FakeMetrics()
        self.engine = Engine(self.scheduler, runner, self.inbox, self.metrics)
        self.client = EngineClient(self.engine, in_host=self.host.holds)
        self.base = base
        self.forgotten: list[str] = []

    def published(self, version: str) -> HostAdapter:
        raise AdapterCorrupt("nothing is published here")

    def proved(self, *, acts: bool, fingerprint: str) -> None:
        pass

    def prover(self, numerics: str = "here") -> Prover:
        return Prover(
            self.client.generate,
            self.host.holding,
            lambda version: self.client.residency(version) == "device",
            self.forgotten.append,
            self,
            base_id=self.base.base_id,
            numerics_id=numerics,
            vocabulary=320,
            context=256,
            timeout=60.0,
        )

    def check(self, directory: Path) -> Checked:
        return check_adapter(directory, self.base.info(), 64)

    async def fingerprint(self, directory: Path) -> Fingerprint:
        """Made by asking for greedy replies, one prompt at a time."""
        adapter = self.check(directory).adapter
        use = AdapterUse(adapter.version, adapter.rank, adapter.nbytes)
        said = []
        with self.host.holding(adapter):
            for prompt in PROMPTS:
                params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=0)
                sequence = Sequence(f"make {len(prompt)}", list(prompt), params, (use,))
                outputs = [output async for output in self.client.generate(sequence)]
                logprobs = [output.logprob for output in outputs if output.logprob is not None]
                tokens = tuple(one.token_id for one in logprobs)
                said.append(Witness("", prompt, "", tokens, tuple(one.logprob for one in logprobs)))
        return Fingerprint("here", self.base.base_id, adapter.version, tuple(said))


def write(directory: Path, fingerprint: Fingerprint) -> None:
    (directory / "fingerprint.json").write_text(json.dumps(fingerprint.as_json()))


@asynccontextmanager
async def running(base: BaseModel) -> AsyncIterator[Rig]:
    rig = Rig(base)
    await rig.client.start()
    try:
        yield rig
    finally:
        await rig.client.drain(10)
        rig.host.close()
        rig.scheduler.check_integrity()
        rig.host.check_integrity()
        assert rig.host.stats().entries == 0, "what is only tried out leaves nothing in host memory"
        assert rig.host.stats().loads == 0, "nothing is read but by the check"
        assert rig.scheduler.blocks.used == 0 and not rig.scheduler.slots.pinned and rig.host.stats().pinned == 0


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    directory = save_tiny_model(tmp_path / "base", "llama")
    return load_base_model(str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None)


@pytest.mark.anyio
async def test_an_adapter_acts_and_its_fingerprint_replays_to_the_last_bit(base: BaseModel, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", dict(base.linears), rank=5, std_b=0.2)
    async with running(base) as rig:
        prover = rig.prover()
        assert await prover.prove(directory, rig.check(directory)) == "none"
        fingerprint = await rig.fingerprint(directory)
        write(directory, fingerprint)
        assert await prover.prove(directory, rig.check(directory)) == "exact"
        off = [replace(said, logprobs=tuple(one - 0.01 for one in said.logprobs)) for said in fingerprint.prompts]
        write(directory, replace(fingerprint, prompts=tuple(off)))
        assert await rig.prover("elsewhere").prove(directory, rig.check(directory)) == "within_tolerance"
        with pytest.raises(AdapterRejected, match="should be equal"):
            await prover.prove(directory, rig.check(directory))
        other = [replace(said, tokens=tuple((one + 1) % 320 for one in said.tokens)) for said in fingerprint.prompts]
        write(directory, replace(fingerprint, prompts=tuple(other)))
        with pytest.raises(AdapterRejected, match="greedy tokens differ"):
            await rig.prover("elsewhere").prove(directory, rig.check(directory))
        assert rig.forgotten == [], "it was on the device before these trials"
        assert rig.host.stats().failures == 0 and not rig.host.holds(fingerprint.version)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "acts"),
    [
        ({"std_b": 0.0}, False),
        ({"std_b": 1e-30}, False),
        ({"std_b": 1e-2, "targets": ["q_proj"], "rank": 1}, True),
        ({"std_b": 1e-2, "targets": ["lm_head"]}, True),
    ],
    ids=["untrained", "rounds to nothing", "small", "head"],
)
async def test_an_adapter_has_an_effect_if_one_bit_of_any_logit_says_so(
    base: BaseModel, tmp_path: Path, changes: dict[str, Any], acts: bool
) -> None:
    directory = write_adapter(tmp_path / "a", dict(base.linears), **changes)
    async with running(base) as rig:
        prover = rig.prover()
        if acts:
            await prover.prove(directory, rig.check(directory))
            return
        with pytest.raises(AdapterRejected, match="no effect"):
            await prover.prove(directory, rig.check(directory))
        assert await prover.prove(directory, rig.check(directory), allow_no_effect=True) == "none"


@pytest.mark.anyio
async def test_a_proof_beside_running_requests_changes_neither_their_replies_nor_its_own_outcome(
    base: BaseModel, tmp_path: Path
) -> None:
    directory = write_adapter(tmp_path / "a", dict(base.linears), rank=16, std_b=0.2)
    params = SamplingParams(temperature=0.0, max_tokens=40, logprobs=0)

    async def reply(rig: Rig, index: int) -> list[Any]:
        sequence = Sequence(f"user {index}", [index, 3, 5], params)
        return [output.logprob async for output in rig.client.generate(sequence)]

    async with running(base) as rig:
        write(directory, await rig.fingerprint(directory))
        alone = [await reply(rig, index) for index in range(6)]
        rig.metrics.calls.clear()
        crowd = asyncio.gather(*(reply(rig, index) for index in range(6)))
        assert await rig.prover().prove(directory, rig.check(directory)) == "exact"
        assert list(await crowd) == alone
        counted = sum(generated for _, _, generated in rig.metrics.of("tokens") if isinstance(generated, int))
        assert counted == 6 * 40, "what the server asks for itself is not counted"


@pytest.mark.anyio
async def test_a_proof_that_is_given_up_leaves_nothing_in_the_engine(base: BaseModel, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", dict(base.linears), std_b=0.2)
    async with running(base) as rig:
        write(directory, await rig.fingerprint(directory))
        for _ in range(5):
            task = asyncio.create_task(rig.prover().prove(directory, rig.check(directory)))
            await asyncio.sleep(0.02)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
