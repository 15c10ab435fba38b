"""Training beside a plain `peft` + `bitsandbytes` loop: the same batches in the same order, in interleaved rounds.

    python -m loadtests train --base DIR --data train.jsonl --held held.jsonl \\
        --ours "python tests/support/train_worker.py"

Three processes load the same checkpoint in NF4 and wait: the loop that the libraries' own guides show, with
`prepare_model_for_kbit_training` as it comes (gradient checkpointing on) and with gradient checkpointing off, and the
command given with --ours. A round is some steps of one of them on token ids that are the same for all; the others stand
still. All go on from round to round, so at the end all have learned the same batches, and the held-out loss says
whether speed was bought with quality. Data: {"messages": [...]} on each line, the last message being the answer.

A worker reads lines {"op": "step", "rows": [{"ids": [...], "learned": n}], "learning_rate": x} or {"op": "evaluate",
"rows": [...]}, where the last n ids of a row are learned, and answers each with {"loss": mean nats of learned tokens,
"seconds": s}. Before the first it says {"ready": true}. Optimizer: AdamW without decay, gradients clipped to norm 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from .errors import LoadTestError
from .report import table, write_json

READY = {"ready": True}
ANSWER_SECONDS = 600.0
WARM_UP = 2  # steps of each side before the first round: learned, but not measured
PLAIN = {"peft": False, "peft, checkpointing": True}  # name -> use_gradient_checkpointing
Rows = list[dict[str, Any]]


class PlainLoop:
    """The baseline: padded batches, transformers' loss over all logits, peft's layers over bitsandbytes'."""

    def __init__(self, base: Path, *, rank: int, alpha: int, checkpointing: bool, dtype: str = "bfloat16") -> None:
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        recipe = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        place = {"": "cuda" if torch.cuda.is_available() else "cpu"}
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=recipe, dtype=getattr(torch, dtype), device_map=place
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        self._model: Any = get_peft_model(model, lora)
        # It stays in this mode: in eval mode bitsandbytes repacks weights on some CPUs, and later gradients are wrong.
        self._model.train()
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, weight_decay=0.0)
        self._pad = AutoTokenizer.from_pretrained(base).pad_token_id or 0

    def step(self, rows: Rows, learning_rate: float) -> float:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def evaluate(self, rows: Rows) -> float:
        import torch

        with torch.no_grad():
            return float(self._loss(rows))

    def _loss(self, rows: Rows) -> Any:
        import torch

        longest = max(len(row["ids"]) for row in rows)
        ids, mask, labels = [], [], []
        for row in rows:
            pads, prompt = longest - len(row["ids"]), len(row["ids"]) - row["learned"]
            ids.append(row["ids"] + [self._pad] * pads)
            mask.append([1] * len(row["ids"]) + [0] * pads)
            labels.append([-100] * prompt + row["ids"][prompt:] + [-100] * pads)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        place = self._model.device
        return self._model(**{name: torch.tensor(value, device=place) for name, value in batch.items()}).loss


def serve(trained: PlainLoop, lines: TextIO, replies: TextIO) -> None:
    """Answer each line until there are no more."""
    print(json.dumps(READY), file=replies, flush=True)
    for line in lines:
        order = json.loads(line)
        started = time.perf_counter()
        if order["op"] == "step":
            loss = trained.step(order["rows"], order["learning_rate"])
        else:
            loss = trained.evaluate(order["rows"])
        print(json.dumps({"loss": loss, "seconds": time.perf_counter() - started}), file=replies, flush=True)


