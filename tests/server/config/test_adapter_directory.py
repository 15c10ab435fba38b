from __future__ import annotations

from pathlib import Path

import pytest

from loramux_server.config.adapter_directory import find_adapter
from loramux_server.errors import CommandFailed
from support.adapter_files import write_adapter


def test_an_adapter_is_found_by_directory_run_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = tmp_path / "trained"
    directory = write_adapter(trained / "spam" / "adapter", {"q_proj": (8, 8)})
    monkeypatch.chdir(tmp_path)

    for spec in (str(directory), str(trained / "spam"), "spam"):
        assert find_adapter(spec, trained) == directory
    with pytest.raises(CommandFailed, match="no adapter 'ham'.*loramux train"):
        find_adapter("ham", trained)


def test_a_run_is_found_by_a_name_with_a_slash(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "org--spam" / "adapter", {"q_proj": (8, 8)})

    assert find_adapter("org/spam", tmp_path) == directory
