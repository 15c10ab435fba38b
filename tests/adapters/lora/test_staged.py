"""Versions that are tried out before they are published."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.staged import StagedVersions
from support.adapter_files import TINY_LINEARS, write_adapter


def published(version: str) -> HostAdapter:
    return HostAdapter(f"published {version}", 1, 0, {})


def test_a_version_is_read_from_its_staging_directory_while_it_is_held_and_from_the_store_otherwise(
    tmp_path: Path,
) -> None:
    staged = StagedVersions(published)
    directory = write_adapter(tmp_path / "a", TINY_LINEARS, rank=5)
    assert staged.load("v").version == "published v"
    with staged.holding("v", directory):
        adapter = staged.load("v")
        assert (adapter.version, adapter.rank) == ("v", 5)
        assert staged.load("w").version == "published w"
    assert staged.load("v").version == "published v"


def test_of_two_uploads_of_one_version_either_may_end_first(tmp_path: Path) -> None:
    staged = StagedVersions(published)
    first, second = (write_adapter(tmp_path / name, TINY_LINEARS) for name in "ab")
    with staged.holding("v", second):
        with staged.holding("v", first):
            assert staged.load("v").version == "v"
        assert staged.load("v").version == "v"
    assert staged.load("v").version == "published v"


def test_staged_files_that_are_gone_are_an_error_of_that_load(tmp_path: Path) -> None:
    staged = StagedVersions(published)
    with staged.holding("v", tmp_path / "gone"), pytest.raises(AdapterCorrupt, match="cannot be read"):
        staged.load("v")
