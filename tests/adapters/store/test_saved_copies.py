"""Versions from before modules that were saved whole counted: they hold copies of the base's, and stay as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.artifact.format import WEIGHTS_FILE, digest_of, has_digest, read_config, without_saved
from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.store.store import AdapterStore
from support.adapter_files import TINY_LINEARS, write_adapter


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = AdapterStore(tmp_path / "store")
    yield opened
    opened.close()


def with_copy(directory: Path) -> Path:
    write_adapter(directory, TINY_LINEARS, rank=4, extra_config={"modules_to_save": ["lm_head"]})
    tensors = load_file(directory / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.weight"] = torch.ones(320, 64, dtype=torch.bfloat16)
    save_file(tensors, directory / WEIGHTS_FILE)
    return directory


def publish(store: AdapterStore, directory: Path, version: str) -> None:
    with store.stage() as staging:
        for file in directory.iterdir():
            (staging.directory / file.name).write_bytes(file.read_bytes())
        store.publish("old", staging, rank=4, base_id=None, target_modules=[], version=version)


def test_it_is_loaded_as_it_was_and_not_set_aside(store: AdapterStore, tmp_path: Path) -> None:
    directory = with_copy(tmp_path / "adapter")
    config = read_config(directory)
    old, new = digest_of(without_saved(config), directory), digest_of(config, directory)
    assert old != new and has_digest(directory, old) and has_digest(directory, new)
    publish(store, directory, old)

    adapter = store.load(old)

    assert adapter.version == old and adapter.tokens is None
    assert store.record("old").versions[0].version == old


def test_one_that_was_damaged_since_is_set_aside_all_the_same(store: AdapterStore, tmp_path: Path) -> None:
    directory = with_copy(tmp_path / "adapter")
    old = digest_of(without_saved(read_config(directory)), directory)
    publish(store, directory, old)
    file = store.directory(old) / WEIGHTS_FILE
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: tensors[name] + 1}, file)

    assert not has_digest(store.directory(old), old)
    with pytest.raises(AdapterCorrupt):
        store.load(old)
