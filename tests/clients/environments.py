"""An environment of its own for each client: their packages fit neither each other's versions nor ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADAPTER = "adapter-1"  # what the server of these tests serves beside its base

Ask = Callable[..., Any]  # the fixture `ask`

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
ROOT = HERE.parents[1] / ".clients"  # kept between runs, ignored by git

# What is installed for each. The first is the client; what it needs comes at whatever version it takes.
PACKAGES = {
    "openai": ("openai==3.54.0",),
    "litellm": ("litellm==1.110.2",),
    "langchain": ("langchain-openai==1.7.4",),
    "schemathesis": ("schemathesis==4.32.5",),
    "lm_eval": ("lm-eval[api]==0.4.13", "transformers==5.23.0"),
    "guidellm": ("guidellm==0.8.1", "torch==2.13.0"),
    "aiperf": ("aiperf==0.13.0",),
}


def environment(client: str) -> Path:
    """The folder of this client's programs, `python` among them; made at the first call, which needs a package index.

    Raises CalledProcessError, with what pip said, if it cannot be made.
    """
    wanted = "\n".join(PACKAGES[client])
    home = ROOT / client
    stamp = home / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {PACKAGES[client][0]} in {home.relative_to(ROOT.parent)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        pip = [home / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES[client]], check=True)
        stamp.write_text(wanted)
    return home / "bin"
