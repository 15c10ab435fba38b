"""The 16 levels of NF4 as a device looks them up: in registers, by byte permutation.

A code of 4 bits selects one of 16 levels of 16 bits. `prmt` selects 4 bytes out of 8 by the low 3 bits of 4 codes at
once; where a code's high bit is set, it gives the sign of the byte that the low bits select, 0x00 or 0xFF. So a byte of
four levels is prmt(first 8, code) ^ prmt(second 8, code ^ 8), where each of the two is the wanted byte or that filler,
and the tables are made such that the filler of the first is undone in the second. This asks for an order of the levels
in which level c and level c + 8 agree in the high bit of both bytes. `ORDER` is one for bf16; in fp16 no such order is
also one for bf16, so there the half is selected by a mask.
"""

from __future__ import annotations

import torch

from loramux_adapters import nf4

# Code -> index of the level in NF4's ascending order. Level c and c + 8 have the same sign (zero counts as negative)
# and the same last bit of the exponent as bf16.
ORDER = (0, 4, 1, 2, 8, 12, 9, 13, 3, 6, 5, 7, 11, 15, 10, 14)
_ZERO = 11  # the code of level 0, which is -0 here
LEVELS = tuple(float(nf4.levels()[index]) for index in ORDER)  # code -> level


def level_bits(dtype: torch.dtype) -> list[int]:
    """[16] of 16 bits: the levels of codes 0 to 15 in bf16 or fp16."""
    bits = [value & 0xFFFF for value in torch.tensor(LEVELS).to(dtype).view(torch.int16).tolist()]
    bits[_ZERO] = 0x8000
    return bits


def _bytes_of(levels: list[int], shift: int) -> list[int]:
    return [level >> shift & 0xFF for level in levels]


def _words(table: list[int]) -> tuple[str, str]:
    """8 bytes as the two 32-bit operands of prmt, in PTX."""
    low, high = (sum(byte << 8 * i for i, byte in enumerate(half)) for half in (table[:4], table[4:]))
    return f"0x{low:08x}", f"0x{high:08x}"


# What keeps a constant in a register over a turn of a loop: ptxas would otherwise copy it there again for each use.
# lanemask_eq has one bit set, so z is 0 in every thread, which ptxas does not know.
_ZERO_REGISTER = "mov.u32 z, %lanemask_eq; add.u32 t0, z, -1; and.b32 z, z, t0;"
_INTERLEAVE = (
    "prmt.b32 $0, l, h, 0x6240; prmt.b32 $2, l, h, 0x7351;",
    "prmt.b32 $1, l, h, 0x6240; prmt.b32 $3, l, h, 0x7351;",
)


def look_up_bf16() -> str:
    """PTX: $4 four bytes of codes -> levels in bf16, $0 and $1 of their low halves, $2 and $3 of their high halves."""
    bits = level_bits(torch.bfloat16)
    tables: list[tuple[str, str]] = []
    for shift in (0, 8):
        first, second = _bytes_of(bits, shift)[:8], _bytes_of(bits, shift)[8:]
        assert all((a ^ b) < 0x80 for a, b in zip(first, second, strict=True))
        # The second half's filler must be 0: its bytes have no high bit. The first half's is undone where it is 0xFF.
        tables += [_words(first), _words([b ^ (0xFF if a >= 0x80 else 0) for a, b in zip(first, second, strict=True)])]
    held = " ".join(f"or.b32 t{i}, z, {low};" for i, (low, _) in enumerate(tables))
    look = (
        f"prmt.b32 a, t0, {tables[0][1]}, w; prmt.b32 b, t1, {tables[1][1]}, v; xor.b32 l, a, b; "
        f"prmt.b32 a, t2, {tables[2][1]}, w; prmt.b32 b, t3, {tables[3][1]}, v; xor.b32 h, a, b;"
    )
    return "\n".join(
        [
            "{ .reg .b32 w, v, a, b, l, h, z, t0, t1, t2, t3;",
            f"{_ZERO_REGISTER} {held}",
            "mov.b32 w, $4; xor.b32 v, w, 0x88888888;",
            f"{look} {_INTERLEAVE[0]}",
            "shr.u32 w, w, 16; shr.u32 v, v, 16;",
            f"{look} {_INTERLEAVE[1]} }}",
        ]
    )


def look_up_fp16() -> str:
    """PTX: as `look_up_bf16`, in fp16. m is 0xFF in the bytes whose code has its high bit set."""
    bits = level_bits(torch.float16)
    halves = [(_words(_bytes_of(bits, shift)[:8]), _words(_bytes_of(bits, shift)[8:])) for shift in (0, 8)]
    look = " ".join(
        f"prmt.b32 a, {first[0]}, {first[1]}, f; prmt.b32 b, {second[0]}, {second[1]}, f; lop3.b32 {to}, m, b, a, 0xCA;"
        for to, (first, second) in zip("lh", halves, strict=True)
    )
    return "\n".join(
        [
            "{ .reg .b32 w, f, s, m, a, b, l, h;",
            "mov.b32 w, $4; and.b32 f, w, 0x77777777; shl.b32 s, w, 4;",
            f"prmt.b32 m, s, w, 0xD9C8; {look} {_INTERLEAVE[0]}",
            "shr.u32 f, f, 16;",
            f"prmt.b32 m, s, w, 0xFBEA; {look} {_INTERLEAVE[1]} }}",
        ]
    )
