"""What is installed, which card it is, and which kernels the server would choose on it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata

import torch

from loramux_server.kernels.choice import choose_kernels
from measure.part import Part

PACKAGES = ("loramux", "torch", "triton", "transformers", "bitsandbytes", "peft", "numpy", "safetensors", "tokenizers")


def main() -> int:
    part = Part(__doc__)
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    device = part.device
    part.write(
        card=device.name,
        device=device.report(),
        python=platform.python_version(),
        packages=packages,
        cuda=torch.version.cuda,
        compiler=next((found for name in ("gcc", "clang", "cc") if (found := shutil.which(name))), "none"),
        driver=_driver(),
    )
    with device.used():
        kernels = choose_kernels(device)
    part.write(kernels=kernels.name)
    part.say(f"{device.report()}; kernels {kernels.name}; {', '.join(f'{k} {v}' for k, v in packages.items())}")
    return 0


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,pci.bus_id", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"


if __name__ == "__main__":
    sys.exit(main())
