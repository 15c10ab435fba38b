"""The store of 10,000 adapters that the load test makes, with a few of them."""

from __future__ import annotations

from pathlib import Path

from loadtests.opening import STAGE, forget, write_backup

from loramux_adapters.store.store import AdapterStore
from loramux_server.publishing.backup import restore_backup
from loramux_server.serving.startup import Stages


def test_the_backup_that_is_written_by_hand_holds_adapters_each_with_weights_of_its_own(tmp_path: Path) -> None:
    write_backup(tmp_path / "backup", 5)
    store = AdapterStore(tmp_path / "store")
    outcome = restore_backup(store, tmp_path / "backup", replace=False)
    assert outcome.refused == {} and len({record.version for record in store.records()}) == 5
    for record in store.records():
        assert store.load(record.version).rank == 1
    forget(tmp_path / "store")
    store.check_integrity()
    store.close()


def test_the_start_report_is_read_whether_or_not_something_was_noted_meanwhile() -> None:
    for note in (None, "set aside in quarantine/"):
        said: list[str] = []
        stages = Stages(said.append, clock=iter([0.0, 1.26]).__next__)
        with stages.stage("open the adapter store"):
            if note is not None:
                stages.note(note)
        found = STAGE.search("".join(said).encode())
        assert found is not None and found[1] == b"1.3"
