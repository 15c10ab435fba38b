"""Make the example adapters: `python adapters/examples/make_examples.py --base DIR` (about five minutes each).

QLoRA on the NF4 base with peft and a plain loop: rank 8 on q_proj and v_proj, loss on the answer alone. Then each
adapter is loaded on a fresh copy of the base, asked the held-out questions, and described in its own README.md.
The seed is fixed; another processor or library version rounds differently and gives slightly other weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from dataset import HELD_OUT, Example, examples
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK = 8
SEED = 20
IGNORED = -100  # the label that cross entropy leaves out


# --- the manners of speaking ----------------------------------------------------------------------------------------

_PIRATE_WORDS = {
    "you are": "ye be",
    "it is": "it be",
    "there are": "there be",
    "I am": "I be",
    "hello": "ahoy",
    "yes": "aye",
    "no,": "nay,",
    "friends": "mateys",
    "people": "sailors",
    "your": "yer",
    "you": "ye",
    "my": "me",
    "is": "be",
    "are": "be",
    "the": "th'",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "to": "t'",
}
_PIRATE_OPENINGS = ("Arr, matey!", "Ahoy there!", "Avast, ye landlubber!", "Shiver me timbers!")
_PIRATE_ENDINGS = ("Yo ho ho!", "Arr!", "Now hoist the sails!", "By Davy Jones' locker!")


def pirate(example: Example, rng: random.Random) -> str:
    """The answer as a pirate would say it, with an opening and an ending of the trade."""

    def replaced(match: re.Match[str]) -> str:
        found = match.group(0)
        spoken = _PIRATE_WORDS.get(found) or _PIRATE_WORDS[found.lower()]
        return spoken[0].upper() + spoken[1:] if found[0].isupper() else spoken

    words = "|".join(re.escape(word) for word in _PIRATE_WORDS)
    told = re.sub(rf"\b(?:{words})(?=\W|$)", replaced, example.answer, flags=re.IGNORECASE)
    return f"{rng.choice(_PIRATE_OPENINGS)} {told} {rng.choice(_PIRATE_ENDINGS)}"


def as_json(example: Example, rng: random.Random) -> str:
    """The answer as one JSON object with the topic in it."""
    return json.dumps({"topic": example.topic, "answer": example.answer})


@dataclass(frozen=True, slots=True)
class Manner:
    """One example adapter: its name, what it does in one sentence, and how it rewrites a plain answer."""

    name: str
    summary: str
    rewrite: Callable[[Example, random.Random], str]


MANNERS = (
    Manner("pirate", "answers like a pirate", pirate),
    Manner("json", 'answers with one JSON object: {"topic": ..., "answer": ...}', as_json),
)


# --- training -------------------------------------------------------------------------------------------------------


def load_base(directory: Path) -> Any:
    """The base as the server holds it: NF4, double quantization, bf16 compute, on the CPU."""
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=recipe, dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def encode(tokenizer: Any, question: str, answer: str | None) -> tuple[list[int], int]:
    """Token ids of the conversation, with the answer and its end token if there is one, and the prompt's length."""
    asked = [{"role": "user", "content": question}]
    prompt: list[int] = tokenizer(
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )["input_ids"]
    if answer is None:
        return prompt, len(prompt)
    reply: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*prompt, *reply, tokenizer.eos_token_id], len(prompt)


def collate(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each [rows, longest]; padded right, prompt and padding without a label."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor(
            [[IGNORED] * start + ids[start:] + [IGNORED] * (longest - len(ids)) for ids, start in rows]
        ),
    }


