"""The A and B whose product is closest to a matrix: its largest singular triples."""

from __future__ import annotations

import torch
from torch import nn


def closest_pair(matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The A [rank, in] and B [out, rank], fp32, whose scale * B A is closest to `matrix` [out, in].

    B and A get the square root of the singular values each. The eigenvectors of the smaller Gram matrix are the
    singular vectors of its side, in a quarter of an SVD's time. A rank above the smaller side is filled up with zeros.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    e = (matrix.t() if tall else matrix).double()
    _, vectors = torch.linalg.eigh((e @ e.t()).float())
    left = vectors.flip(1)[:, :rank].double()
    right = left.t() @ e
    singular = right.norm(dim=1)
    split = (singular / scale).sqrt()
    a = right / singular.clamp_min(torch.finfo(torch.float64).tiny)[:, None] * split[:, None]
    b = left * split
    missing = rank - len(split)
    a, b = nn.functional.pad(a, (0, 0, 0, missing)).float(), nn.functional.pad(b, (0, missing)).float()
    return (b.t().contiguous(), a.t().contiguous()) if tall else (a, b)
