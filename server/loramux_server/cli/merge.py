"""`loramux merge`: base and adapter as one ordinary checkpoint, and how far its answers drift from the adapter's."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from loramux_server.base.device import check_device
from loramux_server.base.source import BaseSource, check_base, resolve_base
from loramux_server.cli.frame import configure_logging, show, write
from loramux_server.cli.options import settings_app
from loramux_server.cli.screen import LineBar
from loramux_server.config.adapter_directory import find_adapter
from loramux_server.config.environment import before_a_base, cache_dir_of, kernels_of, quiet_libraries
from loramux_server.config.merge import MergeConfig
from loramux_server.config.train import DEFAULT_OUT
from loramux_server.longrun.growth import growth_told
from loramux_server.longrun.interrupt import stoppable
from loramux_server.longrun.time_left import TimeLeft
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_adapters.device.device import Device
    from loramux_adapters.training.model.merge import Merged
    from loramux_server.base.loader import BaseModel
    from loramux_server.engine.local_engine import LocalEngine
    from loramux_server.fingerprint.fingerprint import Agreement

REPORT_FILE = "merge.json"
REPLY_TOKENS = 16
MAX_RANK = 1024
MIB = 2**20
MOMENT_SECONDS = 2.0  # that a stage may take without saying how far it is
LOOK_SECONDS = 0.5  # between two looks at what is written


@dataclass(frozen=True, slots=True)
class Drift:
    """How the merged checkpoint compares with the adapter beside its base.

    Attributes:
        prompts, tokens: asked and compared.
        merged: the checkpoint as it is, in 16 bit.
        quantized: the checkpoint with its weights put into NF4 once more, as `loramux serve` does with any base. Small
            changes of weights that lie on NF4's grid already are rounded away by that.
        bare: the base without the adapter, to see how much a difference is; about what it knows: nothing of replies
            from the first token on that the adapter adds.
        exact: the adapter beside its base in fp32, to see how much of one is served arithmetic; None if not asked for.
    """

    prompts: int
    tokens: int
    merged: Agreement
    quantized: Agreement
    bare: Agreement
    exact: Agreement | None = None

    @property
    def unlike(self) -> bool:
        """Even in 16 bit it answers less like the adapter than halfway from the base without it."""
        return self.bare.tokens > 0 and not self.merged.mean <= self.bare.mean / 2

    @property
    def undone(self) -> bool:
        """NF4 takes more than half of the way back to the base without the adapter."""
        return self.bare.tokens > 0 and not self.quantized.mean <= self.bare.mean / 2


def merge(config: MergeConfig, ctx: typer.Context) -> int:
    """Write base and adapter as one ordinary checkpoint, for places that know no adapters.

    It says how far the checkpoint's answers drift from those of the adapter itself.
    """
    from loramux_adapters.training.model.whole_directory import whole_directory
    from loramux_server.evaluation.material import largest_rank

    assert config.adapter is not None and config.out is not None
    configure_logging("info")
    quiet_libraries()
    before_a_base(ctx.obj)
    check_device(config.device)
    check_base(config.base)
    adapter = find_adapter(config.adapter, DEFAULT_OUT)
    largest_rank([adapter])  # a file that cannot be read is known now
    cache_dir = cache_dir_of(config.cache_dir, ctx.obj)
    stages = Stages(write)
    bar = StageBar(stages, sys.stdout)
    answer = (
        f"stopping after this part of the merge, and nothing is left in {config.out}; press Ctrl-C again to stop now"
    )
    with whole_directory(config.out) as partial, stoppable(lambda: bar.line(answer)) as go_on:
        with stages.stage("find the base"):
            source = resolve_base(config.base, cache_dir, stages.note)
        with stages.imports():
            import torch

            import loramux_server.base.loader  # noqa: F401 - it needs transformers, whose seconds belong to this stage
            from loramux_server.base.device import device_of
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        work = _Merge(config, adapter, source, device_of(config.device, stages.note), cache_dir, stages, bar, go_on)
        merged, onto = work.write(partial)
        drift = work.measure(partial)
        report = {
            "adapter": config.adapter,
            "base": config.base,
            "onto": onto,
            **asdict(merged),
            "drift": asdict(drift),
        }
        (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for line in _lines(config, merged, onto, drift, source.from_gguf):
        show(line)
    return 0


class StageBar:
    """How far a stage of `Stages` is, once it takes longer than a moment. `line` may be called by another thread."""

    def __init__(self, stages: Stages, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stages, self._stream, self._clock = stages, stream, clock
        self._bar = LineBar(stream, clock)
        self._time_left = TimeLeft(clock)
        self._what = ""
        self._began = 0.0

    def told(self, what: str, done: int, total: int, unit: str) -> None:
        """What is done, with how many of all units of it so far."""
        if what != self._what:
            self.end()
            self._what, self._began = what, self._clock()
        left = self._time_left.left(what, done, total)
        if self._clock() - self._began >= MOMENT_SECONDS:
            self._stages.break_line()
            self._bar.show(f"  {what}: {done:,} of {total:,} {unit}{left}", done, total)

    def line(self, text: str) -> None:
        self._stages.break_line()
        self._bar.line(f"  {text}")

    def end(self) -> None:
        """Leaves a bar as it is; the next stage has another."""
        self._bar.end()


class _Merge:
    """One merge, stage by stage; a base is let go before the next one is loaded."""

    def __init__(
        self,
        config: MergeConfig,
        adapter: Path,
        source: BaseSource,
        device: Device,
        cache_dir: Path,
        stages: Stages,
        bar: StageBar,
        go_on: Callable[[], None],
    ) -> None:
        self._config, self._adapter, self._source = config, adapter, source
        self._device, self._cache_dir = device, cache_dir
        self._stages, self._bar, self._go_on = stages, bar, go_on
        self._trained_on = "nf4"
        self._rank = 0

    def write(self, directory: Path) -> tuple[Merged, str]:
        """Writes the checkpoint; returns what was merged, and onto what."""
        from loramux_adapters.artifact.config import BASE_ID_KEY
        from loramux_adapters.artifact.format import read_config
        from loramux_adapters.lora.verify import check_adapter
        from loramux_adapters.training.model.merge import (
            add_generation_defaults,
            add_own_tokens,
            bytes_to_write,
            merge_into,
            weight_merged_onto,
            write_checkpoint,
        )
        from loramux_server.base.identity import cached_base_id
        from loramux_server.base.loader import quantization_recipe
        from loramux_server.kernels.layers.served_weights import ServedWeights

        with self._stage("load the base in 16 bit"):
            base = self._load(self._source, "none", training=True)
        info = base.info()
        if read_config(self._adapter).base_id == base.base_id:
            self._trained_on = "none"
        else:
            nf4 = quantization_recipe(base.config)
            info = replace(info, base_id=cached_base_id(base.source.directory, nf4, self._cache_dir))
        onto = self._config.onto or ("nf4" if self._trained_on == "nf4" else "16bit")
        weights = ServedWeights(base.model, partial(weight_merged_onto, model=base.model, onto=onto))
        checked = check_adapter(self._adapter, replace(info, weights=weights), MAX_RANK)
        self._rank = checked.rank
        for note in checked.notes:
            self._stages.note(note)
        if not checked.base_verified:
            self._stages.note(
                f"the adapter names no base ({BASE_ID_KEY}), so nobody knows that it was made for this one"
            )

        def layers(done: int, total: int) -> None:
            self._bar.told("merging", done, total, "layers")
            self._go_on()

        with self._stage("merge"):
            merged = merge_into(base.model, checked.adapter, onto=onto, progress=layers)
        total = max(1, bytes_to_write(base.model) // MIB)

        def written(count: int) -> None:
            self._bar.told("writing", min(count // MIB, total), total, "MiB")

        with self._stage("write the checkpoint"), growth_told(directory, written, every=LOOK_SECONDS):
            if checked.own_tokens is not None:
                add_own_tokens(checked.own_tokens, base.model, base.tokenizer)
            if checked.chat_template is not None:
                base.tokenizer.chat_template = checked.chat_template
            write_checkpoint(base.model, base.tokenizer, directory)
            add_generation_defaults(checked.generation, directory)
        return merged, onto

    def measure(self, directory: Path) -> Drift:
        """Asks the adapter beside its base, then the checkpoint twice."""
        from loramux_server.fingerprint.drift import drift_prompts
        from loramux_server.fingerprint.fingerprint import Agreement, as_far_as, compare, witness

        with self._stage("ask the adapter"):
            engine = self._engine(self._source, self._trained_on, check=True)
            adapter = engine.load(self._adapter)
            prompts = drift_prompts(self._adapter, engine.base.tokenizer, adapter.chat_template)
            said = witness(engine, prompts, adapter, max_tokens=REPLY_TOKENS)
            plain_said = as_far_as(said, engine.base.vocabulary)
            bare = compare(engine, plain_said, None) if plain_said else Agreement()
            del engine
        exact = None
        if self._config.fidelity:
            with self._stage("ask the adapter in fp32, by transformers' own code"):
                engine = self._engine(self._source, self._trained_on, exact=True)
                exact = compare(engine, said, engine.load(self._adapter))
                del engine
        with self._stage("ask the checkpoint"):
            plain = compare(self._engine(str(directory), "none"), said, None)
        with self._stage("ask the checkpoint in NF4"):
            again = compare(self._engine(str(directory), "nf4"), said, None)
        return Drift(len(said), plain.tokens, plain, again, bare, exact)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Raises KeyboardInterrupt at its end once an end was asked for."""
        with self._stages.stage(name):
            try:
                yield
            finally:
                self._bar.end()
            self._go_on()

    def _engine(
        self, spec: str | BaseSource, quantize: str, *, exact: bool = False, check: bool = False
    ) -> LocalEngine:
        """`exact`: in fp32, on the CPU. `check`: as a server does at its start; not for what is only compared with."""
        from loramux_server.engine.local_engine import LocalEngine

        gc.collect()
        base = self._load(spec, quantize, exact=exact)
        return LocalEngine.open(base, rows=16, tokens=8192, max_rank=max(self._rank, 8), check=check)

    def _load(self, spec: str | BaseSource, quantize: str, *, training: bool = False, exact: bool = False) -> BaseModel:
        from loramux_adapters.device.cpu import CpuDevice
        from loramux_server.base.loader import load_base_model
        from loramux_server.kernels.choice import choose_kernels

        device = CpuDevice() if exact else self._device
        return load_base_model(
            spec,
            device=device,
            cache_dir=self._cache_dir,
            report=self._stages.note,
            quantize=quantize,
            training=training,
            exact=exact,
            kernels=None if exact else choose_kernels(device, kernels_of(os.environ)),
        )


