"""Logits of tokens whose row of the output head an adapter changes, in compiled code (csrc/exact/token_rows.h)."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch

from loramux_adapters.lora.token_rows import OwnLogits
from loramux_server.kernels.compiled.abi import TokenLogits
from loramux_server.kernels.compiled.library import Compiled

WIDE_TOGETHER = 16  # the numbers of a row beyond the vocabulary are a multiple of this


class AddTokenLogits(Protocol):
    """As `add_token_logits_reference` (lora/token_rows.py), which is the slow one."""

    def __call__(self, y: torch.Tensor, wide: torch.Tensor, x: torch.Tensor, own: OwnLogits) -> None: ...


class NativeTokenLogits:
    """Takes fp32 on the CPU; rows of y and wide may lie apart, those of x are dense."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    def __call__(self, y: torch.Tensor, wide: torch.Tensor, x: torch.Tensor, own: OwnLogits) -> None:
        call = token_logits_of(own)
        self._compiled.function("loramux_exact_token_logits")(
            *(y.data_ptr(), y.stride(0), wide.data_ptr(), wide.stride(0), x.data_ptr(), ctypes.addressof(call)),
            *(y.shape[1], x.shape[1], self._compiled.isa, torch.get_num_threads()),
        )


def token_logits_of(own: OwnLogits) -> TokenLogits:
    """As compiled code sees it, while `own` lives."""
    return TokenLogits(
        tokens=own.own.tokens.ctypes.data,
        rows=own.own.rows.data_ptr(),
        at=own.at.ctypes.data,
        scales=own.scales.ctypes.data,
        count=len(own.own.tokens),
        uses=len(own.at),
    )


def never(rows: int, more: int) -> torch.Tensor:
    """[rows, at least `more`] fp32 logits of tokens beyond the vocabulary, which nothing gives yet."""
    return torch.full((rows, -(-more // WIDE_TOGETHER) * WIDE_TOGETHER), -torch.inf)
