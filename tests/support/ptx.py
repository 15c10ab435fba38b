"""The few PTX instructions of our inline assembly, on the host: Triton's interpreter cannot run any.

Sources: PTX ISA 8.5, chapters "prmt" (default mode), "lop3", "shl", "shr".
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def run(text: str, operands: dict[str, Words]) -> dict[str, Words]:
    """Runs `text`; operands are the inputs "$4" and so on, [n] each. Returns all registers, "$0" and named ones."""
    width = len(next(iter(operands.values())))
    registers: dict[str, Words] = {**operands, "%lanemask_eq": np.uint32(1) << (np.arange(width, dtype=np.uint32) % 32)}

    def value(name: str) -> Words:
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", name):
            return np.full(width, int(name, 0) & 0xFFFFFFFF, dtype=np.uint32)
        return registers[name]

    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        operation, rest = line.strip().split(maxsplit=1)
        to, *names = (name.strip() for name in rest.split(","))
        registers[to] = _operate(operation.split(".")[0], [value(name) for name in names])
    return registers


def _operate(operation: str, of: list[Words]) -> Words:
    if operation == "mov":
        return of[0].copy()
    if operation == "add":
        return of[0] + of[1]
    if operation == "and":
        return of[0] & of[1]
    if operation == "or":
        return of[0] | of[1]
    if operation == "xor":
        return of[0] ^ of[1]
    if operation == "shl":
        return of[0] << of[1]
    if operation == "shr":
        return of[0] >> of[1]
    if operation == "lop3":
        return _lop3(*of)
    if operation == "prmt":
        return _prmt(*of)
    raise NotImplementedError(operation)


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit i of the table is the result for a = bit 2 of i, b = bit 1, c = bit 0."""
    found = np.zeros_like(a)
    for index in range(8):
        if int(table[0]) >> index & 1:
            found |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return found


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    """Byte i of the result: the byte of b:a that the low 3 bits of nibble i select; its sign alone if bit 3 is set."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(a)
    for index in range(4):
        nibble = selector >> np.uint32(4 * index) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 0x80, np.uint32(255), np.uint32(0))
        found |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * index)
    return found
