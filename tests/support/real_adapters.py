"""Sixteen adapters for the embedded base, of different rank and targets."""

from __future__ import annotations

from pathlib import Path

from support.adapter_files import write_adapter
from support.shapes import llama_linears

LINEARS = llama_linears(30, 576, 192, 1536, 49152)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# (rank, target modules) of each adapter
KINDS = [
    *[(8, ["q_proj", "v_proj"]), (16, ATTENTION + MLP), (4, MLP), (1, ATTENTION + MLP)],
    *[(32, ["o_proj"]), (64, ["down_proj"]), (3, ["lm_head"]), (24, ATTENTION)],
    *[(8, ATTENTION + MLP + ["lm_head"]), (16, ["k_proj"]), (128, ["v_proj"]), (5, ["up_proj"])],
    *[(16, ATTENTION + MLP), (2, ["gate_proj", "q_proj"]), (256, ["q_proj"]), (12, MLP)],
]
ADAPTERS = [f"adapter-{index}" for index in range(len(KINDS))]


def make_adapter(directory: Path, index: int, seed: int = 0) -> Path:
    rank, targets = KINDS[index]
    return write_adapter(
        directory, LINEARS, rank=rank, alpha=2 * rank, targets=targets, seed=1000 * seed + index, std_b=0.03 / rank**0.5
    )
