"""Keys in their file: told once, kept as a hash, refused from the moment they are revoked."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loramux_server.access.access_file import ACCESS_FILE, SECRET_FILE, AccessFile, has_keys
from loramux_server.access.caller import Caller, Scope, check_tenant, scopes_of
from loramux_server.access.key_text import KeyText
from loramux_server.access.spans import seconds_of
from loramux_server.errors import AccessUnavailable, ConfigError, NoSuchKey

INFER = frozenset({Scope.INFER})


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path, clock: Clock) -> AccessFile:
    return AccessFile(tmp_path / "store", clock=clock)


def text(key: KeyText) -> bytes:
    return str(key).encode()


def test_a_key_says_whose_it_is_and_what_it_may_do(file: AccessFile) -> None:
    assert not file.has_keys and file.records() == []
    key, record = file.create(tenant="acme", scopes=frozenset({Scope.INFER, Scope.UPLOAD}), note="shop")
    assert file.has_keys
    assert file.caller(text(key)) == Caller(f"key {key.id}", "acme", frozenset({Scope.INFER, Scope.UPLOAD}))
    assert file.records() == [record] and [tenant.name for tenant in file.tenants()] == ["acme"]
    assert file.records("other") == []


def test_limits_alone_close_no_server(file: AccessFile, tmp_path: Path) -> None:
    file.limit("acme", {"weight": 2})
    assert not file.has_keys and not has_keys(tmp_path / "store")
    assert [tenant.name for tenant in file.tenants()] == ["acme"] and file.records() == []
    key, _ = file.create(tenant="acme", scopes=INFER)
    assert file.has_keys and has_keys(tmp_path / "store")
    found = file.caller(text(key))
    assert found is not None and found.limits.weight == 2


def test_no_secret_is_stored_shown_or_readable_by_others(file: AccessFile, tmp_path: Path) -> None:
    key, record = file.create(tenant=None, scopes=INFER)
    file.close()
    for path in (tmp_path / "store").iterdir():
        content = path.read_bytes()
        assert key.secret.encode() not in content and str(key).encode() not in content
        assert path.stat().st_mode & 0o077 == 0, path.name
    assert key.secret not in repr(key) and key.secret not in repr(record) and key.secret not in str(record.told(0))


@pytest.mark.parametrize(
    "changed",
    [
        lambda key: f"lmx_{key.id}_{'A' * 43}",
        lambda key: f"lmx_{'0' * 10}_{key.secret}",
        lambda key: str(key)[:-1],
        lambda key: str(key) + "A",
        lambda key: str(key).upper(),
        lambda key: f" {key}",
        lambda key: f"{key}\n",
        lambda key: str(key).replace("lmx", "lmy"),
        lambda key: "\u00e9" + str(key),
        lambda key: "",
    ],
)
def test_anything_but_the_key_itself_is_nobody(file: AccessFile, changed: object) -> None:
    key, _ = file.create(tenant=None, scopes=INFER)
    assert callable(changed)
    assert file.caller(changed(key).encode()) is None


def test_a_key_of_another_store_is_nobody(file: AccessFile, tmp_path: Path) -> None:
    """Not even where its row is copied: the hash is keyed by each store's own secret."""
    key, _ = file.create(tenant=None, scopes=INFER)
    other = AccessFile(tmp_path / "other")
    other.create(tenant=None, scopes=INFER)
    with sqlite3.connect(tmp_path / "store" / ACCESS_FILE) as mine:
        row = mine.execute("SELECT * FROM keys").fetchone()
    with sqlite3.connect(tmp_path / "other" / ACCESS_FILE) as theirs:
        theirs.execute(f"INSERT INTO keys VALUES ({', '.join('?' * len(row))})", row)
    assert other.caller(text(key)) is None


def test_a_revoked_key_is_nobody_from_then_on_whoever_revoked_it(file: AccessFile, tmp_path: Path) -> None:
    key, _ = file.create(tenant=None, scopes=INFER)
    assert file.caller(text(key)) is not None
    AccessFile(tmp_path / "store", clock=Clock()).revoke(key.id)  # another process, say
    assert file.caller(text(key)) is None
    assert [record.state(Clock.now) for record in file.records()] == ["revoked"]


def test_a_key_ends_when_it_should(file: AccessFile, clock: Clock) -> None:
    key, record = file.create(tenant=None, scopes=INFER, expires=int(clock.now) + 60)
    clock.now += 59
    assert file.caller(text(key)) is not None
    clock.now += 1
    assert file.caller(text(key)) is None and record.state(clock.now) == "expired"


def test_rotation_leaves_the_old_key_for_a_while(file: AccessFile, clock: Clock) -> None:
    old, _ = file.create(tenant="acme", scopes=INFER, note="shop")
    new, record = file.rotate(old.id, overlap=10)
    assert (record.tenant, record.scopes, record.note) == ("acme", INFER, "shop")
    assert file.caller(text(old)) is not None and file.caller(text(new)) is not None
    clock.now += 10
    assert file.caller(text(old)) is None and file.caller(text(new)) is not None
    with pytest.raises(NoSuchKey, match="is revoked; create a new one"):
        file.rotate(old.id)


