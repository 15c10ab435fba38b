"""The baselines, as a process that waits: it measures one round of `generate` for each line that it reads.

    python -m loadtests baselines --base DIR --adapter a0=DIR --adapter a1=DIR ...

reads lines {"kind": "peft" | "static", "prompts": [...], "adapters": [...], "new_tokens": n} and answers each with
{"tokens": n, "seconds": s}. `peft` is one left-padded batch through generate(adapter_names=...); `static` is the same
batch through the plain base, without LoRA layers. Both sit on the NF4 base: double quantization, bf16, greedy.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .errors import LoadTestError

READY = {"ready": True}
ANSWER_SECONDS = 600.0  # most for loading, and for one round


class Baselines:
    """The two models of the worker, each loaded from the same checkpoint."""

    def __init__(self, base: Path, adapters: Mapping[str, Path], attention: str) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._static = load_nf4(base, attention, device)
        self._peft: Any = None
        for name, directory in adapters.items():
            if self._peft is None:
                model = load_nf4(base, attention, device)
                self._peft = PeftModel.from_pretrained(model, directory, adapter_name=name).eval()
            else:
                self._peft.load_adapter(directory, adapter_name=name)

    def measure(
        self, kind: str, prompts: Sequence[str], adapters: Sequence[str | None], new_tokens: int
    ) -> dict[str, float]:
        """One static batch, tokenizing included; every reply has exactly `new_tokens` tokens."""
        import torch

        model = {"static": self._static, "peft": self._peft}[kind]
        chosen = {"adapter_names": [name or "__base__" for name in adapters]} if kind == "peft" else {}
        started = time.perf_counter()
        with torch.inference_mode():
            batch = self._tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
            reply = model.generate(
                **batch,
                **chosen,
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        seconds = time.perf_counter() - started
        return {"tokens": len(prompts) * (reply.shape[1] - batch["input_ids"].shape[1]), "seconds": seconds}


def load_nf4(base: Path, attention: str, device: str) -> Any:
    """The base as bitsandbytes quantizes it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=recipe,
        dtype=torch.bfloat16,
        device_map={"": device},
        attn_implementation=attention,
    )
    return model.eval()


def serve(baselines: Baselines, lines: TextIO, replies: TextIO) -> None:
    """Answer each line until there are no more."""
    print(json.dumps(READY), file=replies, flush=True)
    for line in lines:
        order = json.loads(line)
        result = baselines.measure(order["kind"], order["prompts"], order["adapters"], order["new_tokens"])
        print(json.dumps(result), file=replies, flush=True)


class Worker:
    """The other side: starts the process, waits until it is ready, and asks it for rounds."""

    def __init__(self, base: Path, adapters: Mapping[str, Path], attention: str) -> None:
        command = [sys.executable, "-m", "loadtests", "baselines", "--base", str(base), "--attention", attention]
        for name, directory in adapters.items():
            command += ["--adapter", f"{name}={directory}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._receive() != READY:
            raise LoadTestError("the baseline worker did not start")

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
            self._process.kill()
            raise LoadTestError(f"the baseline worker did not answer within {ANSWER_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise LoadTestError(f"the baseline worker ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, kind: str, prompts: Sequence[str], adapters: Sequence[str | None], new_tokens: int) -> float:
        """Tokens per second of one round."""
        assert self._process.stdin is not None
        order = {"kind": kind, "prompts": list(prompts), "adapters": list(adapters), "new_tokens": new_tokens}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._receive()
        return float(answer["tokens"]) / float(answer["seconds"])

    def close(self) -> None:
        """End the process: its input ends, so it leaves; killed if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _hush() -> None:
    """Loading says nothing that a reader of the figures needs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="directory of the base checkpoint")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="a PEFT directory; once per adapter"
    )
    parser.add_argument("--attention", default="eager", help="transformers' attention: eager (default) or sdpa")


def main(args: argparse.Namespace) -> int:
    """Serve until the input ends."""
    # What libraries print must not mix with the answers.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _hush()
    adapters = {name: Path(directory) for name, _, directory in (item.partition("=") for item in args.adapter)}
    serve(Baselines(args.base, adapters, args.attention), sys.stdin, replies)
    return 0
