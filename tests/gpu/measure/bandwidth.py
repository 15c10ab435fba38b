"""How many bytes a second the device's memory gives: a copy (bytes read and written) and a sum (bytes read)."""

from __future__ import annotations

import sys

import torch

from measure.part import Part
from measure.timing import interleaved

SIZE = 1 << 31  # bytes, beyond any cache


def main() -> int:
    part = Part(__doc__)
    device, size = part.device, 1 << 12 if part.dry else SIZE
    with device.used(), torch.inference_mode():
        source = device.put(torch.randint(1 << 30, (size // 4,), dtype=torch.int32, device=device.place))
        to, total = device.scratch((size // 4,), torch.int32), device.scratch((), torch.int64)
        found = interleaved(
            device,
            {
                "copy": lambda: lambda: device.copy(to, source),
                "read": lambda: lambda: torch.sum(source, 0, dtype=torch.int64, out=total),
            },
            rounds=part.rounds,
            times=1 if part.dry else 5,
        )
        rates = {"copy": 2 * size / found["copy"].median / 1e6, "read": size / found["read"].median / 1e6}
        wide = 64 if part.dry else 8192
        a, b = (device.put(torch.randn(wide, wide, device=device.place).to(device.activations)) for _ in range(2))
        product = interleaved(device, {"product": lambda: lambda: a @ b}, rounds=part.rounds, times=1)["product"]
        teraflops = 2 * wide**3 / product.median / 1e9
    part.write(gb_per_s=max(rates.values()), **{f"{name}_gb_per_s": rate for name, rate in rates.items()})
    part.write(tflop_per_s=teraflops)
    part.say(", ".join(f"{name} {rate:,.0f} GB/s" for name, rate in rates.items()) + f", {teraflops:,.0f} TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