def test_a_second_rotation_or_revocation_never_lengthens_a_life(file: AccessFile, clock: Clock) -> None:
    key, _ = file.create(tenant=None, scopes=INFER)
    file.rotate(key.id, overlap=10)
    file.rotate(key.id, overlap=1000)
    clock.now += 10
    assert file.caller(text(key)) is None
    first = file.revoke(key.id)
    assert first.revoked == int(clock.now)
    clock.now += 5
    assert file.revoke(key.id).revoked == first.revoked


def test_keys_of_another_tenant_cannot_be_touched(file: AccessFile) -> None:
    key, _ = file.create(tenant="acme", scopes=INFER)
    for act in (file.revoke, file.rotate):
        with pytest.raises(NoSuchKey) as theirs:
            act(key.id, tenant="other")
        with pytest.raises(NoSuchKey) as unknown:
            act("0" * 10, tenant="other")
        assert str(theirs.value).replace(key.id, "0" * 10) == str(unknown.value)
    assert file.caller(text(key)) is not None


def test_two_processes_that_make_the_first_key_at_the_same_time_share_one_secret(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from loramux_server.access.access_file import AccessFile\n"
        "from loramux_server.access.caller import Scope\n"
        "print(AccessFile(Path(sys.argv[1])).create(tenant=None, scopes=frozenset({Scope.INFER}))[0])"
    )
    root = tmp_path / "store"
    running = [subprocess.Popen([sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE) for _ in range(4)]
    keys = [process.communicate()[0].strip() for process in running]
    file = AccessFile(root)
    assert len(set(keys)) == 4 and all(file.caller(key) is not None for key in keys)
    assert sorted(path.name for path in root.iterdir() if not path.name.startswith(ACCESS_FILE)) == [SECRET_FILE]


def test_a_look_does_not_wait_for_a_writer(file: AccessFile, tmp_path: Path) -> None:
    key, _ = file.create(tenant=None, scopes=INFER)
    with sqlite3.connect(tmp_path / "store" / ACCESS_FILE, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = threading.Thread(target=lambda: file.create(tenant=None, scopes=INFER))
        writing.start()
        assert file.caller(text(key)) is not None
        assert writing.is_alive()
        other.execute("COMMIT")
    writing.join(30)
    assert len(file.records()) == 2


def test_what_cannot_be_read_lets_nobody_in(file: AccessFile, tmp_path: Path) -> None:
    key, _ = file.create(tenant=None, scopes=INFER)
    file.close()
    path = tmp_path / "store" / ACCESS_FILE
    whole = path.read_bytes()
    path.write_bytes(os.urandom(len(whole)))
    for suffix in ("-wal", "-shm"):
        (tmp_path / "store" / (ACCESS_FILE + suffix)).unlink(missing_ok=True)
    with pytest.raises(AccessUnavailable):
        file.caller(text(key))
    path.write_bytes(whole)
    (tmp_path / "store" / SECRET_FILE).write_bytes(b"short")
    with pytest.raises(AccessUnavailable, match=r"access\.secret is damaged"):
        AccessFile(tmp_path / "store").caller(text(key))
    (tmp_path / "store" / SECRET_FILE).unlink()
    with pytest.raises(AccessUnavailable):
        AccessFile(tmp_path / "store").caller(text(key))


def test_a_file_of_a_newer_version_is_refused(file: AccessFile, tmp_path: Path) -> None:
    file.create(tenant=None, scopes=INFER)
    file.close()
    with sqlite3.connect(tmp_path / "store" / ACCESS_FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(AccessUnavailable, match="newer loramux"):
        file.records()


def test_scopes_and_who_has_them() -> None:
    assert scopes_of(["infer", "admin"]) == {Scope.INFER, Scope.ADMIN}
    with pytest.raises(ConfigError, match="no scope 'uplod'; did you mean upload"):
        scopes_of(["uplod"])
    with pytest.raises(ConfigError, match="needs a scope"):
        scopes_of([])
    admin, tenants = Caller("x", None, frozenset({Scope.ADMIN})), Caller("x", "acme", frozenset({Scope.ADMIN}))
    assert all(admin.may([scope]) for scope in Scope)
    assert [scope for scope in Scope if not tenants.may([scope])] == [Scope.METRICS]
    assert not Caller("x", None, INFER).may([Scope.UPLOAD, Scope.TRAIN])


@pytest.mark.parametrize("name", ["acme", "a", "a.b_c-1", "0"])
def test_names_of_tenants(name: str) -> None:
    assert check_tenant(name) == name


@pytest.mark.parametrize("name", ["", "Acme", "-a", "a~b", "a/b", "a" * 64, "a\n", "a b"])
def test_what_no_tenant_is_called(name: str) -> None:
    with pytest.raises(ConfigError, match="tenant's name"):
        check_tenant(name)


@pytest.mark.parametrize(("span", "seconds"), [("90s", 90), ("15m", 900), ("12h", 43200), ("30d", 2592000), ("0s", 0)])
def test_spans(span: str, seconds: int) -> None:
    assert seconds_of(span, "--expires") == seconds


@pytest.mark.parametrize("span", ["", "5", "d", "-1d", "1y", "1.5d", "999999999w", "1d "])
def test_what_is_no_span(span: str) -> None:
    with pytest.raises(ConfigError, match="--expires is a number and a unit"):
        seconds_of(span, "--expires")
