"""What is wrong with a command line is said within a moment: before PyTorch and its like are imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.real_server import clean_environment

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "matplotlib", "huggingface_hub", "datasets"}
SCRIPT = """
import json, os, sys
from loramux_adapters.device import driver
driver.DRIVER = "libnothing.so.1"  # as on a machine without a card
from loramux_server.cli import finish, main
cases, heavy, cache = map(json.loads, sys.argv[1:])
before = set()
for case in cases:
    variables = dict(word.split("=", 1) for word in case if word.startswith("LORAMUX_"))
    name, *rest = case[len(variables):]
    os.environ |= variables
    environ = cache | variables
    code = (finish.main(rest, environ) if name == "finish" else main.main([name, *rest], environ))
    for variable in variables:
        del os.environ[variable]
    imported = set(heavy) & set(sys.modules) - before
    before |= imported
    print(json.dumps([code, sorted(imported)]))
    print("=", file=sys.stderr, flush=True)
"""
LINE = '{"prompt": "a", "completion": "b"}\n'
TRAIN = ("train", "--data", "train.jsonl", "--name", "spam")
EVAL = ("eval", "--data", "train.jsonl", "--adapter", "good")
MERGE = ("merge", "--adapter", "good", "--out", "new")
NO_DRIVER = "--device cuda: NVIDIA's driver is not on this machine (there is no libnothing.so.1); install it"
CASES: dict[tuple[str, ...], str] = {  # what begins with LORAMUX_ is a variable
    (*TRAIN, "--name", "a:b"): "--name 'a:b'",
    (*TRAIN, "--name", "smollm2-135m-instruct"): "is the base's own name",
    (*TRAIN, "--base", "nothing"): "base 'nothing' is neither a directory",
    (*TRAIN, "--base", "./pickled"): "holds no safetensors weights; pickled checkpoints",
    (*TRAIN, "--base", "fake.gguf"): "is no GGUF file",
    (*TRAIN, "--base", "train.jsonl"): "is a file; name the directory",
    (*TRAIN, "--data", "nothing.jsonl"): "nothing.jsonl cannot be read: No such file",
    (*TRAIN, "--data", "bad.jsonl"): "bad.jsonl: 1 of 2 examples cannot be used",
    (*TRAIN, "--out", "train.jsonl/run"): "no directory; name another directory with --out",
    (*TRAIN, "--dry-run", "--out", "train.jsonl/run"): "no directory; name another directory with --out",
    (*TRAIN, "--upload", "127.0.0.1:8000"): "--upload '127.0.0.1:8000' is not a URL",
    (*TRAIN, "--upload", "http://127.0.0.1:1"): "--upload: no server answers at http://127.0.0.1:1",
    (*TRAIN, "--rank", "0"): "--rank must be from 1 to 1024",
    (*TRAIN, "--rnk", "4"): "unknown argument --rnk",
    (*EVAL, "--adapter", "nothing"): "there is no adapter 'nothing'",
    (*EVAL, "--adapter", "broken"): "adapter_model.safetensors",
    (*EVAL, "--base", "nothing"): "base 'nothing' is neither a directory",
    (*EVAL, "--data", "nothing.jsonl"): "nothing.jsonl cannot be read",
    (*EVAL, "--data", "one.jsonl", "--labels", "b,c"): "one class alone cannot be evaluated",
    (*EVAL, "--out", "train.jsonl"): "--out train.jsonl is no directory",
    (*EVAL, "--url", "http://127.0.0.1:1", "--labels", "b,c"): "no server answers at http://127.0.0.1:1",
    (*MERGE, "--adapter", "nothing"): "there is no adapter 'nothing'",
    (*MERGE, "--adapter", "broken"): "adapter_model.safetensors",
    (*MERGE, "--base", "nothing"): "base 'nothing' is neither a directory",
    (*MERGE, "--out", "."): "is there already and not empty",
    ("plan", "--base", "nothing"): "base 'nothing' is neither a directory",
    ("plan", "--rank", "0"): "--rank must be from 1 to 1024",
    ("LORAMUX_KERNELS=fast", "serve"): "LORAMUX_KERNELS: there are no kernels named 'fast'; choose one of",
    ("LORAMUX_ISA=avx9", "serve"): "LORAMUX_ISA",
    ("LORAMUX_ISA=avx9", *TRAIN): "LORAMUX_ISA",
    ("LORAMUX_KERNELS=tenser", *EVAL): "reference, triton, cuda; did you mean tensor?",
    ("LORAMUX_KERNELS=tensor", "LORAMUX_ISA=avx2", *MERGE): "LORAMUX_KERNELS=tensor for others: unset one",
    ("LORAMUX_KERNELS=fast", "finish", "run"): "there are no kernels named 'fast'",
    ("finish", "nothing"): "card.json cannot be read",
    **{(*command, "--device", "cuda"): NO_DRIVER for command in (TRAIN, EVAL, MERGE, ("plan",), ("finish", "run"))},
    ("serve", "--device", "cuda", "--base", "Qwen/Qwen3-0.6B"): NO_DRIVER,
    ("finish", "run", "--base", "nothing"): "base 'nothing' is neither a directory",
    ("finish", "run", "--eval-data", "nothing.jsonl"): "nothing.jsonl cannot be read",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[int, list[str], str]]:
    """For each command line its exit code, what was imported until then, and what it said."""
    where = tmp_path_factory.mktemp("early")
    (where / "train.jsonl").write_text(LINE + LINE.replace("b", "c"))
    (where / "one.jsonl").write_text(LINE * 2)
    (where / "bad.jsonl").write_text(LINE + "[]\n")
    (where / "fake.gguf").write_text("no")
    (where / "pickled").mkdir()
    (where / "pickled" / "config.json").write_text("{}")
    (where / "pickled" / "pytorch_model.bin").write_text("")
    for name, header in (("good", b"{}"), ("broken", b"{"), ("run/adapter", b"{}")):
        directory = where / name
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
        (directory / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        (directory / "card.json").write_text(json.dumps({"format": 1, "name": "spam"}))
    cache = where / "cache" / "loramux" / "smollm2-135m-instruct-b179c9523d0e"
    cache.mkdir(parents=True)
    (cache / "config.json").write_text("{}")
    told = [list(map(list, CASES)), sorted(HEAVY), {"XDG_CACHE_HOME": str(where / "cache")}]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(json.dumps, told)],
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=where,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    said = done.stderr.split("=\n")
    return {case: (code, imported, text) for case, (code, imported), text in zip(CASES, lines, said, strict=False)}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_it_is_refused_before_anything_heavy_is_imported(
    case: tuple[str, ...], answers: dict[tuple[str, ...], tuple[int, list[str], str]]
) -> None:
    code, imported, said = answers[case]

    assert CASES[case] in said
    assert code in (1, 2)
    assert imported == []