class Side:
    """One process that trains."""

    def __init__(self, name: str, command: Sequence[str], environ: dict[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environ
        )
        self.rates: list[float] = []
        self.losses: list[float] = []

    def wait_until_ready(self) -> None:
        if self._receive() != READY:
            raise LoadTestError(f"{self.name} did not start")

    def steps(self, batches: Sequence[Rows], learning_rate: float) -> float:
        """Trains on the batches; tokens per second, pads not counted."""
        seconds: float = 0.0
        for rows in batches:
            answer = self._ask({"op": "step", "rows": rows, "learning_rate": learning_rate})
            self.losses.append(answer["loss"])
            seconds += float(answer["seconds"])
        return sum(len(row["ids"]) for rows in batches for row in rows) / seconds

    def held_loss(self, batches: Sequence[Rows]) -> float:
        """Mean over all learned tokens of the batches."""
        total, learned = 0.0, 0
        for rows in batches:
            count = sum(int(row["learned"]) for row in rows)
            total += count * float(self._ask({"op": "evaluate", "rows": rows})["loss"])
            learned += count
        return total / learned

    def close(self) -> None:
        """End the process: its input ends, so it leaves; killed if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
            self._process.kill()
            raise LoadTestError(f"{self.name} did not answer within {ANSWER_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise LoadTestError(f"{self.name} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def read_rows(path: Path, tokenizer: Any, count: int, *, every_token: bool = False) -> Rows:
    """The first `count` conversations as token ids; the answer and its end token are learned, or all but the first."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        learned = len(ids) + len(answer) - 1 if every_token else len(answer)
        rows.append({"ids": ids + answer, "learned": learned})
    return rows


def group_by_length(rows: Rows, size: int) -> list[Rows]:
    """Batches of rows of similar length, in random order, so that the padded side pads little."""
    draw = random.Random(0)
    batches = []
    for start in range(0, len(rows), 8 * size):
        together = sorted(rows[start : start + 8 * size], key=lambda row: len(row["ids"]))
        batches += [together[first : first + size] for first in range(0, len(together), size)]
    draw.shuffle(batches)
    return batches


def measure(
    sides: Sequence[Side], batches: Sequence[Rows], args: argparse.Namespace, say: Callable[[str], None]
) -> None:
    """Interleaved rounds; the side that begins changes from round to round."""
    for side in sides:
        side.steps(batches[:WARM_UP], args.learning_rate)
    for number in range(args.rounds):
        start = WARM_UP + number * args.steps
        turn = number % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            side.rates.append(side.steps(batches[start : start + args.steps], args.learning_rate))
        say(f"round {number + 1}: " + ", ".join(f"{side.name} {side.rates[-1]:.0f} tok/s" for side in sides))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="directory of the base checkpoint, for all sides")
    parser.add_argument("--data", type=Path, help="JSONL of messages to learn")
    parser.add_argument("--held", type=Path, help="JSONL of messages to evaluate on at the end")
    parser.add_argument("--ours", help="command of our worker; --base, --rank and --alpha are added to it")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--steps", type=int, default=4, help="steps of each side in a round (default: 4)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch (default: 16)")
    parser.add_argument("--held-rows", type=int, default=256, help="held-out rows (default: 256)")
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank, all linear layers (default: 8)")
    parser.add_argument("--alpha", type=int, default=16, help="LoRA alpha (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="constant (default: 5e-4)")
    parser.add_argument("--every-token", action="store_true", help="learn whole conversations, not the answers alone")
    parser.add_argument("--isa", choices=("avx2",), help="hold all sides to this instruction set")
    parser.add_argument(
        "--out", type=Path, default=Path("loadtests/results"), help="where train.json (train-every-avx2.json) goes"
    )
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=list(PLAIN), help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Measures; with --worker it is one of the plain loops instead."""
    if args.worker is not None:
        replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the answers
        loop = PlainLoop(
            args.base, rank=args.rank, alpha=args.alpha, checkpointing=PLAIN[args.worker], dtype=args.dtype
        )
        serve(loop, sys.stdin, replies)
        return 0
    if args.ours is None or args.data is None or args.held is None:
        raise LoadTestError("--ours, --data and --held are needed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.base)

    def read(path: Path, count: int) -> Rows:
        return read_rows(path, tokenizer, count, every_token=args.every_token)

    needed = WARM_UP + args.rounds * args.steps
    batches = group_by_length(read(args.data, needed * args.batch_size), args.batch_size)
    if len(batches) < needed:
        raise LoadTestError(f"{args.data} has {len(batches)} batches of {args.batch_size} rows, {needed} are needed")
    held = group_by_length(read(args.held, args.held_rows), args.batch_size)
    common = ["--base", str(args.base), "--rank", str(args.rank), "--alpha", str(args.alpha)]
    environ, dtype = {}, "bfloat16"
    if args.isa:
        environ = {"LORAMUX_ISA": args.isa, "ATEN_CPU_CAPABILITY": args.isa, "ONEDNN_MAX_CPU_ISA": args.isa.upper()}
        dtype = "float32"
    plain = [sys.executable, "-m", "loadtests", "train", "--dtype", dtype, "--worker"]
    commands = {"ours": shlex.split(args.ours)} | {name: [*plain, name] for name in PLAIN}
    sides: list[Side] = []
    try:
        for name, command in commands.items():
            sides.append(Side(name, [*command, *common], environ))
            sides[-1].wait_until_ready()
        measure(sides, batches, args, lambda line: print(line, flush=True))
        result = summarize(sides, held, args.steps)
    finally:
        for side in sides:
            side.close()
    print(table([["side", "tok/s", "ours is faster by", "train loss, last round", "held-out loss"], *show(result)]))
    args.out.mkdir(parents=True, exist_ok=True)
    name = "-".join(["train", *(["every"] if args.every_token else []), *([args.isa] if args.isa else [])])
    write_json(args.out / f"{name}.json", result)
    return 0


def summarize(sides: Sequence[Side], held: Sequence[Rows], steps: int) -> dict[str, Any]:
    """Medians over the rounds; a speed-up is the median of the ratios within each round."""
    ours = sides[0]
    return {
        side.name: {
            "tokens_per_second": statistics.median(side.rates),
            "speedup": statistics.median(a / b for a, b in zip(ours.rates, side.rates, strict=True)),
            "rates": side.rates,
            "train_loss": statistics.fmean(side.losses[-steps:]),
            "held_loss": side.held_loss(held),
            "losses": side.losses,
        }
        for side in sides
    }


def show(result: dict[str, Any]) -> list[list[str]]:
    """A row of the table for each side."""
    return [
        [
            name,
            f"{it['tokens_per_second']:.0f}",
            f"{it['speedup']:.2f}x",
            f"{it['train_loss']:.4f}",
            f"{it['held_loss']:.4f}",
        ]
        for name, it in result.items()
    ]
