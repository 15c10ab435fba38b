from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux_adapters.artifact.reading import own_files
from loramux_adapters.artifact.reading.own_files import LinkInTheWay, open_regular, own_directory
from loramux_adapters.errors import AdapterRejected


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache with two models, as the hub's client writes it, and a secret beside them."""
    for model in ("models--org--mine", "models--org--other"):
        root = tmp_path / "hub" / model
        (root / "snapshots" / "abc").mkdir(parents=True)
        (root / "blobs").mkdir()
        (root / "blobs" / "1234").write_text(model)
        (root / "snapshots" / "abc" / "config").symlink_to("../../blobs/1234")
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "hub"


def read(top: Path, parts: list[str], name: str = "config") -> str:
    with own_directory(top, parts) as directory:
        assert directory is not None
        look = directory.look(name)
        with os.fdopen(directory.open(name)) as file:
            assert look is not None and look.st_ino == os.fstat(file.fileno()).st_ino
            return file.read()


MINE = ["models--org--mine", "snapshots", "abc"]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_snapshot_of_the_hub_is_read_from_wherever_it_is_named(hub: Path, depth: int) -> None:
    assert read(hub.joinpath(*MINE[:depth]), MINE[depth:]) == "models--org--mine"
    with open_regular(hub.joinpath(*MINE, "config")) as file:
        assert file.read() == b"models--org--mine"


@pytest.mark.parametrize(
    "target",
    [
        "../../../models--org--other/blobs/1234",
        "../../../../secret",
        "/etc/passwd",
        "../../blobs/../../models--org--other/blobs/1234",
        "../../blobs/up/models--org--other/blobs/1234",
        "../../../models--org--mine/blobs/1234",  # out and in again: whoever renames a directory leads elsewhere
        "{hub}/models--org--mine/../models--org--other/blobs/1234",
        "{hub}/models--org--minecraft/blobs/1234",
    ],
)
def test_a_link_that_leaves_the_models_own_directory_is_refused_with_where_it_points(hub: Path, target: str) -> None:
    (hub / "models--org--mine" / "blobs" / "up").symlink_to("../..")
    target = target.format(hub=hub)
    link = hub.joinpath(*MINE, "weights")
    link.symlink_to(target)
    with own_directory(hub, MINE) as directory:
        assert directory is not None
        for call in (directory.look, directory.open):
            with pytest.raises(LinkInTheWay, match="'weights' is a symbolic link to .*out of the adapter's own dir"):
                call("weights")
    with pytest.raises(AdapterRejected, match="leads out"):
        open_regular(link)


def test_an_absolute_link_inside_and_links_to_links_are_followed(hub: Path) -> None:
    root = hub / "models--org--mine"
    (root / "snapshots" / "abc" / "a").symlink_to(root / "blobs" / "1234")
    (root / "snapshots" / "abc" / "b").symlink_to("./a")
    (root / "links").symlink_to("snapshots/abc")
    (root / "snapshots" / "abc" / "c").symlink_to("../../links/../abc/./b")
    for name in "abc":
        assert read(hub, MINE, name) == "models--org--mine"


def test_without_the_hubs_layout_the_own_root_is_the_directory_itself(tmp_path: Path) -> None:
    adapter = tmp_path / "all" / "adapter"
    (adapter / "..2026").mkdir(parents=True)
    (adapter / "..2026" / "config").write_text("in")
    (adapter / "..data").symlink_to("..2026")  # as Kubernetes mounts a volume
    (adapter / "config").symlink_to("..data/config")
    (tmp_path / "all" / "beside").write_text("out")
    (adapter / "weights").symlink_to("../beside")
    assert read(tmp_path / "all", ["adapter"]) == "in"
    with pytest.raises(LinkInTheWay, match="leads out of the adapter's own directory"):
        read(tmp_path / "all", ["adapter"], "weights")


@pytest.mark.parametrize("names", [("snapshots", "models--x"), ("models--x", "snapshot"), ("models", "snapshots")])
def test_what_only_resembles_the_hubs_layout_widens_nothing(tmp_path: Path, names: tuple[str, str]) -> None:
    directory = tmp_path.joinpath(*names, "abc")
    directory.mkdir(parents=True)
    (tmp_path / names[0] / "blob").write_text("x")
    (directory / "config").symlink_to("../../blob")
    with pytest.raises(LinkInTheWay):
        read(tmp_path, [*names, "abc"])


def test_a_directory_may_be_a_link_that_stays_below_the_top(tmp_path: Path) -> None:
    (tmp_path / "top" / "run-42").mkdir(parents=True)
    (tmp_path / "top" / "run-42" / "config").write_text("x")
    (tmp_path / "top" / "latest").symlink_to("run-42")
    (tmp_path / "top" / "out").symlink_to("..")
    assert read(tmp_path / "top", ["latest"]) == "x"
    with pytest.raises(LinkInTheWay, match="out of the directory that adapters are taken from"):
        read(tmp_path / "top", ["out", "top", "run-42"])


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.mkdir()], ids=["pipe", "directory"])
def test_only_regular_files_are_opened_also_over_links(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with own_directory(tmp_path) as directory:
        assert directory is not None
        for name in ("real", "link"):
            for call in (directory.look, directory.open):
                with pytest.raises((LinkInTheWay, OSError)):
                    call(name)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(AdapterRejected, match="circle"):
        open_regular(tmp_path / "a")


def test_a_link_to_nothing_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("gone")
    with own_directory(tmp_path) as directory:
        assert directory is not None and directory.look("a") is None
    with pytest.raises(AdapterRejected, match="a is missing"):
        open_regular(tmp_path / "a")
    with own_directory(tmp_path, ["nobody"]) as nothing:
        assert nothing is None


def test_a_link_that_is_changed_while_the_way_is_walked_gains_nothing(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single step of the walk, the next thing on the way becomes a link to the secret's directory."""
    blobs, secret = hub / "models--org--mine" / "blobs", hub.parent
    (secret / "1234").write_text("secret")
    plain = own_files._link_at
    steps = iter(())

    def swap(directory: int, name: str) -> str | None:
        found = plain(directory, name)
        if next(steps, None) == 0:
            blobs.rename(hub / "away")
            blobs.symlink_to(secret)
        return found

    monkeypatch.setattr(own_files, "_link_at", swap)
    swaps = 0
    for last in range(30):
        steps = iter(range(last, -1, -1))
        try:
            assert read(hub, MINE) != "secret"
        except (LinkInTheWay, OSError):
            pass
        if blobs.is_symlink():
            swaps += 1
            blobs.unlink()
            (hub / "away").rename(blobs)
    assert 5 < swaps < 30


def test_no_descriptor_is_left_open(hub: Path) -> None:
    (hub.joinpath(*MINE) / "out").symlink_to("../../../x")
    before = os.listdir("/proc/self/fd")
    for name in ("config", "out", "none"):
        with pytest.raises(AdapterRejected) if name != "config" else open_regular(hub.joinpath(*MINE, name)):
            open_regular(hub.joinpath(*MINE, name)).close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
