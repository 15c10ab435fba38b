"""`loramux merge`: base and adapter as one ordinary checkpoint, and how far its answers drift from the adapter's."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from loramux_server.cli.frame import configure_logging, write
from loramux_server.cli.options import settings_app
from loramux_server.config.adapter_directory import find_adapter
from loramux_server.config.environment import bound_spinning, cache_dir_of, kernels_of
from loramux_server.config.merge import MergeConfig
from loramux_server.config.train import DEFAULT_OUT
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    import torch

    from loramux_adapters.training.model.merge import Merged
    from loramux_server.base.loader import BaseModel
    from loramux_server.fingerprint.fingerprint import Agreement

REPORT_FILE = "merge.json"
REPLY_TOKENS = 16
MAX_RANK = 1024


@dataclass(frozen=True, slots=True)
class Drift:
    """How the merged checkpoint compares with the adapter beside its base.

    Attributes:
        prompts, tokens: asked and compared.
        merged: the checkpoint as it is, in 16 bit.
        quantized: the checkpoint with its weights put into NF4 once more, as `loramux serve` does with any base. Small
            changes of weights that lie on NF4's grid already are rounded away by that.
        bare: the base without the adapter, to see how much a difference is.
    """

    prompts: int
    tokens: int
    merged: Agreement
    quantized: Agreement
    bare: Agreement

    @property
    def undone(self) -> bool:
        """NF4 takes more than half of the way back to the base without the adapter."""
        return not self.quantized.mean <= self.bare.mean / 2


def merge(config: MergeConfig, ctx: typer.Context) -> int:
    """Write base and adapter as one ordinary checkpoint, for places that know no adapters.

    It says how far the checkpoint's answers drift from those of the adapter itself.
    """
    assert config.adapter is not None and config.out is not None
    configure_logging("info")
    bound_spinning()
    adapter = find_adapter(config.adapter, DEFAULT_OUT)
    stages = Stages(write)
    with stages.stage("import libraries"):
        import torch
        import transformers  # noqa: F401 - what loads the base needs it, and its seconds belong to this stage

        from loramux_adapters.training.model.merge import whole_directory
        from loramux_server.base.device import device_of
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    work = _Merge(config, adapter, device_of(config.device), cache_dir_of(config.cache_dir, ctx.obj), stages)
    with whole_directory(config.out) as partial:
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
    for line in _lines(config, merged, onto, drift, work.from_gguf):
        print(line)
    return 0


class _Merge:
    """One merge, stage by stage; a base is let go before the next one is loaded."""

    def __init__(
        self, config: MergeConfig, adapter: Path, device: torch.device, cache_dir: Path, stages: Stages
    ) -> None:
        self._config = config
        self._adapter = adapter
        self._device = device
        self._cache_dir = cache_dir
        self._stages = stages
        self._trained_on = "nf4"
        self._rank = 0
        self.from_gguf = False

    def write(self, directory: Path) -> tuple[Merged, str]:
        """Writes the checkpoint; returns what was merged, and onto what."""
        from loramux_adapters.artifact.config import BASE_ID_KEY
        from loramux_adapters.artifact.format import read_config
        from loramux_adapters.lora.verify import check_adapter
        from loramux_adapters.training.model.merge import merge_into, write_checkpoint
        from loramux_server.base.identity import cached_base_id
        from loramux_server.base.loader import quantization_recipe

        with self._stages.stage("load the base in 16 bit"):
            base = self._load(self._config.base, "none")
        self.from_gguf = base.source.from_gguf
        info = base.info()
        if read_config(self._adapter).base_id == base.base_id:
            self._trained_on = "none"
        else:
            nf4 = quantization_recipe(base.config)
            info = replace(info, base_id=cached_base_id(base.source.directory, nf4, self._cache_dir))
        checked = check_adapter(self._adapter, info, MAX_RANK)
        self._rank = checked.rank
        if not checked.base_verified:
            self._stages.note(
                f"the adapter names no base ({BASE_ID_KEY}), so nobody knows that it was made for this one"
            )
        onto = self._config.onto or ("nf4" if self._trained_on == "nf4" else "16bit")
        with self._stages.stage("merge"):
            merged = merge_into(base.model, checked.adapter, onto=onto)
        with self._stages.stage("write the checkpoint"):
            if checked.chat_template is not None:
                base.tokenizer.chat_template = checked.chat_template
            write_checkpoint(base.model, base.tokenizer, directory)
        return merged, onto

    def measure(self, directory: Path) -> Drift:
        """Asks the adapter beside its base, then the checkpoint twice."""
        from loramux_server.fingerprint.drift import drift_prompts
        from loramux_server.fingerprint.fingerprint import compare, witness

        with self._stages.stage("ask the adapter"):
            engine = self._engine(self._config.base, self._trained_on)
            adapter = engine.load(self._adapter)
            prompts = drift_prompts(self._adapter, engine.base.tokenizer, adapter.chat_template)
            said = witness(engine, prompts, adapter, max_tokens=REPLY_TOKENS)
            bare = compare(engine, said, None)
            del engine
        with self._stages.stage("ask the checkpoint"):
            plain = compare(self._engine(str(directory), "none"), said, None)
        with self._stages.stage("ask the checkpoint in NF4"):
            again = compare(self._engine(str(directory), "nf4"), said, None)
        return Drift(len(said), plain.tokens, plain, again, bare)

    def _engine(self, spec: str, quantize: str) -> Any:
        from loramux_server.engine.local_engine import LocalEngine

        gc.collect()
        return LocalEngine.open(self._load(spec, quantize), rows=16, tokens=8192, max_rank=max(self._rank, 8))

    def _load(self, spec: str, quantize: str) -> BaseModel:
        from loramux_server.base.loader import load_base_model
        from loramux_server.kernels.choice import choose_kernels

        return load_base_model(
            spec,
            device=self._device,
            cache_dir=self._cache_dir,
            report=self._stages.note,
            quantize=quantize,
            kernels=choose_kernels(self._device, kernels_of(os.environ)),
        )


def _lines(config: MergeConfig, merged: Merged, onto: str, drift: Drift, from_gguf: bool) -> Sequence[str]:
    weights = "the weights as NF4 holds them" if onto == "nf4" else "the 16-bit weights"
    lines = [
        f"{config.out}: {merged.layers} layers changed by {100 * merged.delta:.2f} % of their norm, on {weights}",
        f"against the adapter itself, {drift.prompts} prompts, {drift.tokens} tokens:",
        f"  this checkpoint in 16 bit: {drift.merged.words()}",
        f"  put into NF4 once more, as `loramux serve` does: {drift.quantized.words()}",
        f"  for scale, the base without the adapter: {drift.bare.words()}",
    ]
    if merged.head_untied:
        lines.append(
            "the adapter changes the output head, so it has a matrix of its own now, apart from the embeddings"
        )
    if onto == "16bit" and from_gguf:
        lines.append("this base came from a GGUF file: its 16-bit weights are dequantized ones, not the original ones")
    if drift.undone:
        hint = ", or try --onto 16bit" if onto == "nf4" else ""
        return [
            *lines,
            f"NF4 undoes most of this adapter: use the checkpoint in 16 bit, serve the adapter itself{hint}",
        ]
    return [*lines, f"serve it with: loramux serve --base {config.out}"]


app = settings_app(
    MergeConfig,
    merge,
    usage="--adapter NAME --out DIR [OPTIONS]",
    epilog="Example:\n\n    loramux merge --adapter spam --out spam-merged",
)