def _lines(config: MergeConfig, merged: Merged, onto: str, drift: Drift, from_gguf: bool) -> Sequence[str]:
    weights = "the weights as NF4 holds them" if onto == "nf4" else "the 16-bit weights"
    rows = f" and {merged.rows} rows of embeddings and output head" if merged.rows else ""
    lines = [
        f"{config.out}: {merged.layers} layers{rows} changed by {100 * merged.delta:.2f} % of their norm, on {weights}",
        f"against the adapter itself, {drift.prompts} prompts, {drift.tokens} tokens:",
        f"  this checkpoint in 16 bit: {drift.merged.words()}",
        f"  put into NF4 once more, as `loramux serve` does: {drift.quantized.words()}",
    ]
    if drift.bare.tokens:
        lines.append(f"  for scale, the base without the adapter: {drift.bare.words()}")
    if drift.exact is not None:
        lines.append(f"  and the adapter itself in fp32 instead of as it is served: {drift.exact.words()}")
    if merged.head_untied:
        lines.append(
            "the adapter does not change embeddings and output head alike, so each has a matrix of its own now"
        )
    if onto == "16bit" and from_gguf:
        lines.append("this base came from a GGUF file: its 16-bit weights are dequantized ones, not the original ones")
    if drift.unlike:
        hint = "try --onto nf4, the weights that it was trained on, or " if onto == "16bit" else ""
        return [
            *lines,
            f"this checkpoint does NOT answer as the adapter does, not even in 16 bit: {hint}serve the adapter",
        ]
    if drift.undone:
        hint = ", or try --onto 16bit" if onto == "nf4" else ""
        return [
            *lines,
            f"NF4 undoes most of this adapter: use the checkpoint in 16 bit, or serve the adapter itself{hint}",
        ]
    return [*lines, f"serve it with: loramux serve --base {config.out}"]


app = settings_app(
    MergeConfig,
    merge,
    usage="--adapter NAME --out DIR [OPTIONS]",
    epilog="Example:\n\n    loramux merge --adapter spam --out spam-merged",
)
