"""From a model on the kernels' own layers to its whole step: kernels that are checked, and what the modules give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loramux_adapters.device.device import Device
from loramux_server.kernels.attention.kv_cache import KVCache
from loramux_server.kernels.attention.paged_attention import Attend
from loramux_server.kernels.decoder.description import NotOfThisShape, describe
from loramux_server.kernels.decoder.trial import BLOCKS, LENGTHS, Trial
from loramux_server.kernels.decoder.whole_step import StepLimits
from loramux_server.kernels.gpu.check.check import check_operations
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from loramux_server.kernels.gpu.step.graphs import StepGraphs
from loramux_server.kernels.gpu.step.nf4_linear import kinds_of
from loramux_server.kernels.gpu.step.tables import StepSizes

# Root mean square difference of the logits, as a share of their spread: modules keep 16 bits between operations, the
# step keeps 32. A wrong mask, position, factor or norm is off by as much as the spread.
_NEAR = 0.1
_PROGRAMS = 4  # of a launch that shares out what tables list, for each multiprocessor


@torch.inference_mode()
def compile_gpu_step(
    device: Device, attend: Attend, model: Any, cache: KVCache, limits: StepLimits, progress: Callable[[str], None]
) -> GpuDecoder | str:
    """The whole step of a model that was packed (nf4_linear.py) and recognized; or why it runs module by module.

    Its decode steps are graphs where the device captures, the cache has a spare block for it, and every kernel that
    others could not replace in a graph is right on this device.

    Args:
        attend: the attention that the modules run on.
        cache: holds nothing yet; its first blocks are written to. No adapter is loaded.
        progress: told a line at a time.
    Raises:
        DeviceFull: there is no room for what a step works in.
    """
    if cache.num_blocks < sum(BLOCKS):
        return f"the KV cache has {cache.num_blocks} blocks, and {sum(BLOCKS)} are needed to try it"
    try:
        trial = Trial(attend, model, cache)
        description = describe(model, cache.shape, trial.asked, kinds_of(device.activations))
        decoder = GpuDecoder(device, description, cache, _sizes(device, limits), spare_block=cache.spare_block)
        checked = check_operations(device, decoder, progress=progress)
        decoder.operations, decoder.notes = checked.operations, checked.lines
        decoder.equal_bits = checked.same_bits
        _compare(trial, decoder)
    except NotOfThisShape as reason:
        return str(reason)
    if device.captures and decoder.operations.captures and cache.spare_block is not None:
        graphs = StepGraphs(decoder)
        graphs.capture(progress, limits.graph_bytes)
        decoder.notes += (graphs.report(),)
        decoder.equal_bits &= graphs.equal_bits
    return decoder


def _sizes(device: Device, limits: StepLimits) -> StepSizes:
    """For the largest step, and for the trial, which may be larger where an operator allows very little."""
    return StepSizes(
        rows=max(limits.rows, sum(LENGTHS)),
        samples=max(limits.samples, sum(LENGTHS)),
        sequences=max(limits.sequences, len(LENGTHS)),
        blocks=max(limits.blocks, *BLOCKS),
        entries=limits.adapters,
        ranks=limits.ranks,
        programs=_PROGRAMS * device.processors,
    )


def _compare(trial: Trial, decoder: GpuDecoder) -> None:
    """Raises NotOfThisShape: it gives other logits than the modules."""
    _demand(trial.all_rows(decoder), trial.expected)
    _demand(*trial.some_rows(decoder))
    trial.compare_far_out(decoder.description)


def _demand(got: torch.Tensor, expected: torch.Tensor) -> None:
    if got.shape != expected.shape:
        raise NotOfThisShape(f"its modules give logits {tuple(expected.shape)}, and not {tuple(got.shape)}")
    expected = expected.float()
    difference = float(((got - expected).square().mean(-1).sqrt() / expected.std(-1)).max())
    if not difference <= _NEAR:  # a NaN is not
        raise NotOfThisShape(f"its modules compute something else: logits differ by {difference:.2g} of their spread")
