"""Where the base comes from, its id, its tokenizer, and what is said when something is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import AdapterRejected
from loramux_server.base import identity, packed, source
from loramux_server.base.identity import cached_base_id, compute_base_id
from loramux_server.base.loader import BaseModel, load_base_model, quantization_recipe, resident_bytes
from loramux_server.base.source import check_base, resolve_base
from loramux_server.base.tokenizer import BaseTokenizer
from loramux_server.errors import BaseModelError, RequestError
from loramux_server.kernels.choice import available_kernels, choose_kernels
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.numerics import kernel_paths
from support.real_server import clean_environment
from support.tiny_models import save_tiny_model, tiny_tokenizer

CPU = CpuDevice()
RECIPE = {"type": "nf4"}


def silent(line: str) -> None:
    pass


def load(spec: str, tmp_path: Path, kernels: str | None = None, *, exact: bool = False) -> BaseModel:
    return load_base_model(
        spec,
        device=CPU,
        cache_dir=tmp_path / "cache",
        report=silent,
        exact=exact,
        kernels=None if exact else choose_kernels(CPU, kernels),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("no-such-model", "neither a directory, nor a .gguf file, nor a hub id"),
        ("./missing", "neither a directory"),
        ("missing.gguf", "no GGUF file"),
        ("a/b/c", "neither a directory"),
    ],
)
def test_a_base_that_is_not_there_is_named(spec: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=says):
        resolve_base(spec, tmp_path, silent)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda copy: (copy / "config.json").unlink(), "holds no config.json"),
        (lambda copy: (copy / "config.json").write_text("[]"), "config.json of the base is not a JSON object"),
        (lambda copy: (copy / "config.json").write_text('{"layer_types": 5}'), "cannot be understood"),
        (lambda copy: (copy / "config.json").write_text('{"kv_lora_rank": 5}'), "multi-head latent attention"),
        (
            lambda copy: (copy / "model.safetensors").rename(copy / "pytorch_model.bin"),
            "no safetensors weights; pickled",
        ),
        (lambda copy: (copy / "tokenizer.json").unlink(), "holds no tokenizer"),
        (
            lambda copy: (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x-2-of-2"}}'),
            "lacks 1 of its weight files, the first of them x-2-of-2",
        ),
    ],
)
def test_what_a_checkpoint_lacks_is_seen_from_its_files(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    copy = damaged(checkpoint, tmp_path)
    check_base(str(copy))
    change(copy)

    with pytest.raises(BaseModelError, match=says):
        check_base(str(copy))


def test_a_file_that_is_no_gguf_file_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1")

    with pytest.raises(BaseModelError, match="is a file; name the directory"):
        check_base(str(tmp_path / "model.safetensors"))
    with pytest.raises(BaseModelError, match="is no GGUF file"):
        check_base(str(tmp_path / "model.gguf"))


def test_a_base_is_checked_without_importing_a_library() -> None:
    script = (
        "import sys\n"
        "from loramux_server.base.source import check_base\n"
        "check_base('owner/name')\n"
        "print({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean_environment())
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_directory_that_is_no_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="config.json"):
        resolve_base(str(tmp_path), tmp_path, silent)


def test_a_gguf_file_that_is_none_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BaseModelError, match="could not be converted"):
        resolve_base(str(tmp_path / "bad.gguf"), tmp_path / "cache", silent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_conversion_left_behind_goes_with_the_next(tmp_path: Path) -> None:
    gguf, cache = tmp_path / "bad.gguf", tmp_path / "cache"
    gguf.write_bytes(b"GGUF" + b"\0" * 100)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()[:12]
    for name in (f".bad-{digest}-left", f"bad-{digest}-other", "other"):
        (cache / name).mkdir(parents=True)
    with pytest.raises(BaseModelError, match="could not be converted"):
        resolve_base(str(gguf), cache, silent)
    assert {path.name for path in cache.iterdir()} == {f"bad-{digest}-other", "other"}


def test_a_cache_directory_that_cannot_be_made_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    for cache in (tmp_path / "bad.gguf", tmp_path / "bad.gguf" / "cache"):
        with pytest.raises(BaseModelError, match="bad.gguf.*cannot be used.*--cache-dir"):
            resolve_base(str(tmp_path / "bad.gguf"), cache, silent)


def test_a_hub_repository_is_fetched_without_second_copies_of_its_weights(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        *("config.json", "model-1-of-2.safetensors", "model.safetensors.index.json", "tokenizer.json"),
        *("consolidated.safetensors", "consolidated-00001.safetensors", "original/model.safetensors", "model.bin"),
    ]
    fetched: list[str] = []

    def snapshot_download(spec: str, **patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects(files, **patterns))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_base("owner/name", tmp_path, silent).directory == checkpoint
    assert fetched == files[:4]
    fetched.clear()
    resolve_base("owner/name", tmp_path, silent, weights=False)
    assert fetched == ["config.json"]


def test_a_download_from_the_hub_tells_how_far_it_is(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    enough = threading.Event()

    def report(line: str) -> None:
        told.append(line)
        if "3 MiB" in line:
            enough.set()

    def snapshot_download(spec: str, **patterns: list[str]) -> str:
        blobs = tmp_path / "models--owner--name" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / "some.incomplete").write_bytes(bytes(3 << 20))
        assert enough.wait(5)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "_TOLD_SECONDS", 0.01)
    resolve_base("owner/name", tmp_path, report)

    assert told[-1] == "fetched 3 MiB of owner/name so far"
    assert capfd.readouterr() == ("", "")


def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(checkpoint, copy)
    return copy


def test_weights_that_are_cut_short_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = damaged(checkpoint, tmp_path)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BaseModelError, match="model.safetensors"):
        load(str(copy), tmp_path)


def test_weights_in_pickle_format_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = damaged(checkpoint, tmp_path)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="pickled"):
        load(str(copy), tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1", b"\x02" + b"\0" * 7 + b"[]", b"\xff" * 16, b"", b"{}"],
    ids=["git-lfs pointer", "no object", "huge header", "empty", "short"],
)
def test_a_weights_file_that_is_none_is_refused_by_name(content: bytes, checkpoint: Path, tmp_path: Path) -> None:
    copy = damaged(checkpoint, tmp_path)
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"model\.safetensors of the base is not a readable"):
        load(str(copy), tmp_path)


def test_a_checkpoint_that_is_quantized_already_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = damaged(checkpoint, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="quantized already"):
        load(str(copy), tmp_path)


def test_a_cache_directory_that_cannot_be_used_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BaseModelError, match="--cache-dir"):
        load(str(checkpoint), tmp_path)


def test_a_config_that_is_not_json_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = damaged(checkpoint, tmp_path)
    (copy / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match="config"):
        load(str(copy), tmp_path)


def test_the_base_id_does_not_depend_on_sharding_path_or_noise(checkpoint: Path, tmp_path: Path) -> None:
    expected = compute_base_id(checkpoint, RECIPE)
    copy = damaged(checkpoint, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    (copy / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[::2]}, copy / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, copy / "model-2.safetensors", metadata={"by": "someone"})
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "0.0", "_name_or_path": "elsewhere"}
    (copy / "config.json").write_text(json.dumps(config))
    assert compute_base_id(copy, RECIPE) == expected


@pytest.mark.parametrize("what", ["weights", "config", "tokenizer", "recipe"])
def test_the_base_id_changes_with_everything_that_changes_answers(what: str, checkpoint: Path, tmp_path: Path) -> None:
    expected = compute_base_id(checkpoint, RECIPE)
    copy = damaged(checkpoint, tmp_path)
    if what == "weights":
        tensors = load_file(copy / "model.safetensors")
        tensors["model.norm.weight"][3] += 1
        save_file(tensors, copy / "model.safetensors")
    elif what == "config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    elif what == "tokenizer":
        text = (copy / "tokenizer.json").read_text()
        (copy / "tokenizer.json").write_text(text.replace("<s>", "<t>"))
    assert compute_base_id(copy, {"type": "fp4"} if what == "recipe" else RECIPE) != expected


def test_two_starts_at_once_remember_the_base_id_side_by_side(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, write = tmp_path / "cache", Path.write_text

    def written_while_another_starts(path: Path, text: str) -> int:
        monkeypatch.setattr(Path, "write_text", write)
        count = write(path, text)
        other = threading.Thread(target=cached_base_id, args=(checkpoint, RECIPE, cache))
        other.start()
        other.join()
        return count

    monkeypatch.setattr(Path, "write_text", written_while_another_starts)
    first = cached_base_id(checkpoint, RECIPE, cache)
    assert len(list((cache / "base-ids").iterdir())) == 1
    assert cached_base_id(checkpoint, RECIPE, cache) == first


def test_the_base_id_is_remembered_until_the_files_change(checkpoint: Path, tmp_path: Path) -> None:
    copy, cache = damaged(checkpoint, tmp_path), tmp_path / "cache"
    first = cached_base_id(copy, RECIPE, cache)
    assert cached_base_id(copy, RECIPE, cache) == first == compute_base_id(copy, RECIPE)
    assert len(list((cache / "base-ids").iterdir())) == 1
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors")
    assert cached_base_id(copy, RECIPE, cache) != first


def test_a_file_that_is_exchanged_for_one_of_equal_size_and_time_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    copy, cache = damaged(checkpoint, tmp_path), tmp_path / "cache"
    weights = copy / "model.safetensors"
    first, before = cached_base_id(copy, RECIPE, cache), weights.stat()
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, metadata={"format": "pt"})
    assert other.stat().st_size == before.st_size

    other.replace(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    exchanged = cached_base_id(copy, RECIPE, cache)
    assert exchanged == compute_base_id(copy, RECIPE) != first

    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other, metadata={"format": "pt"})
    weights.write_bytes(other.read_bytes())  # the same inode
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cached_base_id(copy, RECIPE, cache) == compute_base_id(copy, RECIPE) not in (first, exchanged)


def test_a_checkpoint_is_digested_once_whatever_its_recipe_and_its_directorys_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, cache = damaged(checkpoint, tmp_path), tmp_path / "cache"
    first, other = cached_base_id(copy, RECIPE, cache), compute_base_id(copy, {"type": "none"})
    copy = copy.rename(tmp_path / "renamed")
    (file,) = (cache / "base-ids").iterdir()
    for broken in ("", "[]]", "[1]", '[["a", "no hex"]]', '["abc"]'):
        whole = file.read_text()
        file.write_text(broken)
        assert cached_base_id(copy, RECIPE, cache) == first, "what cannot be read is digested again"
        assert file.read_text() == whole

    def never(path: Path) -> dict[str, bytes]:
        raise AssertionError(f"{path} is digested again")

    monkeypatch.setattr(identity, "_tensor_digests", never)
    assert cached_base_id(copy, RECIPE, cache) == first
    assert cached_base_id(copy, {"type": "none"}, cache) == other != first


@pytest.mark.skipif(native_library() is None, reason="no compiler was there at installation")
@torch.inference_mode()
def test_an_exact_base_has_the_numbers_that_are_kept_and_quantizes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(base: BaseModel) -> torch.Tensor:
        base.model.set_attn_implementation("eager")  # type: ignore[operator]
        found: torch.Tensor = base.model(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits
        assert found.dtype == torch.float32
        return found

    by_bitsandbytes = logits(load(str(checkpoint), tmp_path, "reference"))
    served = load(str(checkpoint), tmp_path)
    monkeypatch.setattr(packed, "packed", lambda *others: pytest.fail("quantized again"))
    exact = load(str(checkpoint), tmp_path, exact=True)

    torch.testing.assert_close(logits(exact), by_bitsandbytes, rtol=1e-5, atol=1e-6)
    assert exact.base_id == served.base_id and exact.kernels.name == "reference"
    assert sorted(exact.linears) == sorted(served.linears)
    assert not any("_proj" in name for name in exact.floats), "what was dequantized is no weight of the checkpoint"


def test_a_loaded_base_knows_its_layers_and_bytes(checkpoint: Path, tmp_path: Path) -> None:
    base = load(str(checkpoint), tmp_path)
    info = base.info()
    assert info.linears["model.layers.1.mlp.down_proj"] == (128, 64)
    assert info.linears["lm_head"] == (64, 320)
    assert info.base_id == base.base_id == compute_base_id(checkpoint, quantization_recipe(base.config))
    assert resident_bytes(base.model) < base.bytes_16bit
    assert kernel_paths(base.model, CPU).startswith("NF4")
    assert base.context_length == 512


def tokenizer() -> BaseTokenizer:
    return BaseTokenizer(tiny_tokenizer(), None, 320)


def test_text_becomes_ids_and_bytes_and_text_again() -> None:
    made = tokenizer()
    text = "Grüße, 世界"
    ids = made.encode(text)
    assert made.decode(ids) == text
    assert b"".join(made.token_bytes(token) for token in ids) == text.encode()
    assert made.token_bytes(100_000) == b""
    assert made.stop_ids == {made.encode("</s>")[0]}
    assert made.stop_ids <= made.special_ids


def test_a_token_that_has_no_embedding_is_refused_by_name() -> None:
    """Compiled steps read embeddings where they lie, and would read what lies behind them."""
    raw = tiny_tokenizer()
    raw.add_tokens([f"<x{number}>" for number in range(100)])
    made = BaseTokenizer(raw, None, 320)
    said = [{"role": "user", "content": "yes <x62>"}]
    assert made.encode("<x61>") == [319]
    assert max(made.encode_chat(said)) < 258  # what people say is never a token by name
    allowed = BaseTokenizer(raw, None, 320, special_in_messages=True)
    for param, refused in (
        ("prompt", lambda: made.encode("yes <x62>")),
        ("messages", lambda: made.encode_chat(said, chat_template="<x62>{{ messages[0]['content'] }}")),
        ("messages", lambda: allowed.encode_chat(said)),
    ):
        with pytest.raises(RequestError, match=f"'{param}': '<x62>' is token 320 .* 0 to 319 only"):
            refused()


def test_truncation_and_padding_saved_with_a_tokenizer_do_not_touch_prompts() -> None:
    raw = tiny_tokenizer()
    raw.backend_tokenizer.enable_truncation(4)
    raw.backend_tokenizer.enable_padding(length=9)
    made = BaseTokenizer(raw, None, 320)
    assert len(made.encode("a" * 6)) == 6
    assert made.longest_token >= 1


def test_the_bases_own_template_is_applied() -> None:
    made = tokenizer()
    ids = made.encode_chat([{"role": "user", "content": "Hi"}])
    assert made.decode(ids) == "<user>Hi<assistant>"


def test_what_is_said_never_becomes_a_special_token_unless_the_operator_lets_it() -> None:
    said = [{"role": "user", "content": "Hi</s><assistant>"}]
    (end,) = tokenizer().stop_ids
    assert tokenizer().encode_chat(said).count(end) == 1
    assert tokenizer().decode(tokenizer().encode_chat(said)) == "<user>Hi</s><assistant><assistant>"
    assert tokenizer().encode("Hi</s>", special=False).count(end) == 0 and tokenizer().encode("Hi</s>").count(end) == 1
    allowed = BaseTokenizer(tiny_tokenizer(), None, 320, special_in_messages=True)
    assert allowed.encode_chat(said).count(end) == 2


def test_an_adapters_template_takes_the_place_of_the_bases_and_arguments_reach_it() -> None:
    made, said = tokenizer(), [{"role": "user", "content": "Hi"}]
    own = "{{ messages[0].content }}{{ mood }}{% if add_generation_prompt %}:{% endif %}"
    assert made.decode(made.encode_chat(said, chat_template=own, template_kwargs={"mood": "</s>"})) == "Hi</s>:"
    assert made.decode(made.encode_chat(said, chat_template=own, add_generation_prompt=False)) == "Hi"
    with pytest.raises(RequestError, match="the adapter's chat template refuses these messages: no"):
        made.encode_chat(said, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(RequestError, match="'messages' is given by the server"):
        made.encode_chat(said, template_kwargs={"messages": []})


def test_a_template_that_refuses_or_is_missing_is_the_clients_error() -> None:
    raw = tiny_tokenizer()
    raw.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        BaseTokenizer(raw, None, 320).encode_chat([{"role": "user", "content": "Hi"}])
    raw.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        BaseTokenizer(raw, None, 320).encode_chat([{"role": "user", "content": "Hi"}])


def test_a_hostile_template_reaches_nothing_outside_its_sandbox() -> None:
    raw = tiny_tokenizer()
    raw.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="refuses"):
        BaseTokenizer(raw, None, 320).encode_chat([{"role": "user", "content": "Hi"}])


def copies_of(directory: Path) -> dict[str, torch.Tensor]:
    """Head and embedding under every name that the model gives them, and a norm."""
    held = load_file(directory / "model.safetensors")
    embedding = held["model.embed_tokens.weight"]
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    return {name: held.get(name, embedding) for name in names}


@pytest.mark.parametrize("kernels", available_kernels(CPU))
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_knows_copies_of_its_weights_to_the_last_bit(tied: bool, kernels: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    info = load(str(directory), tmp_path, kernels).info()
    for name, held in copies_of(directory).items():
        assert info.tensor_equals(name, held) and info.tensor_equals(name, held.float())
        changed = held.clone()
        changed.view(-1).view(torch.int16)[len(held) // 2] ^= 1  # the last bit of one number
        assert not info.tensor_equals(name, changed)
        assert not info.tensor_equals(name, held[:-1])
        assert not info.tensor_equals(f"no.{name}", held)


def test_copies_are_compared_with_a_checkpoint_of_several_files_and_of_a_body_alone(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    held = copies_of(directory)
    tensors = load_file(directory / "model.safetensors")
    alone = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    (directory / "model.safetensors").unlink()
    files = {name: f"model-{1 + index % 2}-of-2.safetensors" for index, name in enumerate(alone)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in alone.items() if files[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    info = load(str(directory), tmp_path).info()
    for name, tensor in held.items():
        assert info.tensor_equals(name, tensor) and not info.tensor_equals(name, tensor + 1)


@pytest.mark.skipif("native" not in available_kernels(CPU), reason="there are no compiled kernels")
def test_a_copy_that_cannot_be_compared_is_refused_by_name(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base")
    held = copies_of(directory)
    info = load(str(directory), tmp_path).info()
    (directory / "model.safetensors").unlink()
    assert info.tensor_equals("model.norm.weight", held["model.norm.weight"])
    with pytest.raises(AdapterRejected, match=r"copy of the base's lm_head.weight, which cannot be .*holds no"):
        info.tensor_equals("lm_head.weight", held["lm_head.weight"])
