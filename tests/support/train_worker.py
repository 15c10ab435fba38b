"""Our side of `python -m loadtests train`: a process that trains on the token ids it is sent.

`train_worker.py --base DIR --rank R --alpha A` speaks the line protocol of loadtests/train_baseline.py with the model,
the optimizer and the clipping that `loramux train` uses, without checkpoints, log and progress, as the baseline is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from loramux_adapters.device.choice import device_named
from loramux_adapters.training.data.batches import Row, TokenBatch
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.optimizer import make_optimizer, set_rate
from loramux_server.base.loader import load_base_model
from loramux_server.kernels.training import training_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    args = parser.parse_args()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the answers
    recipe = Recipe(rank=args.rank, alpha=args.alpha)
    cache = Path("~/.cache/loramux").expanduser()
    device = device_named("auto")
    base = load_base_model(args.base, device=device, cache_dir=cache, report=lambda line: None, training=True)
    model = LoraModel.build(base.model, recipe, ops=training_kernels(base.model, device))
    optimizer = make_optimizer(model.trainable, recipe)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began = time.perf_counter()
        batch = TokenBatch.of([row(**given) for given in order["rows"]])
        if order["op"] == "step":
            outcome = model.loss(batch, grad_scale=1 / batch.learned)
            torch.nn.utils.clip_grad_norm_(model.trainable.values(), recipe.max_grad_norm)
            set_rate(optimizer, order["learning_rate"])
            optimizer.step()
            optimizer.zero_grad()
        else:
            outcome = model.evaluate(batch)
        seconds = time.perf_counter() - began
        print(json.dumps({"loss": outcome.loss_sum / outcome.tokens, "seconds": seconds}), file=replies, flush=True)


def row(ids: list[int], learned: int) -> Row:
    """The last `learned` ids are to be learned."""
    return Row(tuple(ids), (False,) * (len(ids) - learned) + (True,) * learned)


if __name__ == "__main__":
    main()
