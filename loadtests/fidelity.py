"""How far the served distribution is from fp32 on the same NF4 weights, over a text of prose, code and French.

    python -m loadtests fidelity --base DIR

Every beginning of the text is a prompt; a reply tells the five likeliest next tokens with their log probabilities. The
reference is transformers' own model in this environment, its NF4 weights (double quantization) dequantized to fp32 and
computed with in fp32; it has the whole distribution. HTTP shows five tokens of it, so the Kullback-Leibler divergence
is that of the five and all others together, which is at most the whole one: tests/e2e/test_fidelity.py holds that one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .baselines import load_nf4
from .errors import LoadTestError
from .process import Server, started_server
from .report import table, write_json

TOP = 5  # the most that completions tell
TOGETHER = 32  # prompts of one request
TARGET = 2e-5  # of the mean divergence, in nats
TEXT = (
    "When the first lighthouses were lit, sailors steered by them for whole nights; a hundred years later each of them "
    "had a number, a colour and a rhythm of its own. The keeper of the north tower wrote every ship into a book.\n\n"
    "def greatest(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\n"
    "Question: A ferry leaves at 8:40 and is under way for an hour and a half. When does it arrive? Answer: at ten "
    "past ten. La mer était calme ce matin-là, et le vieux pêcheur réparait ses filets devant la maison."
)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Over all beginnings of the text.

    Attributes:
        divergence: mean and largest, in nats, of the five likeliest served tokens and all others together.
        difference: mean and largest absolute difference of the log probabilities of those five.
        unlike: beginnings behind which another token is the likeliest.
    """

    positions: int
    divergence: tuple[float, float]
    difference: tuple[float, float]
    unlike: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="directory of the base checkpoint, for both sides")
    parser.add_argument("--serve-args", nargs=argparse.REMAINDER, default=[], help="the rest goes to `loramux serve`")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where fidelity.json goes")


def main(args: argparse.Namespace) -> int:
    """Returns 0 where the target is reached, 1 where it is not."""
    ids, texts, reference = exact_distributions(args.base)
    with started_server(args.base, arguments=args.serve_args, log=args.out / "server.log.tmp") as server:
        served = ask(server, ids)
    found = compare(served, reference, texts)
    print(table([["", "mean", "largest"], *_rows(found)]))
    print(f"another token is the likeliest behind {found.unlike} of {found.positions} beginnings")
    settings = {"base": args.base.name, "top": TOP, "target": TARGET, "serve_args": args.serve_args}
    write_json(args.out / "fidelity.json", {"settings": settings, **asdict(found)})
    return 0 if found.divergence[0] <= TARGET else 1


def _rows(found: Fidelity) -> list[list[str]]:
    return [
        ["KL divergence, nats", *(f"{value:.2e}" for value in found.divergence)],
        ["log probability of the five", *(f"{value:.5f}" for value in found.difference)],
    ]


def ask(server: Server, ids: Sequence[int]) -> list[Mapping[str, float]]:
    """Behind each beginning of the text: the likeliest tokens, as text, with their log probabilities."""
    beginnings = [list(ids[: end + 1]) for end in range(len(ids))]
    found: list[Mapping[str, float]] = []
    for start in range(0, len(beginnings), TOGETHER):
        body = {
            "model": server.base_model(),
            "prompt": beginnings[start : start + TOGETHER],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": TOP,
        }
        reply = json.loads(server.call("POST", "/v1/completions", json.dumps(body).encode()))
        found += [choice["logprobs"]["top_logprobs"][0] for choice in reply["choices"]]
    return found


def compare(
    served: Sequence[Mapping[str, float]], reference: Sequence[Sequence[float]], texts: Mapping[str, int]
) -> Fidelity:
    """
    Args:
        reference: log probabilities [positions][vocabulary].
        texts: text of a token -> its id, of those whose text no other has.
    """
    divergences, differences, unlike = [], [], 0
    for told, exact in zip(served, reference, strict=True):
        pairs = [(exact[texts[text]], logprob) for text, logprob in told.items() if text in texts]
        if not pairs:
            raise LoadTestError("the server's tokens are none of this checkpoint's: is it the same base?")
        differences += [abs(theirs - ours) for theirs, ours in pairs]
        rest = [max(1e-12, 1 - sum(math.exp(each) for each in side)) for side in zip(*pairs, strict=True)]
        divergence = sum(math.exp(theirs) * (theirs - ours) for theirs, ours in pairs)
        divergences.append(divergence + rest[0] * math.log(rest[0] / rest[1]))
        likeliest = max(told, key=lambda text: told[text])
        unlike += texts.get(likeliest) not in (None, max(range(len(exact)), key=exact.__getitem__))
    return Fidelity(
        len(served),
        (sum(divergences) / len(divergences), max(divergences)),
        (sum(differences) / len(differences), max(differences)),
        unlike,
    )


def exact_distributions(base: Path) -> tuple[list[int], dict[str, int], list[list[float]]]:
    """The text's tokens, tokens by their text, and the log probabilities behind each beginning."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids: list[int] = tokenizer(TEXT)["input_ids"]
    texts: dict[str, int] = {}
    twice = set()
    for token in range(len(tokenizer)):
        text = str(tokenizer.decode([token]))
        if texts.setdefault(text, token) != token:
            twice.add(text)
    model = load_exact(base)
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return ids, {text: token for text, token in texts.items() if text not in twice}, logprobs.tolist()


def load_exact(base: Path) -> Any:
    """Quantized as it is served, on the CPU; then every weight in fp32, an NF4 one dequantized to it."""
    import bitsandbytes.functional as bnb
    import torch
    from bitsandbytes.nn import Linear4bit
    from torch import nn
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = load_nf4(base, "eager", "cpu")
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            weight: Any = layer.weight
            state = weight.quant_state
            state.dtype = torch.float32
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight = nn.Parameter(bnb.dequantize_4bit(weight.data, state), requires_grad=False)
            dense.bias = layer.bias
            model.set_submodule(path, dense)
    for tensor in (*model.parameters(), *model.buffers()):  # transformers refuses .float() on a quantized model
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model