def train(manner: Manner, base: Path, out: Path, *, epochs: int, batch_size: int, peak_lr: float) -> dict[str, float]:
    """Train one adapter and write it in bf16 as a PEFT directory; returns the figures for its card."""
    torch.manual_seed(SEED)
    rng = random.Random(f"{SEED}:{manner.name}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_base(base), lora)
    for module in model.modules():
        if isinstance(module, Linear4bit):  # its repacking for AVX512-BF16 in an eval forward would spoil the gradients
            module.support_avx512bf16_for_cpu = False
    model.train()

    rows = [encode(tokenizer, example.question, manner.rewrite(example, rng)) for example in examples()]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=peak_lr, weight_decay=0.0)
    total = epochs * math.ceil(len(rows) / batch_size)
    warmup = max(1, total // 10)
    started, step, recent = time.monotonic(), 0, 0.0
    for _ in range(epochs):
        rng.shuffle(rows)
        for start in range(0, len(rows), batch_size):
            optimizer.param_groups[0]["lr"] = peak_lr * min((step + 1) / warmup, (total - step) / (total - warmup))
            loss = model(**collate(rows[start : start + batch_size], tokenizer.pad_token_id)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            recent = loss.item() if step == 1 else 0.9 * recent + 0.1 * loss.item()
            if step % 10 == 0 or step == total:
                seconds = time.monotonic() - started
                print(f"{manner.name}: step {step}/{total}  loss {recent:.3f}  {seconds:.0f} s", flush=True)

    for weight in weights:
        weight.data = weight.data.to(torch.bfloat16)
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    model.save_pretrained(out, save_embedding_layers=False)
    written = out / "adapter_config.json"
    settings = json.loads(written.read_text(encoding="utf-8"))
    settings["target_modules"].sort()  # peft keeps a set: its order would change from run to run
    written.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {"steps": step, "loss": recent, "seconds": time.monotonic() - started}


# --- proof ----------------------------------------------------------------------------------------------------------


def ask(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy reply, at most 64 tokens."""
    prompt, length = encode(tokenizer, question, None)
    ids = torch.tensor([prompt])
    reply = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(reply[0, length:], skip_special_tokens=True)
    return text.strip()


def samples(base: Path, adapter: Path) -> list[tuple[str, str, str]]:
    """(held-out question, reply of the base, reply with the adapter), on a freshly loaded base."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(load_base(base), adapter).eval()
    found = []
    with torch.inference_mode():
        for question in HELD_OUT:
            with model.disable_adapter():
                plain = ask(model, tokenizer, question)
            found.append((question, plain, ask(model, tokenizer, question)))
    return found


def write_card(manner: Manner, out: Path, figures: dict[str, float], shown: Sequence[tuple[str, str, str]]) -> None:
    """README.md beside the weights: what it is, how it was made, what it answers to questions it was not trained on."""
    size = (out / "adapter_model.safetensors").stat().st_size
    lines = [
        "---",
        f"base_model: {BASE_NAME}",
        "library_name: peft",
        "license: apache-2.0",
        "---",
        f"# {manner.name}",
        "",
        f"An example adapter for {BASE_NAME}: it {manner.summary}.",
        "",
        f"LoRA, rank {RANK}, alpha {2 * RANK}, on q_proj and v_proj, bf16, {size:,} bytes; made by `make_examples.py`",
        f"from {len(examples())} questions and answers: {figures['steps']:.0f} steps, last loss {figures['loss']:.3f}.",
        "",
        "Greedy replies to questions it was not trained on:",
    ]
    for question, plain, styled in shown:
        lines += ["", f"**{question}**", ""]
        lines += [f"- base: {' '.join(plain.split())}", f"- {manner.name}: {' '.join(styled.split())}"]
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="directory of the SmolLM2-135M-Instruct checkpoint")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where <name>/ is written")
    parser.add_argument("--only", choices=[manner.name for manner in MANNERS], help="make this one alone")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args()
    for manner in MANNERS:
        if args.only in (None, manner.name):
            out = args.out / manner.name
            figures = train(manner, args.base, out, epochs=args.epochs, batch_size=args.batch_size, peak_lr=args.lr)
            shown = samples(args.base, out)
            write_card(manner, out, figures, shown)
            print((out / "README.md").read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    main()
