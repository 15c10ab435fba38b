"""The slow reference of the attention that PyTorch's `varlen_attn` documents."""

from __future__ import annotations

import torch


def slow_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    num_splits: int,
) -> torch.Tensor:
    """What torch.nn.attention.varlen.varlen_attn says it computes, from its documentation, one row at a time."""
    assert num_splits == 1 and window_size[1] == 0 and all(x.is_contiguous() for x in (q, k, v))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and (q.shape[1] != k.shape[-2]) == enable_gqa
    assert max_q == cu_seq_q.diff().max() and max_k >= cu_seq_k.diff().max()
    out = torch.empty_like(q)
    for index, (start, stop) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
        if block_table is None:
            assert seqused_k is None and cu_seq_k[-1] == len(k) == len(v)
            keys, values = (x[cu_seq_k[index] : cu_seq_k[index + 1]] for x in (k, v))
        else:
            assert block_table.dtype == torch.int32 and seqused_k is not None and seqused_k.dtype == torch.int32
            keys, values = (x[block_table[index].long()].flatten(0, 1)[: seqused_k[index]] for x in (k, v))
        for t in range(start, stop):
            last = len(keys) - (stop - t)  # the mask is aligned to the last key
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            seen, said = (
                x[first : last + 1].repeat_interleave(q.shape[1] // x.shape[1], 1).float() for x in (keys, values)
            )
            weights = (torch.einsum("hd,shd->hs", q[t].float(), seen) * scale).softmax(-1)
            out[t] = torch.einsum("hs,shd->hd", weights, said).to(q.dtype)
    return out
