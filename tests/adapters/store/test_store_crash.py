"""The kill matrix: a store whose changes are killed with -9 before each of their steps, and what it reopens as.

Its index is removed as well, before or after the reopening: what comes back from the directories alone is the
same, or, if the change was under way, all that had been acknowledged before it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loramux_adapters.artifact.format import WEIGHTS_FILE
from loramux_adapters.errors import IndexLost
from loramux_adapters.store.index_file import INDEX_FILE
from loramux_adapters.store.rebuild import rebuild_index
from loramux_adapters.store.store import AdapterStore
from support.adapter_files import TINY_LINEARS, write_adapter

SCRIPT = Path(__file__).parents[2] / "support" / "crash_store.py"
BRINGS_FILES = ("publish", "replace", "repair", "restore", "gc-opening")
State = dict[str, tuple[str, tuple[str, ...], bool, bool]]  # name -> current, kept, pinned, corrupt


def upload(store: AdapterStore, name: str, seed: int) -> str:
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=4, seed=seed)
        return store.publish(name, staging, rank=4, base_id=None, target_modules=["q_proj"]).version


def state_of(store: AdapterStore) -> State:
    return {
        record.name: (record.version, tuple(kept.version for kept in record.versions), record.pinned, record.corrupt)
        for record in store.records()
    }


def assert_consistent(store: AdapterStore, root: Path) -> None:
    kept = {version.version: version.corrupt for record in store.records() for version in record.versions}
    sound = {version for version, is_corrupt in kept.items() if not is_corrupt}
    for version in sound:
        assert store.load(version).version == version
    assert {path.name for path in (root / "versions").iterdir()} == sound
    assert not list((root / "staging").iterdir())
    set_aside = {path.name.partition(".")[::2] for path in (root / "quarantine").iterdir()}
    assert {digest for digest, time in set_aside if not time} <= kept.keys() - sound
    store.check_integrity()


def opened_without_index(root: Path) -> AdapterStore:
    for path in root.glob(f"{INDEX_FILE}*"):
        path.unlink()
    with pytest.raises(IndexLost):
        AdapterStore(root, keep_versions=2)
    rebuild_index(root)
    return AdapterStore(root, keep_versions=2)


def assert_nothing_acknowledged_is_lost(state: State, old: State, new: State) -> None:
    """Of a store whose index was lost in the middle of the change from `old` to `new`."""
    assert state.keys() <= old.keys() | new.keys() and state.keys() >= old.keys() & new.keys()
    for name, (current, kept, *_) in state.items():
        both = [states[name] for states in (old, new) if name in states]
        assert current in {one[0] for one in both}
        if len(both) == 2:  # or it comes, or is deleted, at this moment
            assert set(kept) >= set.intersection(*(set(one[1]) for one in both))
        assert name != "other" or state[name] == old[name]


def prepare(action: str, root: Path) -> None:
    """The store before the change: two names, one of them with an older version."""
    store = AdapterStore(root, keep_versions=2)
    upload(store, "other", 9)
    upload(store, "tuned", 0)
    current = upload(store, "tuned", 1)
    weights = store.directory(current) / WEIGHTS_FILE
    if action in ("quarantine", "repair"):
        weights.write_bytes(weights.read_bytes()[:-1])
    if action == "repair":
        with pytest.raises(Exception, match="cannot be read|not those"):
            store.load(current)
    store.close()
    if action == "gc-opening":
        for litter in ("staging/incoming-1", "staging/outgoing-1", "versions/" + "0" * 64, "quarantine/" + "1" * 64):
            shutil.copytree(weights.parent, root / litter)


@pytest.mark.parametrize(
    ("action", "steps"),
    [("replace", "lines")]
    + [(action, "calls") for action in ("publish", "rollback", "pin", "delete", "quarantine", "repair", "restore")]
    + [(action, "calls") for action in ("gc-last-lease", "gc-others", "gc-opening")],
)
def test_killed_before_any_step_it_reopens_in_the_old_or_the_new_state(
    action: str, steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them
    template = tmp_path / "template"
    prepare(action, template)
    files = write_adapter(
        tmp_path / "upload", TINY_LINEARS, targets=["q_proj"], rank=4, seed=1 if action == "repair" else 2
    )
    work = tmp_path / "work"
    work.mkdir()

    done = subprocess.run(
        [sys.executable, SCRIPT, action, steps, template, files, work],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    killed, calls = map(int, done.stdout.split())
    print(f"kill matrix: {action}: {killed} kill points, {calls} of them calls")
    assert calls >= 5 and (killed > 60 or steps == "calls")

    seen: list[State] = []
    lost: list[State] = []
    for number in range(1, killed + 2):
        root = work / str(number)
        is_sampled = number % (8 if steps == "lines" else 2) == 0 or number == killed + 1
        if is_sampled:
            shutil.copytree(root, work / "lost")
            store = opened_without_index(work / "lost")
            lost.append(state_of(store))
            store.check_integrity()
            store.close()
            shutil.rmtree(work / "lost")
        store = AdapterStore(root, keep_versions=2)
        for record in store.records():  # damage that was not noted yet is found at the next load, and noted
            for kept in record.versions:
                if not kept.corrupt and action == "quarantine":
                    load_or_set_aside(store, kept.version)
        assert_consistent(store, root)
        if action not in BRINGS_FILES:
            assert all("." not in path.name for path in (root / "quarantine").iterdir()), "what was deleted goes"
        seen.append(state_of(store))
        if number % 10 == 0:
            upload(store, "tuned", 5)
            assert_consistent(store, root)
        state = state_of(store)
        store.close()
        if is_sampled:
            store = opened_without_index(root)
            assert state_of(store) == state
            assert_consistent(store, root)
            store.close()
        shutil.rmtree(root)
    old, new = seen[0], seen[-1]
    assert old != new or action in ("gc-opening", "quarantine")
    switch = seen.index(new)
    assert all(state == old for state in seen[:switch]), "old until the change"
    assert all(state == new for state in seen[switch:]), "new from then on"
    assert {name: state for name, state in new.items() if name == "other"} == {"other": old["other"]}
    for state in lost:
        assert_nothing_acknowledged_is_lost(state, old, new)
    assert lost[-1] == new


def load_or_set_aside(store: AdapterStore, version: str) -> None:
    try:
        store.load(version)
    except Exception as error:
        assert "cannot be read" in str(error) or "not those" in str(error)
