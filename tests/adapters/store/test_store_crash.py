"""The kill matrix: a store whose changes are killed with -9 before each of their steps, and what it reopens as."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loramux_adapters.artifact.format import WEIGHTS_FILE
from loramux_adapters.store.store import AdapterStore
from support.adapter_files import TINY_LINEARS, write_adapter

SCRIPT = Path(__file__).parents[2] / "support" / "crash_store.py"
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
    assert {path.name for path in (root / "quarantine").iterdir()} <= kept.keys() - sound


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
    for number in range(1, killed + 2):
        root = work / str(number)
        store = AdapterStore(root, keep_versions=2)
        for record in store.records():  # damage that was not noted yet is found at the next load, and noted
            for kept in record.versions:
                if not kept.corrupt and action == "quarantine":
                    load_or_set_aside(store, kept.version)
        assert_consistent(store, root)
        seen.append(state_of(store))
        if number % 10 == 0:
            upload(store, "tuned", 5)
            assert_consistent(store, root)
        store.close()
        shutil.rmtree(root)
    old, new = seen[0], seen[-1]
    assert old != new or action in ("gc-opening", "quarantine")
    switch = seen.index(new)
    assert all(state == old for state in seen[:switch]), "old until the change"
    assert all(state == new for state in seen[switch:]), "new from then on"
    assert {name: state for name, state in new.items() if name == "other"} == {"other": old["other"]}


def load_or_set_aside(store: AdapterStore, version: str) -> None:
    try:
        store.load(version)
    except Exception as error:
        assert "cannot be read" in str(error) or "not those" in str(error)
